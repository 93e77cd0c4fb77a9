"""GPTQ: integers packed along the inputs, zero-points along the outputs; versions 1 and 2.

Of each linear: qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales
float16 [groups, out], g_idx int32 [in]. Version 1 (`checkpoint_format: gptq`) stores zero-points
minus one, version 2 (`gptq_v2`) stores them as they are.

Source: AutoGPTQ 0.7.1 `qlinear_cuda_old.py` and `BaseQuantizeConfig`; GPTQModel `QuantizeConfig` and
its conversion between the versions; vLLM `GPTQConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit import __version__
from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, inexact_scale
from sparsekit.formats.packing import WORD, pack_rows, unpack_rows
from sparsekit.formats.reading import SCALES, assembled, check_shape, groups_of, one_of, tensor, whole
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

PACKABLE_BITS = (2, 3, 4, 8)  # 5, 6 and 7 bits have no layout that a GPTQ reader knows
LAYOUTS = ("gptq", "gptq_v2")


class Gptq:
    """See the module."""

    title = "GPTQ"
    method = "gptq"
    stem = "model"
    parts: Mapping[str, str] = {"qweight": "codes", "qzeros": "zeros", "scales": "scales", "g_idx": "groups"}
    bits: tuple[int, ...] = PACKABLE_BITS
    checksums = False

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """Version 1, which every reader takes, where it is safe: with symmetric grids."""
        return ("gptq",) if symmetric else ("gptq_v2",)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Bits without a layout, shapes that do not fill words, a zero-point version 1 cannot hold."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        out, columns = weight.codes.shape
        if weight.bits not in PACKABLE_BITS:
            return f"{weight.bits} bits have no GPTQ layout; there are layouts for 2, 3, 4 and 8 bits"
        if out % WORD or columns % WORD:
            return (
                f"its shape [{out}, {columns}] is not a multiple of {WORD} both ways; add it to the quantizer's ignore"
            )
        if layout == "gptq" and bool((weight.zero == 0).any()):
            return (
                "a zero-point is 0, which version 1 of the layout would store as -1 and readers would misread; "
                "export it as gptq_v2, or quantize symmetrically"
            )
        return inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The four tensors; zeros of a pattern are ordinary codes here, so the mask is not used."""
        zero = weight.zero.to(torch.int32) - (1 if layout == "gptq" else 0)
        return {
            "qweight": pack_rows(weight.codes, weight.bits).t().contiguous(),
            "qzeros": pack_rows(zero.t(), weight.bits).contiguous(),
            "scales": weight.scale.half().t().contiguous(),
            "g_idx": weight.group_of.to(torch.int32),
        }

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`; a missing g_idx means consecutive groups."""
        qweight, qzeros, scales = tensor(found, "qweight"), tensor(found, "qzeros"), tensor(found, "scales", SCALES)
        bits, out = setting.bits, qweight.shape[1]
        columns = qweight.shape[0] * WORD // bits
        if qweight.shape[0] * WORD % bits or columns % WORD or out % WORD:
            raise CheckpointError(f"qweight {list(qweight.shape)} holds no whole matrix of {bits} bit codes")
        index = found.get("g_idx")
        if index is not None and index.numel() != columns:
            raise CheckpointError(
                f"qweight holds {columns} inputs at {bits} bits and g_idx {index.numel()}: the bits do not fit"
            )
        group_of, groups = groups_of(columns, setting, index, qweight)
        check_shape("scales", scales, (groups, out), setting)
        check_shape("qzeros", qzeros, (groups, out * bits // WORD), setting)
        zero = unpack_rows(qzeros, bits) if setting.layout == "gptq_v2" else _version_1(qzeros, bits)
        return assembled(unpack_rows(qweight.t(), bits), scales.t(), zero.t(), group_of, setting)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """Not told."""
        return None

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """Both `checkpoint_format` and `format` are written: readers disagree about the name.

        Linears left dense inside the blocks stand under `dynamic`, where GPTQModel and vLLM look.
        """
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": setting.bits,
            "group_size": setting.group_size,
            "sym": setting.symmetric,
            "desc_act": setting.act_order,
            "static_groups": False,
            "lm_head": False,
            "checkpoint_format": setting.layout,
            "format": setting.layout,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"sparsekit:{__version__}"]},
        }
        if left_dense:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left_dense}
        return config

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """`quantize_config.json`, which AutoGPTQ reads first."""
        about = {
            "bits": setting.bits,
            "group_size": setting.group_size,
            "sym": setting.symmetric,
            "desc_act": setting.act_order,
            "static_groups": False,
            "model_file_base_name": "model",
            "is_marlin_format": False,
            "quant_method": "gptq",
            "checkpoint_format": setting.layout,
        }
        return {"quantize_config.json": about}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of AutoGPTQ, GPTQModel and sparsekit; the version is called `checkpoint_format` or `format`."""
        bits = one_of(config, "bits", PACKABLE_BITS)
        key = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
        layout = one_of(config, key, LAYOUTS, "gptq")
        one_of(config, "pack_dtype", ("int32",), "int32")
        own = [name for name in config.get("dynamic") or {} if not str(name).startswith("-:")]
        if own:
            raise CheckpointError(f"quantization_config: dynamic gives {own[0]} its own setting, which is not read")
        symmetric = one_of(config, "sym", (True, False), True)
        return Setting(bits, whole(config, "group_size"), symmetric, bool(config.get("desc_act")), str(layout))

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """About rounding, and about zeros that cost as much as other codes."""
        yield ROUNDING
        if sparse:
            yield ZEROS


ROUNDING = (
    "readers multiply codes by float16 scales in their own precision; the run rounds the products to the "
    "model's dtype: the same integers and scales, logits that differ in the last bits"
)
ZEROS = "the zeros of the pattern are stored as ordinary codes: no smaller and no faster than dense integers"


def _version_1(qzeros: Tensor, bits: int) -> Tensor:
    """Zero-points of version 1, int32 [groups, out].

    One is added to whole words, as GPTQModel's writer subtracts it from whole words: a zero-point of
    0 borrows from its neighbour, and the sum gives both back. AutoGPTQ adds after unpacking; the two
    agree wherever no zero-point is 0. Three bits straddle words and have no such sum.
    """
    if bits == 3:
        zero = unpack_rows(qzeros, bits) + 1
        if bool((zero == 8).any()):
            raise CheckpointError("a 3 bit zero-point of 0 in version 1 of the layout, which readers read differently")
        return zero
    ones = sum(1 << place for place in range(0, WORD, bits))
    words = (qzeros.long() + ones) & 0xFFFFFFFF
    return unpack_rows(torch.where(words >= 2**31, words - 2**32, words).int(), bits)


def _engines(setting: Setting | None) -> list[EngineNote]:
    assert setting is not None  # there are always integers
    return [_transformers(setting), _autogptq(setting), _vllm(setting)]


def _transformers(setting: Setting) -> EngineNote:
    engine = "Transformers 5.24 with gptqmodel 7.6 and optimum 2.3"
    alone = "Transformers alone stops with an ImportError that names optimum."
    if not setting.complete:
        return EngineNote(engine, "not checked", f"Linears left dense inside the blocks were not tried. {alone}")
    if setting.bits == 3 or setting.layout == "gptq_v2":
        what = "3 bits" if setting.bits == 3 else "Version 2 of the layout"
        return EngineNote(engine, "not checked", f"{what}: supported by its documentation, not tried. {alone}")
    return EngineNote(engine, "loads", f"Checked on CPU. {alone}")


def _autogptq(setting: Setting) -> EngineNote:
    engine = "auto-gptq 0.7.1 with Transformers 4.57"
    if setting.layout == "gptq_v2":
        sentence = "It knows only version 1 of the layout and reads every zero-point one too high, without a word."
        return EngineNote(engine, "misreads", sentence)
    if not setting.complete:
        sentence = "It takes every linear of a block for quantized and leaves those that are not without their weights."
        return EngineNote(engine, "misreads", sentence)
    return EngineNote(engine, "loads", "Checked on CPU with its PyTorch kernel (tests/interop). It is unmaintained.")


def _vllm(setting: Setting) -> EngineNote:
    engine = "vLLM 0.32 (CPU build)"
    if setting.act_order:
        return EngineNote(engine, "refuses", "Activation ordering (desc_act) is no longer supported there.")
    if not setting.symmetric:
        return EngineNote(engine, "refuses", "Asymmetric GPTQ: 'Unsupported quantization config: sym=False'.")
    if setting.bits == 8:
        return EngineNote(engine, "refuses", "8-bit GPTQ: only 4-bit symmetric types there; its GPU build not checked.")
    if setting.bits != 4 or setting.layout == "gptq_v2" or not setting.complete:
        return EngineNote(engine, "not checked", "Only 4-bit symmetric version 1 with all linears quantized was tried.")
    return EngineNote(engine, "loads", "Checked on CPU. It runs as ordinary int4: the 2:4 zeros bring no speed there.")


FORMAT = Format("gptq", Gptq(), _engines, Origin.of(Gptq), __doc__)
