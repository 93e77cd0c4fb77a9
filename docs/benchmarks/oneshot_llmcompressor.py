"""Part `llmcompressor` of oneshot.py: a whole block by sparsekit and by llm-compressor's own entry point.

Both sides get the same block, the same hidden states and the same device, in one process. llm-compressor
compresses a LlamaForCausalLM of that one block, whose inputs are the hidden states themselves (`inputs_embeds`)
in batches that its DataLoader holds already. Its time is that of its pipeline: the modifier is attached, the
windows run through the block once to calibrate, the linears are compressed, the windows run through it once more
and the modifier is taken off. Reading the model, parsing arguments and tracing the model's graph, which it does
once for a whole model, are not part of it; tracing is told beside it. It runs as it does by default, one window a
batch with the hidden states on the host, and as fast as it can be set here: several windows a batch, all on the
device.

It needs llmcompressor 0.14 with compressed-tensors, loguru, datasets, dill and multiprocess; auto-round, which
only one of its modifiers imports, may be absent.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekit import bench
from sparsekit.checkpoint import BlockState
from sparsekit.state import LinearState

JOBS = {
    "sparsegpt 2:4": bench.JOBS["sparsegpt 2:4"],
    "gptq int4 g128": bench.JOBS["gptq int4 g128"],
    "gptq int4 g128 static": bench.Job("gptq", {"act_order": "static"}, lambda layer: layer.quantized(4)),
}
BATCH = 8  # windows of the other side's faster setting
GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@dataclass(frozen=True, slots=True)
class Setting:
    """How llm-compressor is run.

    Attributes:
        batch: Windows its DataLoader hands over at a time.
        resident: Hidden states stay on the device from block to block.
    """

    batch: int
    resident: bool


SETTINGS = {"llm-compressor": Setting(1, False), "llm-compressor, tuned": Setting(BATCH, True)}


class LlmCompressor:
    """llm-compressor on the block of a `Bench`.

    Args:
        one: The block, its inputs and its device.
        directory: The block's model directory.
    """

    def __init__(self, one: bench.Bench, directory: Path) -> None:
        self._one, self._directory = one, directory
        self.tracing = 0.0  # seconds of the last run
        with torch.inference_mode(False):
            self._hidden = one.inputs.clone()

    def timed(self, job: str, setting: Setting, windows: int | None = None) -> tuple[float, int, BlockState]:
        """Seconds without tracing, bytes allocated at most, and the block it comes to; with all or some windows."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with torch.inference_mode(False), contextlib.redirect_stderr(io.StringIO()):  # it draws a bar for each pass
            model = AutoModelForCausalLM.from_pretrained(self._directory, dtype=self._one.view.compute_dtype)
            model.eval().requires_grad_(False).to(self._one.view.device)
            work = self._prepared(model, job, setting, self._hidden[:windows])
            with self._traced():
                seconds, peak, block = self._one.once(partial(self._run, model, work))
        return seconds - self.tracing, peak, block

    def _prepared(self, model: PreTrainedModel, job: str, setting: Setting, hidden: Tensor) -> Callable[[], None]:
        """Its entry point with everything read and parsed."""
        from llmcompressor import Oneshot  # noqa: PLC0415 - only this part needs it
        from torch.utils.data import DataLoader  # noqa: PLC0415

        where = self._one.view.device if setting.resident else torch.device("cpu")
        batches = [{"inputs_embeds": part.to(where)} for part in hidden.split(setting.batch)]
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type] - a list will do
        call = Oneshot(
            model=model,
            processor=object(),  # not used: no text is tokenized
            dataset=loader,
            recipe=[self._modifier(job)],
            pipeline="sequential",
            sequential_offload_device=str(where),
        )
        return partial(call.apply_recipe_modifiers, loader)

    def _modifier(self, job: str) -> object:
        """The modifier of a job."""
        if JOBS[job].method == "sparsegpt":
            from llmcompressor.modifiers.pruning import SparseGPTModifier  # noqa: PLC0415

            return SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
        from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415

        order = None if JOBS[job].arguments["act_order"] == "none" else "static"
        groups = {"all": {"targets": ["Linear"], "weights": GROUP}}
        return GPTQModifier(config_groups=groups, ignore=["re:.*lm_head"], actorder=order)

    def _run(self, model: PreTrainedModel, work: Callable[[], None]) -> BlockState:
        """Compress, and what the linears' weights have become."""
        work()
        names = self._one.block.linears
        found = {name: LinearState(name, model.get_submodule(name).weight.detach().float()) for name in names}
        return BlockState(found, self._one.block.params)

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        """Take the time of tracing."""
        from llmcompressor.pipelines.sequential import pipeline  # noqa: PLC0415

        trace = pipeline.trace_subgraphs

        def noted(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = trace(*arguments)
            self.tracing = time.perf_counter() - start
            return found

        pipeline.trace_subgraphs = noted
        try:
            yield
        finally:
            pipeline.trace_subgraphs = trace


def llmcompressor(small: bool, windows: int, repeats: int, jobs: list[str], told: Callable[[Any], None]) -> Any:
    """The whole block of each job on both sides.

    Args:
        small: A small block, for a CPU.
        windows: Calibration windows of the large one.
        repeats: Timed runs of each side, of ours three at least, after one that compiles.
        jobs: Names of `JOBS`.
        told: Called with what is known so far after every side.
    """
    from llmcompressor import logger  # noqa: PLC0415

    logger.remove()  # it tells of every linear
    shape = bench.SMALL if small else bench.Shape(4096, 11008, 32, windows, 2048)
    found: dict[str, Any] = {"shape": asdict(shape), "versions": versions(), "jobs": {}}
    with tempfile.TemporaryDirectory() as directory:
        one = bench.Bench(shape, "auto", Path(directory))
        theirs = LlmCompressor(one, Path(directory))
        for job in jobs:
            rows: list[dict[str, Any]] = []
            found["jobs"][job] = rows
            for row in sides(one, theirs, job, repeats):
                rows.append(row)
                fastest = min((each["seconds"] for each in rows if "tracing" in each), default=row["seconds"])
                row["ratio to the fastest of theirs"] = round(fastest / row["seconds"], 2)
                print(f"{job:22}", json.dumps(row), flush=True)
                told(found)
    return found


def sides(one: bench.Bench, theirs: LlmCompressor, job: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each setting of theirs and each schedule of ours."""
    theirs.timed(job, Setting(BATCH, True), BATCH)  # Triton compiles, the libraries start
    for name, setting in SETTINGS.items():
        runs = [theirs.timed(job, setting) for _ in range(repeats)]
        yield {**row_of(name, runs, one), "tracing": round(theirs.tracing, 3)}
    for schedule in bench.SCHEDULES:
        work = partial(one.ours, JOBS[job], schedule)
        for _ in range(bench.WARM_UP):
            work()
        yield row_of(f"sparsekit {schedule}", [one.once(work) for _ in range(max(3, repeats))], one)


def row_of(side: str, runs: list[tuple[float, int, BlockState]], one: bench.Bench) -> dict[str, Any]:
    """Median and spread of some runs, their peak above what rests on the device, and the last one's output error."""
    seconds = [run[0] for run in runs]
    return {
        "side": side,
        "seconds": round(statistics.median(seconds), 4),
        "least": round(min(seconds), 4),
        "most": round(max(seconds), 4),
        "runs": len(runs),
        "peak_gb": round(max(run[1] for run in runs) / 1e9, 2),
        "error": one.error(runs[-1][2]),
        "zeros": round(zeros(runs[-1][2]), 4),
    }


def zeros(block: BlockState) -> float:
    """Share of a block's weights that are 0."""
    weights = [state.weight for state in block.linears.values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def versions() -> dict[str, str]:
    """Of what is compared."""
    from importlib.metadata import version  # noqa: PLC0415

    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
