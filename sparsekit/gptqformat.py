"""The configuration of a GPTQ checkpoint, and what it cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from sparsekit import __version__
from sparsekit.checkpoint import BlockState
from sparsekit.engines import GptqSetting
from sparsekit.errors import CheckpointError
from sparsekit.packing import CheckpointFormat, obstacle
from sparsekit.quant import QuantizedWeight
from sparsekit.state import LinearState

FormatChoice = Literal["auto", "gptq", "gptq_v2"]

_NAMED = 4  # layers an error message names


def gptq_setting(blocks: Iterable[tuple[BlockState, set[str]]], wanted: FormatChoice = "auto") -> GptqSetting:
    """The one setting all quantized linears share.

    Args:
        blocks: Each block with the names of its Hugging Face tensors.
        wanted: Version of the layout; "auto" is 1 for symmetric grids and 2 for asymmetric ones.
    Raises:
        CheckpointError: Linears are quantized differently, one has no GPTQ layout, or none is quantized.
    """
    seen: dict[tuple[int, bool], list[str]] = {}
    sizes: dict[int, list[str]] = {}
    problems: dict[str, str] = {}
    whole_rows, act_order, complete = True, False, True
    for block, names in blocks:
        for name, weight in _quantized(block.linears.values()):
            if f"{name}.weight" not in names:
                problems[name] = "the model stores it inside a fused tensor, for which GPTQ has no layout"
            seen.setdefault((weight.bits, weight.symmetric), []).append(name)
            sizes.setdefault(weight.group_size, []).append(name)
            whole_rows &= weight.scale.shape[1] == 1
            act_order |= _permuted(weight)
            version: CheckpointFormat = ("gptq" if weight.symmetric else "gptq_v2") if wanted == "auto" else wanted
            if reason := obstacle(weight, version):
                problems.setdefault(name, reason)
        complete &= all(state.quantized is not None for state in block.linears.values())
    _check(seen, {} if whole_rows else sizes, problems)
    (bits, symmetric), group_size = next(iter(seen)), -1 if whole_rows else next(iter(sizes))
    version = ("gptq" if symmetric else "gptq_v2") if wanted == "auto" else wanted
    return GptqSetting(bits, group_size, symmetric, act_order, version, complete)


def _quantized(states: Iterable[LinearState]) -> Iterator[tuple[str, QuantizedWeight]]:
    return ((state.name, state.quantized) for state in states if state.quantized is not None)


def _permuted(weight: QuantizedWeight) -> bool:
    """Whether the groups are not consecutive inputs (act-order without static groups)."""
    columns = torch.arange(weight.group_of.numel(), device=weight.group_of.device)
    return not torch.equal(weight.group_of.long(), columns // weight.group_size)


def _check(
    seen: dict[tuple[int, bool], list[str]], sizes: dict[int, list[str]], problems: dict[str, str]
) -> None:
    if not seen:
        raise CheckpointError("no linear is quantized; a GPTQ export needs a quantizer among the steps")
    if problems:
        reasons = {reason: [name for name, why in problems.items() if why == reason] for reason in problems.values()}
        told = "; ".join(f"{_listed(names)}: {reason}" for reason, names in reasons.items())
        raise CheckpointError(f"no GPTQ export: {told}")
    if len(seen) > 1:
        grids = [(bits, "symmetric" if same else "asymmetric", _listed(names)) for (bits, same), names in seen.items()]
        kinds = ", ".join(f"{bits} bits {grid} ({names})" for bits, grid, names in grids)
        raise CheckpointError(f"no GPTQ export: a checkpoint has one setting, here are {kinds}")
    if len(sizes) > 1:
        kinds = ", ".join(f"group size {size} ({_listed(names)})" for size, names in sizes.items())
        raise CheckpointError(f"no GPTQ export: a checkpoint has one group size, here are {kinds}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def quantization_config(setting: GptqSetting, left_dense: Sequence[str] = ()) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Both `checkpoint_format` and `format` are written: readers disagree about the name. Linears left
    dense inside the blocks are named under `dynamic`, as GPTQModel and vLLM look for them.

    Source: AutoGPTQ `BaseQuantizeConfig`, GPTQModel `QuantizeConfig`, vLLM `GPTQConfig`.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": setting.bits,
        "group_size": setting.group_size,
        "sym": setting.symmetric,
        "desc_act": setting.act_order,
        "static_groups": False,
        "lm_head": False,
        "checkpoint_format": setting.checkpoint_format,
        "format": setting.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"sparsekit:{__version__}"]},
    }
    if left_dense:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left_dense}
    return config


def legacy_config(setting: GptqSetting) -> dict[str, Any]:
    """`quantize_config.json`, which AutoGPTQ reads first."""
    return {
        "bits": setting.bits,
        "group_size": setting.group_size,
        "sym": setting.symmetric,
        "desc_act": setting.act_order,
        "static_groups": False,
        "model_file_base_name": "model",
        "is_marlin_format": False,
        "quant_method": "gptq",
        "checkpoint_format": setting.checkpoint_format,
    }
