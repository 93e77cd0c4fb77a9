"""AWQ, version GEMM: 4 bit codes packed along the outputs in an interleaved order.

Of each linear: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales float16
[groups, out]. The eight nibbles of a word hold the outputs 0, 2, 4, 6, 1, 3, 5, 7. The groups are
consecutive inputs. Zero-points are always stored and `zero_point` is always true, for symmetric
grids too: readers take false for a request to make the zero-points up.

Source: AutoAWQ 0.2.9 `awq/utils/packing_utils.py` and `linear/gemm.py`; vLLM `AWQConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.formats.base import Format, Setting, inexact_scale, permuted
from sparsekit.formats.gptq import ROUNDING, ZEROS
from sparsekit.formats.packing import WORD, pack_rows, unpack_rows
from sparsekit.formats.reading import SCALES, assembled, check_shape, groups_of, one_of, tensor, whole
from sparsekit.interchange.engines import EngineNote
from sparsekit.quant import QuantizedWeight
from sparsekit.shelf import Origin
from sparsekit.state import LinearState

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output held by each nibble of a word
INVERSE = tuple(ORDER.index(place) for place in range(8))


class Awq:
    """See the module."""

    title = "AWQ"
    method = "awq"
    stem = "model"
    parts: Mapping[str, str] = {"qweight": "codes", "qzeros": "zeros", "scales": "scales"}
    bits: tuple[int, ...] = (4,)
    checksums = False

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The only one written."""
        return ("gemm",)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """Other bits than 4, permuted groups, shapes that do not fill words."""
        weight = state.quantized
        assert weight is not None  # only asked about quantized linears
        out, columns = weight.codes.shape
        if weight.bits not in self.bits:
            return f"{weight.bits} bits have no AWQ layout, only 4 bits have"
        if permuted(weight):
            return "act-order permutes its groups, and AWQ has no group index; set act_order: false or static groups"
        if out % WORD or columns % WORD:
            return (
                f"its shape [{out}, {columns}] is not a multiple of {WORD} both ways; add it to the quantizer's ignore"
            )
        return inexact_scale(weight)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The three tensors; zeros of a pattern are ordinary codes here, so the mask is not used."""
        return {
            "qweight": pack_rows(_ordered(weight.codes.t(), ORDER), 4).contiguous(),
            "qzeros": pack_rows(_ordered(weight.zero.t(), ORDER), 4).contiguous(),
            "scales": weight.scale.half().t().contiguous(),
        }

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """Inverse of `pack`."""
        qweight, qzeros, scales = tensor(found, "qweight"), tensor(found, "qzeros"), tensor(found, "scales", SCALES)
        columns, out = qweight.shape[0], qweight.shape[1] * 8
        if out % WORD:
            raise CheckpointError(f"qweight {list(qweight.shape)} holds {out} outputs, not a multiple of {WORD}")
        group_of, groups = groups_of(columns, setting, None, qweight)
        check_shape("scales", scales, (groups, out), setting)
        check_shape("qzeros", qzeros, (groups, out // 8), setting)
        codes, zero = (_ordered(unpack_rows(words, 4), INVERSE) for words in (qweight, qzeros))
        symmetric = setting.symmetric or bool((zero == 8).all())  # how a symmetric grid is stored here
        known = Setting(4, setting.group_size, symmetric, False, setting.layout)
        return assembled(codes.t(), scales.t(), zero.t(), group_of, known)

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """Not told."""
        return None

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """As AutoAWQ writes it, and `bits` beside `w_bit`'s modern name."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": setting.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(left_dense) or None,
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of AutoAWQ, GPTQModel and sparsekit; GPTQModel calls the version `format`."""
        bits = one_of(config, "bits" if "bits" in config else "w_bit", (4,))
        written = next((config[key] for key in ("version", "checkpoint_format", "format") if config.get(key)), "gemm")
        layout = one_of({"version": str(written).lower()}, "version", ("gemm",))
        size = whole(config, "group_size" if "group_size" in config else "q_group_size")
        return Setting(bits, size, False, False, layout)

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """About rounding, and about zeros that cost as much as other codes."""
        yield ROUNDING
        if sparse:
            yield ZEROS


def _ordered(values: Tensor, order: Sequence[int]) -> Tensor:
    """Rows with every eight columns rearranged."""
    index = torch.tensor(order, device=values.device)
    return values.reshape(len(values), -1, 8).index_select(2, index).flatten(1)


def _engines(setting: Setting | None) -> list[EngineNote]:
    assert setting is not None  # there are always integers
    alone = "Transformers alone stops with an ImportError that names gptqmodel."
    engines = {
        "Transformers 5.24 with gptqmodel 7.6": f"Checked on CPU. {alone}",
        "vLLM 0.32 (CPU build)": "Checked on CPU. It runs as ordinary int4: the 2:4 zeros bring no speed there.",
    }
    if setting.complete:
        notes = [EngineNote(engine, "loads", sentence) for engine, sentence in engines.items()]
    else:
        why = "Linears left dense inside the blocks were not tried."
        notes = [EngineNote(engine, "not checked", why) for engine in engines]
    refusal = "Not made for this format; write gptq for it."
    return [*notes, EngineNote("auto-gptq 0.7.1 with Transformers 4.57", "not checked", refusal)]


FORMAT = Format("awq", Awq(), _engines, Origin.of(Awq), __doc__)
