"""Products with packed 4-bit weights for few tokens: launches the CUDA kernels of `decode.cu`.

The kernels are compiled by NVRTC, which torch brings, when they are first needed: no compiler has to be installed.
`arrange` puts a weight into the order in which tensor cores take it; the kernel then reads every byte once, hands
the 2:4 positions to `mma.sp` undecoded, and widens integers in registers. Their slow reference is
`sparsekit.inference.packed.multiply_reference`.

One unit is 16 rows x 128 inputs: the codes as 32 lanes hold them, the metadata of `mma.sp.m16n8k32`, the scales.
The layouts are those of the PTX ISA, sections "Matrix Fragments for mma.m16n8k16" and "Matrix Fragments for sparse
mma.m16n8k32". Inputs are renumbered inside 32 of them, so that a lane reads eight consecutive ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit.inference.packed import PackedWeight

AT_ONCE = 32  # tokens of a launch
MAX_TOKENS = 96  # three launches take less time than to dequantize a weight once, then cuBLAS (H100, 7B and 70B)
ROW_TILE, INPUTS = 16, 128  # of a unit
TOKEN_TILE = 8
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
        """Shared memory of a block: units on their way, with more than 8 tokens inputs too; then sums in their place.

        Args:
            token_tiles: Tiles of 8 tokens.
            unit: Bytes of a unit.
        """
        tokens = TOKEN_TILE * token_tiles
        coming = self.row_warps * self.row_tiles * unit + (2 * INPUTS * tokens if token_tiles > 1 else 0)
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
# the linears of Llama 7B and 70B (decode_h200.json): one block for each multiprocessor, with all of its rows, as long
# as their sums fit its registers. With 16 tokens inputs are half as many bytes as weights or more, and a cluster of two
# reads them once for twice the rows.
MANY = 1 << 30
CUTS = {
    8: {
        1: Setting(1, 1, 16, 1, 2),
        2: Setting(2, 1, 16, 1, 2),
        3: Setting(3, 1, 16, 1, 2),
        4: Setting(4, 1, 16, 1, 2),
        5: Setting(5, 1, 12, 1, 2),
        6: Setting(3, 2, 6, 1, 2),
        16: Setting(3, 1, 4, 2, 2),
        MANY: Setting(4, 1, 2, 3, 3),
    },
    16: {
        2: Setting(2, 2, 4, 1, 4, split=2),
        4: Setting(2, 4, 4, 1, 4, split=2),
        5: Setting(2, 5, 3, 1, 2, split=2),
        6: Setting(3, 2, 6, 1, 2),
        16: Setting(3, 4, 3, 1, 2),
        MANY: Setting(2, 4, 1, 2, 4, split=2),
    },
    32: {
        1: Setting(1, 1, 2, 1, 3),
        2: Setting(1, 2, 2, 1, 3),
        3: Setting(1, 3, 2, 1, 3),
        4: Setting(1, 4, 2, 1, 3),
        8: Setting(1, 2, 2, 1, 3),
        MANY: Setting(2, 2, 2, 1, 3),
    },
}


@dataclass(frozen=True, slots=True, eq=False)
class DecodeWeight:
    """A weight in the kernel's order.

    Attributes:
        units: int32 [row tiles, units of 128 inputs, words].
        shape: (out, in) without padding.
        sparse: 2:4, else dense.
        scales: Scales of a row in 128 inputs: 1, 2 or 4.
    """

    units: Tensor
    shape: tuple[int, int]
    sparse: bool
    scales: int


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


def arrange(packed: PackedWeight) -> DecodeWeight:
    """A weight in the kernel's order, on the device where it is; nothing of `packed` is kept."""
    out, columns = packed.shape
    rows, inputs = _padded(out, ROW_TILE), _padded(columns, INPUTS)
    scales = max(1, INPUTS // packed.group_size)
    if packed.positions is None:
        parts = [_dense_codes(_pad(_nibbles(packed.values), rows, inputs, 8))]
    else:
        values = _pad(_nibbles(packed.values), rows, inputs // 2, 8)
        positions = _pad(_nibbles(packed.positions), rows, inputs // 4, 0b0100)
        parts = [_sparse_codes(values), _metadata(positions)]
    parts.append(_scale_words(packed, rows, inputs, scales))
    units = torch.cat(parts, 2).contiguous()
    return DecodeWeight(units, (out, columns), packed.positions is not None, scales)


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
    row_tiles, units, words = weight.units.shape
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
    row_tiles, units = weight.units.shape[:2]
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


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(tensor: Tensor, rows: int, columns: int, value: int) -> Tensor:
    missing = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, missing, value=value) if any(missing) else tensor


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [rows, 2 columns] of bytes [rows, columns], the low nibble first."""
    wide = packed.int()
    return torch.stack((wide & 15, wide >> 4), 2).flatten(1)


def _words(fields: Tensor, bits: int) -> Tensor:
    """int32 words of fields [..., 32 / bits], the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, device=fields.device, dtype=torch.int64)
    total = (fields.long() << shifts).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def _tiles(fields: Tensor, row: int) -> Tensor:
    """[row tiles, units, half, row of the half, ...] of [rows, row fields a unit each]."""
    rows, columns = fields.shape
    return fields.reshape(rows // ROW_TILE, 2, ROW_TILE // 2, columns // row, row).permute(0, 3, 1, 2, 4)


def _sparse_codes(values: Tensor) -> Tensor:
    """Words [row tiles, units, 128] of codes [rows, in / 2]: for a lane the four words of its four times 32 inputs.

    Nibble i and i + 4 of a word are the two codes of a group of four: row g and row g + 8 of the lane's first group,
    then of its second.
    """
    tiles = _tiles(values, INPUTS // 2)  # [R, U, half, g, 64]
    grouped = tiles.reshape(*tiles.shape[:4], 4, 8, 2)  # 32 inputs k, group, which of its two codes
    lane = torch.arange(4, device=values.device)
    first = 4 * (lane & 1) + (lane >> 1)
    picked = torch.stack((grouped[..., first, :], grouped[..., first + 2, :]), -1)  # [R, U, half, g, k, t, code, pair]
    ordered = picked.permute(0, 1, 3, 5, 4, 6, 7, 2)  # [R, U, g, t, k, code, pair, half]
    return _words(ordered.flatten(5), 4).flatten(2)


def _metadata(positions: Tensor) -> Tensor:
    """Words [row tiles, units, 64] of positions [rows, in / 4], 4 bits a group: for a lane one word for 64 inputs.

    Of every four lanes two serve the first 32 inputs and two the second. The first of the two has the tensor core's
    groups 0 to 3 and the other 4 to 7, of row g in the low half and of row g + 8 in the high half.
    """
    tiles = _tiles(positions, INPUTS // 4)  # [R, U, half, g, 32]
    grouped = tiles.reshape(*tiles.shape[:4], 2, 2, 8)  # 64 inputs, 32 inputs f, group
    logical = torch.arange(8, device=positions.device).reshape(2, 4)
    found = grouped[..., 4 * (logical & 1) + (logical >> 1)]  # [R, U, half, g, w, f, h, j]
    ordered = found.permute(0, 1, 3, 5, 6, 4, 2, 7)  # [R, U, g, f, h, w, half, j]
    return _words(ordered.flatten(6), 4).flatten(2)


def _dense_codes(codes: Tensor) -> Tensor:
    """Words [row tiles, units, 256] of codes [rows, in]: two planes of four words a lane."""
    tiles = _tiles(codes, INPUTS)  # [R, U, half, g, 128]
    split = tiles.reshape(*tiles.shape[:4], 2, 2, 4, 2, 2, 2)  # plane, k, t, h, pair of columns, column
    ordered = split.permute(0, 1, 4, 3, 6, 5, 7, 9, 8, 2)  # [R, U, plane, g, t, k, h, column, pair, half]
    return _words(ordered.flatten(7), 4).flatten(2)


def _scale_words(packed: PackedWeight, rows: int, inputs: int, scales: int) -> Tensor:
    """Words [row tiles, units, 8 scales]: float16 of row g low, of row g + 8 high."""
    each = packed.scales.half()
    if packed.group_size > INPUTS:
        each = each.repeat_interleave(packed.group_size // INPUTS, 1)
    padded = torch.nn.functional.pad(each, (0, inputs * scales // INPUTS - each.shape[1], 0, rows - each.shape[0]))
    bits = padded.view(torch.int16).int() & 0xFFFF
    ordered = _tiles(bits, scales).permute(0, 1, 4, 3, 2)  # [R, U, scale, g, half]
    return _words(ordered, 16).flatten(2)


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
