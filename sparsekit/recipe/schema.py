"""A recipe's schema: the whole job, with what its parts mean together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, Field, PrivateAttr

from sparsekit.errors import DataError, ModelError
from sparsekit.recipe.entries import (
    STRICT,
    Exports,
    FileName,
    Measurements,
    ModelEntry,
    Numerics,
    Pages,
    Seed,
    Text,
    Texts,
)
from sparsekit.recipe.step import Step
from sparsekit.recipe.yamllines import Document
from sparsekit.units import Fraction


class Recipe(BaseModel):
    """A whole job. `output` and `export.directory` are relative to the current directory, all else to the file."""

    model_config = STRICT

    name: FileName = Field(description="What the run is called, in its report and as its directory.")
    seed: Seed = Field(0, description="Of everything that is drawn.")
    output: Text | None = Field(None, description="Directory of the run; default runs/NAME.")
    plugins: list[Text] = Field(
        default_factory=list, description="Python files with methods, export formats, evaluators and report sections."
    )
    allow_network: bool = Field(False, description="Let models and texts be downloaded.")
    coverage: Annotated[Fraction, Field(le=1)] = Field(
        0.95, description="Share of the parameters inside the blocks that must be within reach."
    )
    model: ModelEntry = Field(description="What is compressed.")
    data: Texts = Field(default_factory=Texts, description="Texts that steps and measurements read.")
    numerics: Numerics = Field(default_factory=Numerics, description="What may be done when arithmetic fails.")
    steps: list[Step] = Field(description="In order; an empty list measures and exports the model as it is.")
    evaluate: Measurements = Field(default_factory=Measurements, description="What is measured, dense and compressed.")
    export: Exports = Field(default_factory=Exports, description="In which formats the result is written.")
    report: Pages = Field(default_factory=Pages, description="What the report shows besides.")

    _document: Document = PrivateAttr(default_factory=Document)

    def where(self, *keys: str | int) -> str:
        """`recipe.yaml:12`, the line of a value or of its nearest ancestor, with the `--set` that changed it."""
        return self._document.where(keys)

    @contextmanager
    def placing(self, *keys: str) -> Iterator[None]:
        """Put the place of a value before what its model, text or task is found to lack."""
        try:
            yield
        except (DataError, ModelError) as error:
            raise type(error)(f"{self.where(*keys)}: {error}") from error

    def resolve(self, path: str) -> str:
        """What a path of the recipe means.

        Relative paths start at the recipe's directory. `builtin:` and `hub:` names pass through, and
        so does what is no file when the network is allowed, since it may be a hub id.
        """
        if path.startswith(("builtin:", "hub:")):
            return path
        written = Path(os.path.expanduser(path))  # Path.expanduser raises on an unknown ~user
        found = Path(self._document.file).parent / written
        if self.allow_network and not written.is_absolute() and path[0] != "." and not found.exists():
            return path
        return os.path.realpath(found)  # Path.resolve raises on links that go round in a circle

    def output_directory(self) -> Path:
        """Where the run is kept."""
        return Path(os.path.expanduser(self.output)) if self.output else Path("runs") / self.name

    def export_directory(self) -> Path:
        """Where the exports go, one directory a format."""
        written = self.export.directory
        return Path(os.path.expanduser(written)) if written else self.output_directory() / "export"

    def resolved_yaml(self) -> str:
        """The recipe with every default filled in and every path absolute; it reads back as the same recipe."""
        values = self.model_dump(mode="json", exclude={"steps"})
        values["output"] = str(self.output_directory().absolute())
        values["plugins"] = [self.resolve(path) for path in self.plugins]
        values["model"]["path"] = self.resolve(self.model.path)
        texts = [values["data"]["calibration"], values["data"]["train"], *values["data"]["evaluation"].values()]
        for text in filter(None, texts):
            path = text["path"]
            text["path"] = self.resolve(path) if isinstance(path, str) else [self.resolve(part) for part in path]
        if self.evaluate.lm_eval.tasks_dir:
            values["evaluate"]["lm_eval"]["tasks_dir"] = self.resolve(self.evaluate.lm_eval.tasks_dir)
        values["export"]["directory"] = str(self.export_directory().absolute())
        values["steps"] = [step.as_dict() for step in self.steps]
        for step in values["steps"]:
            if "teacher" in step:
                step["teacher"] = self.resolve(step["teacher"])
        ordered = {name: values[name] for name in type(self).model_fields}
        text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=110)
        return str(text)
