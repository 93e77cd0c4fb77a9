"""Zero-shot tasks: task files become tasks over rows read here, with nothing fetched and no code run.

A task file has the harness's own format. Files come from this package and from the recipe's
`tasks_dir`, where the data files are too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsekit.errors import DataError, nearest

# Metrics the harness has by itself; it looks any other up on the hub (lm_eval/api/registry.py get_metric).
METRICS = (
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "perplexity", "word_perplexity",
    "byte_perplexity", "bits_per_byte", "f1", "mcc", "brier_score",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaskFile:
    """One task as it is written.

    Attributes:
        name: What a recipe calls it.
        config: The harness's keys, data files not yet read.
        path: Where it is written, for messages.
        group: Name under which several tasks of a file are averaged, or None.
    """

    name: str
    config: Mapping[str, Any]
    path: Path
    group: str | None = None

    def with_data(self, directory: Path | None) -> dict[str, Any]:
        """The task for the harness, with its rows in place of a dataset to be built.

        Raises:
            DataError: A data file is missing or damaged, or a metric would be fetched.
        """
        config = {**self.config, "task": self.name}
        for entry in config.get("metric_list", []):
            if entry.get("metric") not in METRICS:
                known = ", ".join(METRICS)
                raise DataError(f"{self.path}: metric {entry.get('metric')!r} is not one of {known}")
        kwargs = config.pop("dataset_kwargs", {})
        if config.pop("dataset_path", None) != "json" or not isinstance(kwargs.get("data_files"), Mapping):
            raise DataError(
                f"{self.path}: a task file needs dataset_path: json and dataset_kwargs: {{data_files: {{SPLIT: FILE}}}}"
            )
        if directory is None:
            raise DataError(f"task {self.name} needs evaluate.lm_eval.tasks_dir, the directory with its data")
        labels = kwargs.get("labels", {})
        for file in (*kwargs["data_files"].values(), *labels.values()):
            if not Path(os.path.realpath(directory / str(file))).is_relative_to(os.path.realpath(directory)):
                raise DataError(f"{self.path}: data file {file} is outside {directory}")
        splits = {
            split: read_rows(self.name, directory / file, directory / labels[split] if split in labels else None)
            for split, file in kwargs["data_files"].items()
        }
        config["custom_dataset"] = lambda **_: _datasets(splits)
        return config


def _datasets(splits: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    import datasets  # noqa: PLC0415  # comes with the harness

    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}


def task_files(directory: Path | None) -> dict[str, TaskFile]:
    """Every task there is by name: the package's and those of `directory`.

    Raises:
        DataError: A file is no task file, or two have one name.
    """
    if directory is not None and not directory.is_dir():
        siblings = [entry.name for entry in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise DataError(f"tasks_dir {directory} is no directory.{nearest(directory.name, siblings)}")
    found: dict[str, TaskFile] = {}
    for folder in (Path(__file__).parent, *([directory] if directory else [])):
        for path in sorted(folder.glob("*.yaml")):
            for task in _tasks_of(path):
                if task.name in found:
                    raise DataError(f"{path}: a task {task.name!r} is in {found[task.name].path} too")
                found[task.name] = task
    return found


def chosen(names: list[str], known: Mapping[str, TaskFile]) -> tuple[dict[str, list[str]], list[str]]:
    """Split names into ours and others: our names with the tasks each stands for, and the rest."""
    groups: dict[str, list[str]] = {}
    for task in known.values():
        if task.group:
            groups.setdefault(task.group, []).append(task.name)
    ours = {name: groups.get(name, [name]) for name in names if name in groups or name in known}
    return ours, [name for name in names if name not in ours]


def _tasks_of(path: Path) -> list[TaskFile]:
    """The tasks of a file; `safe_load` refuses `!function`, which would run a file of Python."""
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.constructor.ConstructorError as error:
        raise DataError(f"{path}: {error.problem}; a task file may not run code") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is no task file: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise DataError(f"{path} is no task file: it needs task: NAME")
    if "include" in config:
        raise DataError(f"{path}: include is not supported, write the keys out")
    group, sets = config.pop("group", None), config.pop("sets", None)
    if sets is None:
        return [TaskFile(config["task"], config, path)]
    return [TaskFile(config["task"].replace("*", each), _substituted(config, each), path, group) for each in sets]


def _substituted(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A config whose data files are those of one set."""
    kwargs = config["dataset_kwargs"]
    files = {split: file.replace("*", name) for split, file in kwargs["data_files"].items()}
    return {**config, "dataset_kwargs": {**kwargs, "data_files": files}}


def read_rows(task: str, path: Path, labels: Path | None) -> list[dict[str, Any]]:
    """Rows of a JSON file, one object a line or one list, with a column `label` from a second file.

    Raises:
        DataError: A file is missing or holds something else.
    """
    lines = _lines(task, path)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"task {task}: {path}:{number} is no JSON: {error}") from error
        rows += value if isinstance(value, list) else [value]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"task {task}: {path} holds no JSON objects, one a line")
    if labels is not None:
        column = _lines(task, labels)
        if len(column) != len(rows):
            raise DataError(f"task {task}: {labels} has {len(column)} labels for the {len(rows)} rows of {path}")
        try:
            rows = [{**row, "label": int(label)} for row, label in zip(rows, column, strict=True)]
        except ValueError as error:
            raise DataError(f"task {task}: {labels} holds something that is no whole number: {error}") from error
    return rows


def _lines(task: str, path: Path) -> list[str]:
    """Lines that are not blank."""
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"task {task}: no data file {path}.{nearest(path.name, siblings)}")
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task {task}: cannot read {path}: {error}") from error
