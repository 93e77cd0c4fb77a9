"""Measure one-shot compression on one CUDA device, beside the papers' column recursion.

    python docs/benchmarks/oneshot.py --parts check,solve,gram,mask,block,awq,base --out oneshot.json

Run from the repository's root; it needs torch for CUDA with Triton, transformers and pydantic. Parts:

check  the gpu tests of the kernels
solve  factor and sweep of every distinct input of a Llama-2-7B-shaped block, given its Gram matrices
gram   accumulating a block's Gram matrices, ours one for each of its 4 inputs, the recursion's one for each of its
       7 linears; time, and error against float64
mask   2:4 masks of 4096 x 11008, against the loop over groups and, both without launches, against copies
block  the whole block, SparseGPT 2:4 and GPTQ int4 g128, both schedules, and after them, with --sparsegpt DIR and
       --autogptq DIR (copies of IST-DASLab/sparsegpt and AutoGPTQ), the authors' classes, and with --recursion
       the recursion. A run of theirs stops at --limit seconds and tells how far it came.
llmcompressor  the same block by llm-compressor 0.14, which must be installed: see oneshot_llmcompressor.py
awq    the scale search of every group of that block, beside that of llm-awq, restated
base   where the time of a step on --model goes
7b     a whole model of Llama-2-7B's shape from disk to packed integers on disk, in --work; --blocks, --samples and
       --length make it smaller, --shape takes another of load.py. Disk: 13 GB, 17 GB, 4 GB.

Parts block, llmcompressor, awq and 7b also run on a CPU, as `--parts block,awq,7b --small`. The file is written
after every part, and after every row of block and llmcompressor.

Both sides run in one process on the same random weights and inputs, after a warm-up; figures are
medians of CUDA-event times, with the spread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from device_time import graphed, profiled, timed
from oneshot_awq import awq
from oneshot_base import base
from oneshot_block import block
from oneshot_llmcompressor import JOBS, llmcompressor
from oneshot_model import model
from torch import Tensor

from sparsekit.blockwise.holding import HOLDINGS
from sparsekit.kernels.masks import nm_mask
from sparsekit.pattern import Pattern
from sparsekit.quant import Rounding
from sparsekit.stats import Gram
from sparsekit.sweep.obs import BLOCK, sweep
from sparsekit.sweep.recursion import Recursion

CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATTERN = Pattern(2, 4)
SWEEPS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": PATTERN},
    "int4": {"rounding": Rounding(4, 128)},
    "int4 static": {"rounding": Rounding(4, 128, static=True)},
    "int4 mse": {"rounding": Rounding(4, 128, mse=True)},
    "joint": {"pattern": PATTERN, "rounding": Rounding(4, 128)},
    "half": {"pattern": Pattern.unstructured(0.5)},
}
GROUPS = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated bfloat16 inputs with a few large channels, as a language model's."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    base = torch.randn(count, 256, generator=generator, device=CUDA, dtype=torch.bfloat16)
    mixing = torch.randn(256, columns, generator=generator, device=CUDA, dtype=torch.bfloat16) / 16
    x = base @ mixing + 0.5 * torch.randn(count, columns, generator=generator, device=CUDA, dtype=torch.bfloat16)
    return x * torch.rand(columns, generator=generator, device=CUDA).mul(3).exp().bfloat16() / 4


def check() -> dict[str, Any]:
    """The kernels' tests."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/gpu/test_oneshot_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tail = done.stdout.strip().splitlines()[-40:]
    print("\n".join(tail if done.returncode else tail[-1:]))
    return {"exit": done.returncode, "seconds": time.perf_counter() - start, "last": tail[-1:]}


def solve() -> dict[str, Any]:
    """Factor and sweep of each distinct input."""
    found: dict[str, Any] = {}
    for name, shape in GROUPS.items():
        found[name] = solved(*shape, beside=name != "gate_up")
        print(name, json.dumps({key: value for key, value in found[name].items() if key != "kernels"}), flush=True)
        for line in found[name]["kernels"]:
            print("   ", line)
        torch.cuda.empty_cache()
    return found


