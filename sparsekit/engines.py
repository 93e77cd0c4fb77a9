"""Which engines read an export, as tried on the date below and not as promised by anybody.

Each sentence is about one setting of one export. What was not tried is called "not checked".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from sparsekit.packing import CheckpointFormat

CHECKED = "2026-11-24"
Verdict = Literal["loads", "refuses", "misreads", "not checked"]


@dataclass(frozen=True, slots=True)
class GptqSetting:
    """What decides whether a reader takes a GPTQ checkpoint.

    Attributes:
        bits: Of a code.
        group_size: Inputs of a group, -1 for one group a row.
        symmetric: All zero-points are 2^(bits-1).
        act_order: The groups of the inputs are permuted (`desc_act`).
        checkpoint_format: Version of the layout.
        complete: Every linear of every block is quantized.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    checkpoint_format: CheckpointFormat
    complete: bool


@dataclass(frozen=True, slots=True)
class EngineNote:
    """One engine and one sentence about it."""

    engine: str
    verdict: Verdict
    sentence: str
    checked: str = CHECKED

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def dense_engines() -> list[EngineNote]:
    """Who reads a dense export."""
    return [
        EngineNote(
            "Transformers 5.23",
            "loads",
            "Opens with AutoModelForCausalLM.from_pretrained like the original; the run compares its logits.",
        ),
        EngineNote(
            "other readers of the original model",
            "not checked",
            "The directory has the original's tensor names and shapes. The zeros are stored as zeros: "
            "same size and same speed as the original.",
        ),
    ]


def gptq_engines(setting: GptqSetting) -> list[EngineNote]:
    """Who reads a GPTQ export of this setting."""
    return [_transformers(setting), _autogptq(setting), _vllm(setting)]


def _transformers(setting: GptqSetting) -> EngineNote:
    engine = "Transformers 5.23 with gptqmodel 7.6 and optimum 2.3"
    alone = "Transformers alone stops with an ImportError that names optimum."
    if not setting.complete:
        return EngineNote(engine, "not checked", f"Linears left dense inside the blocks were not tried. {alone}")
    if setting.bits == 3 or setting.checkpoint_format == "gptq_v2":
        what = "3 bits" if setting.bits == 3 else "Version 2 of the layout"
        return EngineNote(engine, "not checked", f"{what}: supported by its documentation, not tried. {alone}")
    return EngineNote(engine, "loads", f"Checked on CPU. {alone}")


def _autogptq(setting: GptqSetting) -> EngineNote:
    engine = "auto-gptq 0.7.1 with Transformers 4.57"
    if setting.checkpoint_format == "gptq_v2":
        sentence = "It knows only version 1 of the layout and reads every zero-point one too high, without a word."
        return EngineNote(engine, "misreads", sentence)
    if not setting.complete:
        sentence = "It takes every linear of a block for quantized and leaves those that are not without their weights."
        return EngineNote(engine, "misreads", sentence)
    return EngineNote(engine, "loads", "Checked on CPU with its PyTorch kernel (tests/interop). It is unmaintained.")


def _vllm(setting: GptqSetting) -> EngineNote:
    engine = "vLLM 0.32 (CPU build)"
    if setting.act_order:
        return EngineNote(engine, "refuses", "Activation ordering (desc_act) is no longer supported there.")
    if not setting.symmetric:
        return EngineNote(engine, "refuses", "Asymmetric GPTQ: 'Unsupported quantization config: sym=False'.")
    if setting.bits == 8:
        return EngineNote(engine, "refuses", "8-bit GPTQ: only 4-bit symmetric types there; its GPU build not checked.")
    if setting.bits != 4 or setting.checkpoint_format == "gptq_v2" or not setting.complete:
        return EngineNote(engine, "not checked", "Only 4-bit symmetric version 1 with all linears quantized was tried.")
    return EngineNote(engine, "loads", "Checked on CPU. It runs as ordinary int4: the 2:4 zeros bring no speed there.")
