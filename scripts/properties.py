"""Try many random chains on random tiny models (tests/test_properties.py) and record what was tried.

Usage: python scripts/properties.py --examples 1000 --out docs/benchmarks/properties.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers as hf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_properties import QUIET, TRIED, architectures, chains, once


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, done = time.monotonic(), itertools.count(1)

    @settings(max_examples=arguments.examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=QUIET, phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(architectures(), chains(), st.integers(0, 2**16))
    def many(config: hf.PreTrainedConfig, steps: list[tuple[str, dict[str, Any]]], seed: int) -> None:
        once(config, steps, seed)
        if (number := next(done)) % 50 == 0:
            print(number, f"{time.monotonic() - start:.0f} s", flush=True)

    failure = ""
    try:
        many()
    except AssertionError as error:
        failure = str(error) or repr(error)
    record = {
        "examples": next(done) - 1, "failure": failure, "seconds": round(time.monotonic() - start, 1),
        "tried": dict(sorted(TRIED.items())), "torch": torch.__version__, "transformers": hf.__version__,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(record)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
