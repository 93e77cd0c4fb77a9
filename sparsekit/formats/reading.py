"""Checks that readers of the formats share: every surprise in a file becomes a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Setting, consecutive
from sparsekit.quant import QuantizedWeight

SCALES = (torch.float16, torch.bfloat16, torch.float32)


def tensor(found: Mapping[str, Tensor], suffix: str, dtypes: Sequence[torch.dtype] = (torch.int32,)) -> Tensor:
    """A tensor of a linear, two-dimensional.

    Raises:
        CheckpointError: It is missing or of another kind.
    """
    if suffix not in found:
        raise CheckpointError(f"lacks the tensor {suffix}; there is {', '.join(found)}")
    value = found[suffix]
    if value.dtype not in dtypes or value.dim() != 2:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise CheckpointError(f"{suffix} is {kind}, expected a matrix of {wanted}")
    return value


def check_shape(suffix: str, value: Tensor, expected: Sequence[int], setting: Setting) -> None:
    """Hold a shape against what the configuration says.

    Raises:
        CheckpointError: It does not fit.
    """
    if list(value.shape) != list(expected):
        raise CheckpointError(
            f"{suffix} has shape {list(value.shape)}, {setting.bits} bits and group size {setting.group_size} "
            f"make {list(expected)}: the file and its configuration do not fit"
        )


def groups_of(columns: int, setting: Setting, found: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """The group of each input, int32 [in], and the number of groups.

    Args:
        columns: Inputs of the linear.
        setting: Of the checkpoint.
        found: The stored index, if there is one.
        like: Any tensor on the device wanted.
    Raises:
        CheckpointError: The group size does not divide the inputs, or the index points outside.
    """
    size = columns if setting.group_size == -1 else setting.group_size
    if size <= 0 or columns % size:
        raise CheckpointError(f"group size {setting.group_size} does not divide its {columns} inputs")
    count = columns // size
    if found is None:
        return consecutive(torch.empty(columns, device=like.device), size), count
    if found.shape != (columns,) or found.is_floating_point():
        raise CheckpointError(f"the group index is {found.dtype} {list(found.shape)}, expected {columns} integers")
    if bool((found < 0).any()) or bool((found >= count).any()):
        raise CheckpointError(f"the group index leaves 0..{count - 1}")
    return found.to(torch.int32), count


def assembled(codes: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor, setting: Setting) -> QuantizedWeight:
    """A quantized weight out of integers, checked as far as numbers can tell.

    Raises:
        CheckpointError: A scale is not finite, or a symmetric grid has another zero-point.
    """
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError("its scales are not all finite")
    middle = 2 ** (setting.bits - 1)
    if setting.symmetric and bool((zero != middle).any()):
        raise CheckpointError(
            f"the configuration says symmetric, which means zero-points of {middle}; here some are "
            f"{int(zero[zero != middle][0])}. A file whose layout version is labelled wrongly looks like this"
        )
    return QuantizedWeight(
        codes=codes.to(torch.uint8).contiguous(),
        scale=scale.contiguous(),
        zero=zero.to(torch.uint8).contiguous(),
        group_of=group_of,
        bits=setting.bits,
        group_size=codes.shape[1] if setting.group_size == -1 else setting.group_size,
        symmetric=setting.symmetric,
    )


def one_of(config: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """A value of a configuration.

    Raises:
        CheckpointError: It is none of the values known here.
    """
    value = config.get(key, default)
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        known = ", ".join(map(repr, allowed))
        raise CheckpointError(f"quantization_config: {key} is {value!r}; this version reads {known}")
    return value


def whole(config: Mapping[str, Any], key: str, default: Any = None) -> int:
    """An integer of a configuration.

    Raises:
        CheckpointError: It is missing or no integer.
    """
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"quantization_config: {key} is {value!r}, expected an integer")
    return value


def versioned(config: Mapping[str, Any], version: int, bits: Sequence[int]) -> Setting:
    """A setting that a header tells by the version of its format, bits and the grid.

    Args:
        config: The header.
        version: That is read.
        bits: Of a code, that the format has.
    Raises:
        CheckpointError: Something else than the format has.
    """
    one_of(config, "version", (version,))
    code = one_of(config, "bits", bits)
    symmetric, act_order = (one_of(config, key, (True, False)) for key in ("symmetric", "act_order"))
    return Setting(code, whole(config, "group_size"), symmetric, act_order, f"v{version}")
