"""What sparsekit-coded takes of exports in other formats, beside what their codes hold, and its speed on one core.

    python docs/benchmarks/coded.py "SparseGPT, GPTQ int4"=runs/q4/export/sparsekit-24-compact ... --out coded.json

The exports of coded.json: models/base, `sparsegpt` 2:4 and `gptq` or `gptq` alone, groups of 128, calibrated on 16
windows of 1024 tokens of calibration.txt. Entropies are of each linear by itself, in bits a weight. The speed is that
of the codes of one [11008, 4096] linear of normal weights, 2:4 and 4 bits, in CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.formats import streams
from sparsekit.formats.coded import Coded
from sparsekit.interchange.imports import load_quantized
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid
from sparsekit.state import LinearState


def entropy(*parts: Tensor) -> float:
    """Bits of all symbols together, each made of aligned parts and as long as their joint frequencies say."""
    joint = sum(part.flatten().long() << 8 * place for place, part in enumerate(parts))
    assert isinstance(joint, Tensor)  # there are parts
    share = joint.unique(return_counts=True)[1].double() / joint.numel()
    return float(-(share * share.log2()).sum()) * joint.numel()


def entropies(state: LinearState, packed: dict[str, Tensor]) -> dict[str, float]:
    """Bits of a linear's streams: alone, of the two codes of a group together, and given where they lie."""
    values = torch.from_numpy(streams.read(packed["values"].numpy()[1:])[0])
    found = {"codes": entropy(values), "pairs": entropy(values[:, 0::2], values[:, 1::2])}
    if "patterns" in packed:
        patterns = torch.from_numpy(streams.read(packed["patterns"].numpy())[0])
        known = entropy(values[:, 0::2], values[:, 1::2], patterns) - entropy(patterns)
        left, columns = patterns[:, :-1], patterns.shape[1]
        beside = (entropy(patterns[:, 1:], left) - entropy(left)) * columns / (columns - 1)
        found |= {"patterns": entropy(patterns), "codes, patterns known": known, "patterns, left one known": beside}
    return found


def measure(name: str, directory: Path) -> dict[str, Any]:
    """One export."""
    files, coded = load_quantized(directory), Coded()
    held: Counter[str] = Counter()  # bytes of each tensor
    before: Counter[str] = Counter()
    told: Counter[str] = Counter()
    weights, encoding, decoding = 0, 0.0, 0.0
    for linear, state in files.items():
        assert state.quantized is not None  # it is a mapping of quantized linears
        start = time.process_time()
        packed = coded.pack(state.quantized, "", state.mask)
        encoded = time.process_time()
        coded.unpack(packed, coded.setting(coded.config(files.setting, [])))
        encoding, decoding = encoding + encoded - start, decoding + time.process_time() - encoded
        weights += state.weight.numel()
        held.update({part: tensor.nbytes for part, tensor in packed.items()})
        before.update({part: tensor.nbytes for part, tensor in files.parts(linear).items()})
        for part, bits in entropies(state, packed).items():
            told[part] += bits  # type: ignore[assignment]  # a counter of floats
    row = {
        "name": name,
        "format": directory.name,
        "weights": weights,
        "before": {part: 8 * held / weights for part, held in before.items()},
        "coded": {part: 8 * held / weights for part, held in held.items()},
        "entropy": {part: bits / weights for part, bits in told.items()},
        "encoding_s": encoding,
        "decoding_s": decoding,
    }
    print(row, flush=True)
    return row


def speed(rows: int = 11008, columns: int = 4096) -> dict[str, float]:
    """Symbols a second of CPU time."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    mask = Pattern(2, 4).keep(weight.abs())
    codes = Grid.fit(weight.reshape(rows, -1, 128), 4).encode(weight.reshape(rows, -1, 128)).reshape(rows, columns)
    kept = codes[mask].reshape(rows, -1).to(torch.uint8).numpy()
    start = time.process_time()
    stream = streams.written(kept)
    encoded = time.process_time()
    found, _ = streams.read(stream)
    decoded = time.process_time()
    assert np.array_equal(found, kept)
    return {
        "symbols": kept.size,
        "bits_a_symbol": 8 * len(stream) / kept.size,
        "entropy": entropy(torch.from_numpy(kept)) / kept.size,
        "encoded_a_second": kept.size / (encoded - start),
        "decoded_a_second": kept.size / (decoded - encoded),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = [given.rpartition("=") for given in options.exports]
    rows = [measure(name, Path(directory)) for name, _, directory in named]
    options.out.write_text(json.dumps({"rows": rows, "speed": speed()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