def solved(rows: int, columns: int, *, beside: bool) -> dict[str, Any]:
    """Times of one shape; with the recursion beside it if asked for."""
    gram = Gram.empty(columns, CUDA)
    gram.update(tokens(16384, columns))
    generator = torch.Generator(CUDA).manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator, device=CUDA) / columns**0.5
    matrix = gram.matrix
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    row: dict[str, Any] = {
        "cholesky_float32": timed(lambda: torch.linalg.cholesky_ex(matrix), 3, 1),
        "cholesky_float64": timed(lambda: torch.linalg.cholesky_ex(matrix.double()), 3, 1),
        "our_factor": timed(lambda: rooted(gram), 3, 1),
    }
    factor = gram.root(0.01)[0]
    row |= {
        name: timed(lambda arguments=arguments: sweep(weight, factor, **arguments), 3, 1)
        for name, arguments in SWEEPS.items()
    }
    if beside:
        reference = Recursion(weight)
        reference.gram = 2 * gram.matrix
        row["recursion_2to4"] = timed(lambda: reference.pruned(2, 4), 1, 0)
        theirs, ours = reference.pruned(2, 4), sweep(weight, factor, **SWEEPS["2:4"])
        row["masks_equal"] = float(((theirs != 0) == ours.keep).double().mean())
        row["error_ratio_2to4"] = error(weight, ours.weight, gram) / error(weight, theirs, gram)
        row["recursion_int4"] = timed(lambda: reference.quantized(4), 1, 0)
        theirs, four = reference.quantized(4), sweep(weight, factor, **SWEEPS["int4"])
        row["weights_equal"] = float(torch.isclose(theirs, four.weight, rtol=1e-4, atol=1e-7).double().mean())
        row["error_ratio_int4"] = error(weight, four.weight, gram) / error(weight, theirs, gram)
    row["kernels"] = profiled(lambda: sweep(weight, factor, **SWEEPS["2:4"]))
    return row


def rooted(gram: Gram) -> object:
    """The factor as a method asks for it, with what a sweep derives from it."""
    gram._roots.clear()
    root, _ = gram.root(0.01)
    columns = len(gram.sum)
    return root.inverses([(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)])


def error(weight: Tensor, result: Tensor, gram: Gram) -> float:
    """tr(D H Dᵀ)."""
    change = weight - result
    return float(((change @ gram.matrix) * change).sum(dtype=torch.float64))


def gram() -> dict[str, Any]:
    """Our accumulation and the recursion's, of 64 Ki tokens in bfloat16 on their way through a block."""
    count = 65536
    inputs = [tokens(count, columns, seed) for seed, (_, columns) in enumerate(GROUPS.values())]
    linears = [0, 0, 0, 1, 2, 2, 3]  # q, k, v, o, gate, up, down: which input each has
    ours = [Gram.empty(x.shape[1], CUDA) for x in inputs]
    theirs = [Recursion(torch.empty(1, inputs[which].shape[1], device=CUDA)) for which in linears]

    def one() -> None:
        for own, x in zip(ours, inputs, strict=True):
            for part in x.split(16384):
                own.update(part)

    def other() -> None:
        for own, which in zip(theirs, linears, strict=True):
            for part in inputs[which].split(2048):
                own.add(part)

    row: dict[str, Any] = {"ours": timed(one, 3, 1), "recursion": timed(other, 1, 1)}
    x = inputs[-1]
    few = slice(0, 512)  # columns whose sums are checked in float64
    exact = torch.zeros(512, x.shape[1], dtype=torch.float64, device=CUDA)
    for part in x.split(8192):
        exact += part[:, few].t().double() @ part.double()
    ours[-1], theirs[-1] = Gram.empty(x.shape[1], CUDA), Recursion(torch.empty(1, x.shape[1], device=CUDA))
    one(), other()
    scale = exact.norm()
    row["our_error"] = float((ours[-1].sum[few].double() - exact).norm() / scale)
    row["recursion_error"] = float((theirs[-1].gram[few].double() * theirs[-1].samples / 2 - exact).norm() / scale)
    row["tflops"] = round(sum(2 * count * x.shape[1] ** 2 for x in inputs) / row["ours"]["ms"] / 1e9, 1)
    row["ratio"] = round(row["recursion"]["ms"] / row["ours"]["ms"], 2)
    row["kernels"] = profiled(one)
    print(json.dumps(row, indent=1))
    return row


