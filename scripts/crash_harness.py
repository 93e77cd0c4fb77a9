"""Kill a chained AST -> GPTQ run at random moments, resume each time, and compare the weights bit for bit.

    python scripts/crash_harness.py --moments 50 --out docs/benchmarks/crash.json
    python scripts/crash_harness.py --model builtin:tiny --moments 10

Exits with 1 if a resumed run differs. The sources must not change meanwhile: they are part of every
step's fingerprint.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from crash import harness


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="random, or what a recipe calls a model")
    parser.add_argument("--moments", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON; results of other models in it are kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparsekit-crash-") as work:
        result = harness(Path(work), given.model, given.moments, given.seed, lambda line: print(line, flush=True))
    about = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    result = {"seed": given.seed, **about, **result}
    if given.out:
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps({**known, given.model: result}, indent=1) + "\n")
    print(f"{result['identical']} of {result['moments']} resumed runs are bit-identical; {result['phases']}")
    return 0 if result["identical"] == given.moments else 1


if __name__ == "__main__":
    sys.exit(main())
