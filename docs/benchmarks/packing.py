"""Time of packing a 7B model's integers in every format.

    PYTHONPATH=. python docs/benchmarks/packing.py --out packing.json [--device cuda] [--blocks 32] [--parts gptq ...]

The linears of Llama-2-7B, 32 blocks: 4 of [4096, 4096], 2 of [11008, 4096], 1 of [4096, 11008], with
groups of 128 and 2:4. "packing" is the work on the device; "with transfers" also brings the codes
there from ordinary host memory and the packed tensors back, as an export does. One block's integers
are made once and packed as often as there are blocks. The target is 10 s for a 7B.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from sparsekit.formats import FORMATS
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, QuantizedWeight

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
GROUP = 128


def integers(shape: tuple[int, int], device: str) -> tuple[QuantizedWeight, torch.Tensor]:
    """A 2:4 linear's integers and mask, on the host."""
    weight = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    mask = Pattern(2, 4).keep(weight.abs())
    grouped = (weight * mask).reshape(shape[0], -1, GROUP)
    grid = Grid.fit(grouped, 4)
    codes = grid.encode(grouped).reshape(shape)
    return QuantizedWeight.of(codes, grid, group_size=GROUP, symmetric=True).to("cpu"), mask.cpu()


def timed(work, device: str) -> float:
    """Seconds of some work, the device waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, block: list, blocks: int, device: str) -> dict:
    """One format."""
    storage = FORMATS[name].storage
    layout = storage.layouts(True)[-1]
    resident = [(weight.to(device), mask.to(device)) for weight, mask in block]

    def packing() -> None:
        for _ in range(blocks):
            for weight, mask in resident:
                storage.pack(weight, layout, mask)

    def exporting() -> None:
        for _ in range(blocks):
            for weight, mask in block:
                for tensor in storage.pack(weight.to(device), layout, mask.to(device)).values():
                    tensor.cpu()

    storage.pack(*resident[0][:1], layout, resident[0][1])  # warm
    stored = sum(tensor.nbytes for weight, mask in block for tensor in storage.pack(weight, layout, mask).values())
    weights = sum(weight.codes.numel() for weight, _ in block)
    row = {
        "format": name,
        "weights": weights * blocks,
        "bits_per_weight": 8 * stored / weights,
        "packing_s": timed(packing, device),
        "with_transfers_s": timed(exporting, device),
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Measure and write."""
    names = [name for name, form in FORMATS.items() if form.storage is not None]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--parts", nargs="*", choices=names, default=names)
    options = parser.parse_args()
    block = [integers(shape, options.device) for shape in SHAPES]
    rows = [measure(name, block, options.blocks, options.device) for name in options.parts]
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    about = {"device": card, "torch": torch.__version__, "blocks": options.blocks, "rows": rows}
    options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
