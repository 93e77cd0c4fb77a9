"""Products with packed 4-bit weights for few tokens: launches the CUDA kernels of `decode.cu`.

The kernels are compiled by NVRTC, which torch brings, when they are first needed: no compiler has to be installed.
`arrange` puts a weight into the order in which tensor cores take it (decode_layout.py); the kernel then reads every
byte once, hands the 2:4 positions to `mma.sp` undecoded, and widens integers in registers. Their slow reference is
`sparsekit.inference.packed.multiply_reference`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit.inference.packed import PackedWeight
from sparsekit.kernels.decode_layout import INPUTS, ROW_TILE, DecodeWeight, arrange

__all__ = ["MAX_TOKENS", "arrange", "expand", "multiply", "why_not"]  # what `inference.linear` asks of a kernel

AT_ONCE = 32  # tokens of a launch
MAX_TOKENS = 96  # three launches take less time than to dequantize a weight once, then cuBLAS (H100, 7B and 70B)
TOKEN_TILE = 8
PADDING = 8  # values after one token's inputs in shared memory
PLAIN_SHARED = 48 * 1024  # bytes of shared memory that need no request
DTYPES = (torch.float16, torch.bfloat16)


class Setting(NamedTuple):
    """How a product is cut into warps.

    Attributes:
        row_tiles: Tiles of 16 rows that a warp computes.
        row_warps: Warps of a block along the rows.
        input_warps: Warps of a block along the inputs.
        blocks: Blocks that shall fit a multiprocessor at once, which limits their registers.
        stages: Units of a warp that are in shared memory or on their way there.
        split: Blocks that share rows and take part of the inputs each, so that inputs go to fewer places: a cluster,
            which needs compute capability 9.0.
    """

    row_tiles: int
    row_warps: int
    input_warps: int
    blocks: int
    stages: int
    split: int = 1

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return ROW_TILE * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.input_warps

    def shared_bytes(self, token_tiles: int, unit: int) -> int:
        """Shared memory of a block: units and inputs on their way, then sums in their place.

        Args:
            token_tiles: Tiles of 8 tokens.
            unit: Bytes of a unit.
        """
        tokens = TOKEN_TILE * token_tiles
        coming = self.row_warps * self.row_tiles * unit + 2 * (INPUTS + PADDING) * tokens
        return self.input_warps * max(self.stages * coming, 4 * tokens * self.rows)


class Device(NamedTuple):
    """What a cut depends on.

    Attributes:
        processors: Multiprocessors.
        shared: Bytes of shared memory that a block may have.
        clusters: Blocks of a cluster can read one another's shared memory.
    """

    processors: int
    shared: int
    clusters: bool


# For so many tokens at most, and so many tiles of rows for each multiprocessor at most, what was best on an H200 for
# linears of Llama 7B and 70B and two smaller ones (decode_tune.py): about one block for each multiprocessor with all of
# its rows, 8 to 16 warps, and two or three units of each on their way. With more than 8 tokens a cluster of two reads
# the inputs once for twice the rows.
MANY = 1 << 30
CUTS = {
    8: {
        1: Setting(1, 1, 16, 1, 3),
        2: Setting(2, 1, 12, 1, 3),
        3: Setting(3, 1, 8, 1, 3),
        4: Setting(2, 2, 8, 1, 3),
        5: Setting(3, 2, 6, 1, 3),
        6: Setting(2, 3, 4, 1, 3),
        16: Setting(3, 4, 3, 1, 4),
        MANY: Setting(4, 4, 1, 2, 4),
    },
    16: {
        1: Setting(2, 1, 4, 1, 4, split=2),
        2: Setting(2, 2, 4, 1, 4, split=2),
        3: Setting(1, 6, 2, 1, 3, split=2),
        4: Setting(2, 4, 4, 1, 4, split=2),
        5: Setting(3, 4, 3, 1, 3, split=2),
        6: Setting(3, 4, 4, 1, 4, split=2),
        16: Setting(3, 4, 3, 1, 2),
        MANY: Setting(4, 4, 2, 2, 2),
    },
    32: {
        1: Setting(1, 2, 4, 1, 4, split=2),
        2: Setting(2, 2, 4, 1, 4, split=2),
        3: Setting(3, 2, 4, 1, 3, split=2),
        4: Setting(4, 2, 3, 1, 2, split=2),
        5: Setting(3, 4, 1, 2, 3, split=4),
        6: Setting(3, 2, 4, 1, 3),
        16: Setting(3, 4, 2, 1, 2),
        MANY: Setting(2, 7, 1, 2, 4, split=2),
    },
}


def why_not(packed: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot take a weight; None if they can."""
    if device.type != "cuda":
        return "the decode kernel needs CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it takes compute capability 8.0, of Ampere and newer"
    if dtype not in DTYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, and the kernel takes float16 and bfloat16"
    if packed.shape[1] % 8:
        return f"{packed.shape[1]} inputs are not a multiple of 8"
    if packed.group_size not in (32, 64) and packed.group_size % INPUTS:
        return f"groups of {packed.group_size}; the kernel takes 32, 64 and multiples of {INPUTS}"
    if not torch.equal(packed.scales.half().float(), packed.scales.float()):
        return f"scales of {str(packed.scales.dtype).removeprefix('torch.')} that float16 does not hold"
    return None


