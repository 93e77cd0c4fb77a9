"""A run that is killed: kill -9 at random moments, resumed, and held against the run that was left alone.

Children are forked from a process that has imported everything and computed nothing, so a start costs
milliseconds and the moments fall on the work.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import sparsekit.run  # noqa: F401  # everything a child needs is imported before it is forked
from sparsekit.cli import main
from sparsekit.models.locate import ASSETS

RECIPE = """\
name: crash
seed: 0
model: {{path: {model}, device: cpu}}
data:
  calibration: {{path: builtin:calibration, samples: 8, seq_len: 32}}
  train: {{path: builtin:train, seq_len: 32, samples: 64}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 16}}}}
steps:
  - {{method: ast, pattern: "2:4", tokens: 2048, batch: 4, micro_batch: 2, mask_every: 2, checkpoint_every: 2}}
  - {{method: gptq, bits: 4, group_size: 16}}
evaluate: {{perplexity: [heldout]}}
export: {{formats: [dense, gptq]}}
"""


@dataclass(frozen=True, slots=True)
class Crash:
    """One killed run.

    Attributes:
        at: Seconds after its start.
        phase: What was on disk then: nothing, tokens, dense, ast, gptq, export, report.
        identical: Whether the resumed run has the weights of the one left alone, bit for bit.
    """

    at: float
    phase: str
    identical: bool


def harness(work: Path, model: str, moments: int, seed: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Kill a run at random moments and resume it each time.

    Args:
        work: A directory for models and runs.
        model: `random` for a random Llama of 2 blocks, or what a recipe calls a model.
        moments: How many.
        seed: Of the moments.
        told: Called with a line for each.
    Raises:
        AssertionError: A run left alone or resumed did not end well.
    """
    torch.set_num_threads(1)  # bit-identity is promised for a fixed number of threads
    gc.freeze()  # what was imported is not looked through in each child
    work.mkdir(parents=True, exist_ok=True)
    if model == "random":
        model = str(work / "model")
        assert ended(forked(lambda: random_model(Path(model)), work / "model.log")) == 0
    recipe = work / "crash.yaml"
    recipe.write_text(RECIPE.format(model=model))
    start = time.monotonic()
    assert ended(run(recipe, work / "whole")) == 0, (work / "whole.log").read_text()
    seconds = time.monotonic() - start
    expected = weights(work / "whole")
    assert expected
    chance, crashes = random.Random(seed), []
    for number in range(moments):
        crashes.append(crash(recipe, work / f"killed-{number}", chance.uniform(0, seconds), expected))
        told(f"{number + 1} of {moments}: {crashes[-1]}")
        shutil.rmtree(work / f"killed-{number}")
    return {
        "moments": moments,
        "identical": sum(one.identical for one in crashes),
        "phases": dict(Counter(one.phase for one in crashes)),
        "whole_run_seconds": round(seconds, 2),
        "crashes": [{**asdict(one), "at": round(one.at, 3)} for one in crashes],
    }


def crash(recipe: Path, output: Path, after: float, expected: dict[str, str]) -> Crash:
    """Kill one run after some seconds, resume it and compare."""
    process = run(recipe, output)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    finished = ended(process) == 0
    phase = "finished" if finished else phase_of(output)
    assert finished or not (output / "report.json").exists() or phase == "report"
    assert ended(run(recipe, output)) == 0, output.with_suffix(".log").read_text()
    left = [path for path in output.rglob(".*") if path.name != ".lock"]
    assert not left, f"left behind: {left}"
    return Crash(after, phase, weights(output) == expected)


def run(recipe: Path, output: Path) -> int:
    """Start a run in a child; returns its process id."""
    arguments = ["run", str(recipe), "--set", f"output={output}"]
    return forked(lambda: main(arguments, standalone_mode=False), output.with_suffix(".log"))


def forked(work: Callable[[], Any], log: Path) -> int:
    """Do some work in a child process, which exits with 0 if it ends well."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                work()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def phase_of(output: Path) -> str:
    """How far a run had come, by what is on disk."""
    seen: list[tuple[str, Iterator[Path]]] = [
        ("report", output.glob("report.*")),
        ("export", output.glob("export/*")),
        ("gptq", output.glob("steps/2-*/*")),
        ("ast", output.glob("steps/1-*/*")),
        ("dense", output.glob("dense/*")),
        ("tokens", output.glob("tokens/*")),
    ]
    return next((name for name, found in seen if next(found, None)), "nothing")


def weights(output: Path) -> dict[str, str]:
    """Digest of every weight file of the steps and exports, by its path inside the run."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("steps", "export")
        for path in sorted((output / part).rglob("*.safetensors"))
        if "checkpoint" not in path.parts
    }


def random_model(directory: Path) -> None:
    """Write a random Llama of 2 blocks with the embedded tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
