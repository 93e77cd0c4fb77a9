"""The sections of a recipe: model, texts, measurements, exports."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from sparsekit.blockwise.holding import Memory
from sparsekit.errors import nearest
from sparsekit.evaluation.measures import Measure
from sparsekit.formats import FORMATS
from sparsekit.ladder import Rung
from sparsekit.reporting.sections import SECTIONS
from sparsekit.units import Count, Fraction

BUILT_IN_TEXTS = ("calibration", "heldout", "train")

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


def _paths(value: Any) -> Any:
    """Say what a path may be, where pydantic would list the branches of a union."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError("path must be text or a list of texts, as in path: builtin:calibration")
    for item in items:
        name = item.removeprefix("builtin:")
        if name != item and name not in BUILT_IN_TEXTS:
            built_in = ", ".join(BUILT_IN_TEXTS)
            raise ValueError(f"path: no built-in text {name!r}; there are {built_in}.{nearest(name, BUILT_IN_TEXTS)}")
    return value


def file_name(value: Any) -> Any:
    """Refuse what cannot be a name of a run, which is one of a directory."""
    if isinstance(value, str) and (not value or value[0] in ".-" or not all(c.isalnum() or c in "._-" for c in value)):
        raise ValueError(f"{value!r} must be letters, digits, '.', '_' and '-', and not begin with '.' or '-'")
    return value


def _device(value: Any) -> Any:
    known = ("auto", "cpu", "cuda")
    if isinstance(value, str) and value not in known and not (value.startswith("cuda:") and value[5:].isdecimal()):
        raise ValueError(f"device {value!r} is not one of auto, cpu, cuda, cuda:N.{nearest(value, known)}")
    return value


def _format(value: Any) -> Any:
    if not isinstance(value, str) or value not in FORMATS:
        hint = nearest(value, FORMATS) if isinstance(value, str) else ""
        raise ValueError(f"format {value!r} is not one of {', '.join(FORMATS)}.{hint}")
    return value


def _section(value: Any) -> Any:
    if not isinstance(value, str) or value not in SECTIONS:
        there = ", ".join(SECTIONS) or "none: report sections come from plugins"
        hint = nearest(value, SECTIONS) if isinstance(value, str) else ""
        raise ValueError(f"no report section {value!r}; there is {there}.{hint}")
    return value


class _FormatNames:
    """The JSON Schema of a format's name, with those of plugins that are loaded when somebody asks."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(FORMATS)}


Format = Annotated[str, BeforeValidator(_format), _FormatNames()]
Text = Annotated[str, StringConstraints(min_length=1)]
FileName = Annotated[str, BeforeValidator(file_name)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy, and so lm-eval, accepts


class ModelEntry(BaseModel):
    """The model to compress."""

    model_config = STRICT

    path: Text = Field(description="A directory with a Hugging Face causal LM, builtin:tiny, or a hub id.")
    dtype: Precision = Field("auto", description="What weights are stored in; auto is the checkpoint's own.")
    compute_dtype: Precision = Field("auto", description="What forwards compute in; auto is float32 on CPU.")
    device: Annotated[str, BeforeValidator(_device)] = Field("auto", description="auto, cpu, cuda or cuda:N.")
    memory: Memory = Field("auto", description="What steps hold on the device: auto, fast, balanced or low.")
    trust_remote_code: bool = Field(False, description="Let the checkpoint's own Python code run.")


class TextEntry(BaseModel):
    """A text, cut into windows of tokens."""

    model_config = STRICT

    path: Annotated[str | list[str], BeforeValidator(_paths)] = Field(
        description="builtin:NAME, a .txt or .txt.xz file, or a list of them; hub:NAME with allow_network."
    )
    samples: Count | None = Field(None, description="Windows to take; all of them when absent.")
    seq_len: Annotated[Count, Field(ge=2)] = Field(1024, description="Tokens in a window.")
    separator: Text | None = Field(None, description="Marks the end of a document in the text.")
    seed: Seed = Field(0, description="Of the choice of windows.")

    @property
    def paths(self) -> list[str]:
        """The path or paths as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Texts(BaseModel):
    """What the steps and the measurements read."""

    model_config = STRICT

    calibration: TextEntry | None = None
    train: TextEntry | None = None
    evaluation: dict[FileName, TextEntry] = Field(default_factory=dict)


class Numerics(BaseModel):
    """How far a step may go where arithmetic fails; every rung is noted and counted."""

    model_config = STRICT

    max_rung: Rung = Field("damping", description="none, damping, tokens, columns or diagonal.")


class Redo(BaseModel):
    """What to do about the worst layers when a gate is missed."""

    model_config = STRICT

    bits: Annotated[int, Field(ge=2, le=8)] | None = Field(
        None, description="Quantize them anew with so many bits; left as the step before had them when absent."
    )
    most: Annotated[int, Field(ge=1)] = Field(4, description="Layers that may be redone; 1, 2, 4, ... are tried.")


class Gates(BaseModel):
    """Limits that make a run exit with code 3."""

    model_config = STRICT

    max_ppl_increase: Fraction | None = Field(None, description="Over the dense model, on every text; 5% or 0.05.")
    redo: Redo | None = Field(None, description="Redo the layers with the largest error until the gate holds.")


class Tasks(BaseModel):
    """Tasks of the LM evaluation harness."""

    model_config = STRICT

    tasks: list[Text] = Field(default_factory=list, description="Names of tasks.")
    tasks_dir: Text | None = Field(None, description="A directory with task files of your own.")
    limit: Count | None = Field(None, description="Examples of each task; all of them when absent.")


class Measurements(BaseModel):
    """What is measured of the dense and of the compressed model."""

    model_config = STRICT

    perplexity: list[str] = Field(default_factory=list, description="Names under data.evaluation.")
    agreement: bool | list[str] = Field(
        False, description="KL and top-1 agreement with the dense model: true for every text, or their names."
    )
    measures: list[Measure] = Field(
        default_factory=list,
        description="Evaluators of plugins: evaluator, text (a name under data.evaluation), parameters.",
    )
    gates: Gates = Field(default_factory=Gates, description="What the result must reach; exit code 3 when it does not.")
    lm_eval: Tasks = Field(default_factory=Tasks, description="Zero-shot tasks of the LM evaluation harness.")

    @property
    def agreeing(self) -> list[str]:
        """Texts on which agreement with the dense model is measured."""
        if isinstance(self.agreement, list):
            return list(self.agreement)
        return list(self.perplexity) if self.agreement else []


class Exports(BaseModel):
    """What is written at the end."""

    model_config = STRICT

    formats: list[Format] = Field(["dense"], description="Names of export formats; none writes nothing.")
    directory: Text | None = Field(None, description="Default: export/ in the output directory.")


class Pages(BaseModel):
    """What the report shows besides what every report shows."""

    model_config = STRICT

    sections: list[Annotated[str, BeforeValidator(_section)]] = Field(
        default_factory=list, description="Report sections of plugins, in order."
    )
