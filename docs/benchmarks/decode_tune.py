"""How the settings of `sparsekit.kernels.decode.CUTS` were chosen: every linear of a shape, many ways to cut it.

    python docs/benchmarks/decode_tune.py --shape 70b --batches 1 16 --out tuned.json

Of the settings that keep every multiprocessor equally busy, with enough bytes on their way and registers for the sums,
a sample is compiled, compared with the present choice, and timed like the linears of decode.py. Ten seconds for each
linear and batch, most of them for compiling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from decode import SHAPES, linears_of
from decode_linears import ROTATE, measure, random_packed

from sparsekit.kernels import decode
from sparsekit.kernels.decode import TOKEN_TILE, Device, Setting, multiply
from sparsekit.kernels.decode_layout import arrange

REGISTERS = 65536
FLIGHT = (14 * 1024, 160 * 1024)  # bytes on their way to a multiprocessor, least and most
BUSY = 0.8  # tiles of rows over those that the busiest multiprocessor has, times multiprocessors
MOST = 130  # settings of a case that are timed


def settings(token_tiles: int, tiles: int, unit: int, device: Device) -> Iterator[tuple[float, Setting]]:
    """Settings worth a try, with the share of time that multiprocessors are busy."""
    rows, inputs = (1, 2, 3, 4, 5, 6, 7, 9, 14), (1, 2, 3, 4, 6, 8, 12, 16)
    tiles_of_warp = (1, 2, 3, 4, 5, 6) if token_tiles == 1 else (1, 2, 3, 4, 6, 8)
    splits, processors = (1, 2, 4) if token_tiles > 1 and device.clusters else (1,), device.processors
    every = itertools.product(tiles_of_warp, rows, inputs, (1, 2, 3, 4), (2, 3, 4), splits)
    for m, wr, wk, blocks, stages, split in every:
        cut = Setting(m, wr, wk, blocks, stages, split)
        count = -(-tiles // (m * wr)) * split
        busy = tiles * split / (processors * -(-count // processors) * m * wr)
        registers = 48 + 4 * m * token_tiles + 16 * token_tiles
        fits = (
            64 <= cut.threads <= 1024 // blocks
            and (wr == 1 or wk < 16)
            and m * token_tiles <= 16
            and cut.shared_bytes(token_tiles, unit) * blocks <= device.shared
            and registers * cut.threads * blocks <= REGISTERS
            and (blocks == 1 or count > processors * (blocks - 1))
        )
        if fits and busy >= BUSY and FLIGHT[0] <= blocks * wr * wk * (stages - 1) * m * unit <= FLIGHT[1]:
            yield busy, cut


def tuned(out: int, columns: int, batch: int, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The present setting and the best ones of one linear."""
    size = random_packed(out, columns, sparse=True, device="cuda").nbytes
    weights = [
        arrange(random_packed(out, columns, sparse=True, device="cuda")) for _ in range(max(2, int(-(-ROTATE // size))))
    ]
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    _, tiles, words = weights[0].units.shape
    token_tiles, unit, device = -(-batch // TOKEN_TILE), 4 * words, decode._device(x.device)
    now = decode.choose(batch, tiles, unit, device)
    found = list(settings(token_tiles, tiles, unit, device))
    random.Random(0).shuffle(found)
    cuts = [now, *(cut for _, cut in sorted(found, key=lambda each: -round(each[0], 1))[:MOST])]

    def built(cut: Setting) -> None:
        torch.cuda.set_device(x.device)
        need = cut.shared_bytes(token_tiles, unit)
        decode._kernel("decode", x.dtype, True, weights[0].scales, token_tiles, cut, x.device, need)

    list(pool.map(built, cuts))
    expected, times = multiply(x, weights[0], now).float(), []
    for cut in (now, *cuts):
        error = (multiply(x, weights[0], cut).float() - expected).norm() / expected.norm()
        assert error < 1e-2, cut
        taken = measure({"": lambda cut=cut: [multiply(x, weight, cut) for weight in weights]}, 5, "cuda")[""]
        times.append((taken["us"] / len(weights), cut))
    del times[0]  # the first that is timed is up to 20 % slower than the second time
    return {"of": len(found), "now": times[0], "best": sorted(times)[:12]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: dict[str, Any] = {"device": torch.cuda.get_device_name(), "shape": given.shape}
    with ThreadPoolExecutor(14) as pool:  # NVRTC lets go of Python while it compiles
        for (name, shape), batch in itertools.product(linears_of(SHAPES[given.shape]).items(), given.batches):
            rows[f"{name}, batch {batch}"] = found = tuned(*shape, batch, pool)
            print(name, batch, "now", found["now"], "best", found["best"][:3], flush=True)
            given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