def mask() -> dict[str, Any]:
    """The mask kernel."""
    weights = [torch.randn(4096, 11008, device=CUDA) for _ in range(4)]
    norm = torch.rand(11008, device=CUDA)
    target = torch.empty_like(weights[0])

    def loop(weight: Tensor) -> Tensor:
        """Group by group along the row, as Wanda's code does."""
        score = weight.abs() * norm
        dropped = torch.zeros_like(score, dtype=torch.bool)
        for start in range(0, score.shape[1], 4):
            cheapest = torch.topk(score[:, start : start + 4], 2, dim=1, largest=False)[1]
            dropped.scatter_(1, start + cheapest, True)
        return ~dropped

    def each(call: Callable[[Tensor], object]) -> Callable[[], None]:
        return lambda: [call(weight) for weight in weights] and None

    numel = 4 * weights[0].numel()
    row: dict[str, Any] = {
        "kernel": timed(graphed(each(lambda weight: nm_mask(weight, norm, PATTERN, absolute=True))), 20, 5),
        "keep_weights": timed(each(lambda weight: PATTERN.keep_weights(weight, norm)), 20, 5),
        "torch": timed(each(lambda weight: PATTERN.keep_reference(weight.abs() * norm)), 5, 2),
        "copy": timed(graphed(each(lambda weight: target.copy_(weight))), 20, 5),
        "loop": timed(each(loop), 1, 0),
    }
    row["copy_gb_s"] = round(8 * numel / row["copy"]["ms"] / 1e6, 1)
    row["kernel_gb_s"] = round(5 * numel / row["kernel"]["ms"] / 1e6, 1)
    row["share_of_copy"] = round(row["kernel_gb_s"] / row["copy_gb_s"], 3)
    row["ratio"] = round(row["loop"]["ms"] / row["kernel"]["ms"], 1)
    print(json.dumps(row, indent=1))
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,solve,gram,mask")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("shared/models/base"))
    parser.add_argument("--text", type=Path, default=Path("shared/text/calibration.txt"))
    parser.add_argument("--sparsegpt", type=Path, help="a copy of IST-DASLab/sparsegpt")
    parser.add_argument("--autogptq", type=Path, help="a copy of AutoGPTQ")
    parser.add_argument("--small", action="store_true", help="a small block in part block, a small model in 7b")
    parser.add_argument("--theirs", type=int, default=1, help="runs of the other sides of a block, 10 s each")
    parser.add_argument("--recursion", action="store_true", help="the recursion too in part block, 2 x 12 s")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of such a run at most in part block")
    parser.add_argument("--jobs", default=",".join(JOBS), help="of part llmcompressor")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of part llmcompressor")
    parser.add_argument("--work", type=Path, default=Path("/tmp/oneshot-7b"), help="where part 7b writes")
    parser.add_argument("--shape", default="7b", help="of the model of part 7b")
    parser.add_argument("--blocks", type=int, help="of the model of part 7b; all of the shape when absent")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of part 7b")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--memory", choices=tuple(HOLDINGS), default="auto", help="mode of part 7b")
    parser.add_argument("--schedule", choices=("group", "block"), default="group")
    given = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"environment": {"torch": torch.__version__, "device": card}}

    def told(part: str, result: dict[str, Any]) -> None:
        given.out.write_text(json.dumps(found | {part: result}, indent=1) + "\n")

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "check": check,
        "solve": solve,
        "gram": gram,
        "mask": mask,
        "block": lambda: block(
            given.sparsegpt,
            given.autogptq,
            given.small,
            given.theirs,
            given.recursion,
            given.limit,
            partial(told, "block"),
        ),
        "llmcompressor": lambda: llmcompressor(
            given.small, given.windows, given.theirs, given.jobs.split(","), partial(told, "llmcompressor")
        ),
        "awq": lambda: awq(tokens, given.small),
        "base": lambda: base(given.model, given.text),
        "7b": lambda: model(
            given.work,
            *(("tiny", None, 4, 64) if given.small else (given.shape, given.blocks, given.samples, given.length)),
            given.schedule,
            given.memory,
        ),
    }
    for name in given.parts.split(","):
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        with torch.inference_mode():
            found[name] = parts[name]()
        print(f"== {name}: {time.perf_counter() - start:.1f} s", flush=True)
        told(name, found[name])


if __name__ == "__main__":
    main()
