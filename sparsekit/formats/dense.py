"""Dense: every value as the model computes with it, zeros stored."""

from __future__ import annotations

from sparsekit.formats.base import Format, Setting
from sparsekit.interchange.engines import EngineNote
from sparsekit.shelf import Origin


def _engines(setting: Setting | None) -> list[EngineNote]:
    return [
        EngineNote(
            "Transformers 5.24",
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


FORMAT = Format("dense", None, _engines, Origin.of(_engines), __doc__)
