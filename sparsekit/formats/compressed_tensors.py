"""compressed-tensors, format pack-quantized: what llm-compressor writes and vLLM reads.

Of each linear: weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_shape
int64 [2], and where needed weight_zero_point int32 [out * bits / 32, groups] (packed along the
outputs) and weight_g_idx int32 [in]. Codes are stored as code, zero-points as zero-point; the
readers subtract 2^(bits-1) from both. Scales are float16 here, as everywhere in sparsekit:
bfloat16, which llm-compressor would write for a bfloat16 model, cannot hold them.

There is never a `sparsity_config`: the 2:4 compressors were removed in 0.15, and a checkpoint that
names one loads as random weights there and not at all in vLLM (vllm-project/vllm issue 51190).

Source: compressed-tensors 0.20 `compressors/pack_quantized`, `quantization/quant_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, inexact_scale
from sparsekit.formats.gptq import ROUNDING, ZEROS
from sparsekit.formats.packing import WORD, pack_padded, unpack_padded
from sparsekit.formats.reading import SCALES, assembled, check_shape, groups_of, one_of, tensor, whole
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

BITS = (4, 8)  # 2 bits would pack the same way and have no engine; 3 bits pack ten to a word here


class PackQuantized:
    """See the module."""

    title = "compressed-tensors"
    method = "compressed-tensors"
    stem = "model"
    parts: Mapping[str, str] = {
        "weight_packed": "codes",
        "weight_scale": "scales",
        "weight_zero_point": "zeros",
        "weight_g_idx": "groups",
        "weight_shape": "headers",
    }
    bits: tuple[int, ...] = BITS
    checksums = False

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The only one written."""
        return ("pack-quantized",)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Bits that no engine reads."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        if weight.bits not in BITS:
            return f"{weight.bits} bits have no pack-quantized layout that an engine reads; 4 and 8 bits have"
        return inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Three to five tensors; zeros of a pattern are ordinary codes here, so the mask is not used."""
        tensors = {
            "weight_packed": pack_padded(weight.codes, weight.bits),
            "weight_scale": weight.scale.half(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64, device=weight.codes.device),
        }
        if not weight.symmetric:
            tensors["weight_zero_point"] = pack_padded(weight.zero.t(), weight.bits).t().contiguous()
        columns = torch.arange(weight.group_of.numel(), device=weight.group_of.device)
        if not torch.equal(weight.group_of.long(), columns // weight.group_size):
            tensors["weight_g_idx"] = weight.group_of.to(torch.int32)
        return tensors

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        words, scale = tensor(found, "weight_packed"), tensor(found, "weight_scale", SCALES)
        if "weight_shape" not in found or found["weight_shape"].numel() != 2:
            raise CheckpointError("lacks the tensor weight_shape with two entries")
        out, columns = (int(length) for length in found["weight_shape"].flatten().tolist())
        check_shape("weight_packed", words, (out, -(-columns * setting.bits // WORD)), setting)
        index = found.get("weight_g_idx")
        if index is not None and bool((index == -1).all()):
            index = None  # how compressed-tensors initialises an index that is not used
        group_of, groups = groups_of(columns, setting, index, words)
        check_shape("weight_scale", scale, (out, groups), setting)
        codes = unpack_padded(words, setting.bits, columns)
        if setting.symmetric:
            zero = torch.full((out, groups), 2 ** (setting.bits - 1), device=words.device)
        else:
            packed = tensor(found, "weight_zero_point")
            check_shape("weight_zero_point", packed, (-(-out * setting.bits // WORD), groups), setting)
            zero = unpack_padded(packed.t(), setting.bits, out).t()
        return assembled(codes, scale, zero, group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """Not told."""
        return None

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """As compressed-tensors writes it; every linear that is not quantized stands under `ignore`."""
        weights = {
            "num_bits": setting.bits,
            "type": "int",
            "symmetric": setting.symmetric,
            "strategy": "channel" if setting.group_size == -1 else "group",
            "group_size": None if setting.group_size == -1 else setting.group_size,
            "dynamic": False,
            "actorder": "group" if setting.act_order else None,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *left_dense],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of llm-compressor and sparsekit; one kind of weights, no quantized activations or cache."""
        one_of(config, "format", ("pack-quantized",))
        for key in ("sparsity_config", "kv_cache_scheme", "transform_config"):
            if config.get(key) and config[key] != {"config_groups": {}}:
                raise CheckpointError(f"quantization_config: {key} is not empty, and this version does not read it")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("quantization_config: config_groups is missing or empty")
        found = {self._of_group(name, group) for name, group in groups.items()}
        if len(found) > 1:
            raise CheckpointError("quantization_config: config_groups quantize weights differently; one way is read")
        return found.pop()

    def _of_group(self, name: str, group: Any) -> Setting:
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"quantization_config: {name} has no weights")
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(f"quantization_config: {name} quantizes activations, which is not read")
        weights = group["weights"]
        one_of(weights, "type", ("int",))
        bits = one_of(weights, "num_bits", BITS)
        strategy = one_of(weights, "strategy", ("group", "channel"))
        size = -1 if strategy == "channel" else whole(weights, "group_size")
        symmetric = one_of(weights, "symmetric", (True, False))
        return Setting(bits, size, symmetric, weights.get("actorder") == "group", "pack-quantized")

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """About rounding, and about zeros that cost as much as other codes."""
        yield ROUNDING
        if sparse:
            yield ZEROS


def _engines(setting: Setting | None) -> list[EngineNote]:
    assert setting is not None  # there are always integers
    return [_transformers(setting), _vllm(setting)]


def _transformers(setting: Setting) -> EngineNote:
    engine = "Transformers 5.24 with compressed-tensors 0.20"
    alone = "Transformers alone stops with an ImportError that names compressed-tensors."
    if setting.act_order:
        return EngineNote(engine, "not checked", f"Permuted groups were not tried. {alone}")
    return EngineNote(engine, "loads", f"Checked on CPU. {alone}")


def _vllm(setting: Setting) -> EngineNote:
    engine = "vLLM 0.32 (CPU build)"
    if setting.bits == 4 and setting.symmetric and not setting.act_order and setting.complete:
        sentence = "Checked on CPU. It runs as ordinary int4: the 2:4 zeros bring no speed there."
        return EngineNote(engine, "loads", sentence)
    return EngineNote(engine, "not checked", "Only 4-bit symmetric weights with all linears quantized were tried.")


FORMAT = Format("compressed-tensors", PackQuantized(), _engines, Origin.of(PackQuantized), __doc__)