def multiply(x: Tensor, weight: DecodeWeight, setting: Setting | None = None) -> Tensor:
    """The product x Wᵀ of a few tokens.

    Args:
        x: float16 or bfloat16 [tokens, in] on the weight's device, at most `MAX_TOKENS` tokens.
        weight: From `arrange`.
        setting: How to cut the work; chosen by the shape if absent. Results differ by rounding between settings,
            and not at all between runs.
    Returns:
        [tokens, out], the dtype of x; sums are float32.
    """
    if len(x) > AT_ONCE:
        starts = range(0, len(x), AT_ONCE)
        return torch.cat([multiply(x[start : start + AT_ONCE], weight, setting) for start in starts])
    tokens, (out, columns) = x.shape[0], weight.shape
    units, row_tiles, words = weight.units.shape
    cut = setting or choose(tokens, row_tiles, 4 * words, _device(x.device))
    x, y = x.contiguous(), x.new_empty(tokens, out)
    token_tiles = -(-tokens // TOKEN_TILE)
    shared = cut.shared_bytes(token_tiles, 4 * words)
    kernel = _kernel("decode", x.dtype, weight.sparse, weight.scales, token_tiles, cut, x.device, shared)
    grid = (-(-row_tiles * ROW_TILE // cut.rows) * cut.split, 1, 1)
    kernel(grid, (cut.threads, 1, 1), [weight.units, x, y, out, units, tokens, columns], shared)
    return y


def expand(weight: DecodeWeight, dtype: torch.dtype) -> Tensor:
    """The weight in full, [out, in], for products with many tokens.

    Args:
        weight: From `arrange`.
        dtype: float16 or bfloat16.
    """
    out, columns = weight.shape
    units, row_tiles = weight.units.shape[:2]
    full = torch.empty(out, columns, dtype=dtype, device=weight.units.device)
    cut = Setting(1, 1, 8, 1, 2)
    kernel = _kernel("expand", dtype, weight.sparse, weight.scales, 1, cut, full.device, 0)
    grid = (row_tiles, -(-units // cut.input_warps), 1)
    kernel(grid, (cut.threads, 1, 1), [weight.units, full, out, units, columns])
    return full


def choose(tokens: int, row_tiles: int, unit: int, device: Device) -> Setting:
    """How to cut a product.

    Args:
        tokens: At most `AT_ONCE`.
        row_tiles: Tiles of 16 rows.
        unit: Bytes of a unit.
        device: Where.
    """
    share = -(-row_tiles // device.processors)
    cuts = next(cuts for most, cuts in CUTS.items() if tokens <= most)
    cut = next((cut for most, cut in cuts.items() if share <= most), cuts[MANY])
    while cut.shared_bytes(-(-tokens // TOKEN_TILE), unit) > device.shared and cut.input_warps > 1:
        cut = cut._replace(input_warps=cut.input_warps - 1)
    return cut if device.clusters else cut._replace(split=1)


@lru_cache
def _device(device: torch.device) -> Device:
    about = torch.cuda.get_device_properties(device)
    shared: int = about.shared_memory_per_block_optin  # type: ignore[attr-defined, unused-ignore]
    return Device(about.multi_processor_count, shared, about.major >= 9)


@lru_cache
def _kernel(
    name: str,
    dtype: torch.dtype,
    sparse: bool,
    scales: int,
    token_tiles: int,
    cut: Setting,
    device: torch.device,
    shared: int,
) -> Any:
    """Handle of a compiled kernel that may ask for so much shared memory; a module belongs to one device."""
    macros = {
        "SPARSE": int(sparse),
        "BF16": int(dtype == torch.bfloat16),
        "MT": cut.row_tiles,
        "NT": token_tiles,
        "WR": cut.row_warps,
        "WK": cut.input_warps,
        "STAGES": cut.stages,
        "SPLIT": cut.split,
        "GROUPS": scales,
        "BLOCKS": cut.blocks,
    }
    source = "".join(f"#define {macro} {value}\n" for macro, value in macros.items()) + _source()
    with torch.cuda.device(device):
        kernel = torch.cuda._compile_kernel(source, name)
        if shared >= PLAIN_SHARED:
            kernel.set_shared_memory_config(shared)
    return kernel


@lru_cache(maxsize=1)
def _source() -> str:
    return Path(__file__).with_name("decode.cu").read_text()
