"""YAML as plain data that remembers the line of every key and value.

Only what a recipe needs is read: mappings, lists and scalars. Tags, anchors and aliases are refused,
duplicate keys are named, and scalars that YAML 1.1 turns into something nobody wrote (an unquoted
2:4 into 124, 010 into 8) are caught here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from sparsekit.errors import RecipeError

Keys = tuple[str | int, ...]
MAX_DEPTH = 20


class Mark(NamedTuple):
    """Where a value comes from: its line, the scalar as written, and the `--set` argument if one set it."""

    line: int
    text: str = ""
    override: str = ""


class Problem(NamedTuple):
    """One mistake; problems sort by line."""

    line: int
    where: str
    message: str


@dataclass(slots=True)
class Document:
    """A mapping read from a file.

    Attributes:
        file: The path as the user wrote it.
        values: Plain data.
        marks: Origin of every value, by its keys from the top; `()` is the whole document.
        problems: Mistakes found so far that did not keep the rest from being read.
        reported: Values that have one already; a mistake is not told twice.
    """

    file: str = "recipe"
    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[Keys, Mark] = field(default_factory=lambda: {(): Mark(1)})
    problems: list[Problem] = field(default_factory=list)
    reported: set[Keys] = field(default_factory=set)

    def mark(self, keys: Keys) -> Mark:
        """Origin of a value, or of its nearest ancestor that is written down."""
        return next(self.marks[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.marks)

    def where(self, keys: Keys) -> str:
        """`recipe.yaml:12`, with the `--set` argument behind it when that is the origin."""
        mark = self.mark(keys)
        return f"{self.file}:{mark.line}" + (f" (--set {mark.override})" if mark.override else "")

    def report(self, keys: Keys, message: str) -> None:
        """Note a mistake about a value."""
        if keys in self.reported:
            return
        self.reported.add(keys)
        self.problems.append(Problem(self.mark(keys).line, self.where(keys), message))

    def raise_problems(self) -> None:
        """Raise what was noted, one line each, in the order of the file."""
        if self.problems:
            first, *others = sorted(dict.fromkeys(self.problems))
            lines = [first.message, *(f"{other.where}: {other.message}" for other in others)]
            raise RecipeError("\n".join(lines), where=first.where)

    def override(self, argument: str) -> None:
        """Set one value, as in `steps.1.bits=3`; the right side is YAML.

        Missing mappings on the way are made, so that an optional section can be added.

        Raises:
            RecipeError: No `=`, bad YAML, an index out of range, or a key below a plain value.
        """
        path, equals, text = argument.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            message = f"--set {argument!r} is not KEY=VALUE with keys joined by dots, as in --set steps.1.bits=3"
            raise RecipeError(message, where=f"{self.file}:1")
        keys: Keys = ()
        target: Any = self.values
        for part in parts[:-1]:
            key = self._step_into(target, keys, part, argument)
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                self.marks[(*keys, key)] = Mark(self.mark(keys).line, "", argument)
            target, keys = target[key], (*keys, key)
        key = self._step_into(target, keys, parts[-1], argument)
        keys = (*keys, key)
        line = self.mark(keys).line
        where = f"{self.file}:{line} (--set {argument})"
        value = Document(self.file)
        target[key] = _read(text, value, lambda _: where, quoted=True)
        for known in [known for known in self.marks if known[: len(keys)] == keys]:
            del self.marks[known]
        self.marks |= {keys + below: Mark(line, mark.text, argument) for below, mark in value.marks.items()}
        self.problems += [Problem(line, where, problem.message) for problem in value.problems]
        self.reported |= {keys + below for below in value.reported}

    def _step_into(self, target: Any, keys: Keys, part: str, argument: str) -> str | int:
        """The key or index that `part` means in `target`."""
        if isinstance(target, dict):
            return part
        name = ".".join(map(str, keys))
        where = f"{self.where(keys)} (--set {argument})"
        if not isinstance(target, list):
            raise RecipeError(f"{name} is {shown(target)} and has no key {part!r}", where=where)
        allowed = f"it has {len(target)}, {name}.0 to {name}.{len(target) - 1}" if target else "it is empty"
        if not re.fullmatch(r"\d{1,6}", part) or int(part) >= len(target):
            raise RecipeError(f"{name} has no entry {part!r}; {allowed}", where=where)
        return int(part)


def read_document(text: str, file: str) -> Document:
    """Read YAML whose top level is a mapping.

    Args:
        text: Content of the file.
        file: Its path, as errors shall name it.
    Raises:
        RecipeError: Not YAML, empty, or no mapping; with file and line.
    """
    document = Document(file)
    value = _read(text, document, lambda line: f"{file}:{line}")
    if value is None:
        raise RecipeError("the file is empty; a recipe needs name, model and steps", where=f"{file}:1")
    if not isinstance(value, dict):
        message = f"the file holds {shown(value)}, a recipe is a mapping with the keys name, model, data, steps, ..."
        raise RecipeError(message, where=document.where(()))
    document.values = value
    return document


def shown(value: Any) -> str:
    """A value in the words of a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def _read(text: str, document: Document, where: Callable[[int], str], *, quoted: bool = False) -> Any:
    """Plain data of a text; marks and problems go to the document.

    Args:
        text: YAML.
        document: Receives the marks and problems.
        where: From a line to what an error names.
        quoted: Take a:b as text although the quotes are missing, because a shell has eaten them.
    """
    try:
        _check_events(text, where)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        message = f"character #x{error.character:04x} is not allowed in YAML"
        raise RecipeError(message, where=where(line)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(_syntax(error), where=where(mark.line + 1 if mark else 1)) from error
    return None if node is None else _plain(node, (), document, quoted)


def _syntax(error: Any) -> str:
    """What is wrong with the YAML, in one line."""
    problem = str(error.problem or error.context)
    if "'\\t'" in problem:
        return "a tab is used where YAML wants spaces; indent with spaces"
    if "expected a single document" in f"{error.context} {problem}":
        return "a second document begins here (---); a recipe is one document"
    hint = ""
    if "mapping values are not allowed" in problem:
        hint = "; a value that holds ': ' needs quotes, and keys of one mapping need the same indentation"
    elif "cannot start any token" in problem:
        hint = "; a value that begins with such a character needs quotes"
    context = f" {error.context}" if error.context and error.context != problem else ""
    return f"this is not YAML:{context}{',' if context else ''} {problem}{hint}"


def _check_events(text: str, where: Callable[[int], str]) -> None:
    """Refuse what recipes do not need, before anything recursive looks at it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"alias *{event.anchor}: recipes have no aliases, write the value out", where=where(line))
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            continue
        if event.anchor is not None:
            raise RecipeError(f"anchor &{event.anchor}: recipes have no anchors or aliases", where=where(line))
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise RecipeError(f"tag {tag}: recipes hold plain data, tags are refused", where=where(line))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if depth > MAX_DEPTH:
            raise RecipeError(f"more than {MAX_DEPTH} levels of nesting, this is no recipe", where=where(line))


def _plain(node: Any, keys: Keys, document: Document, quoted: bool) -> Any:
    """Data of a node."""
    line = node.start_mark.line + 1
    text = node.value if isinstance(node, yaml.ScalarNode) else ""
    # a mapping's entry has its key's line already
    document.marks[keys] = Mark(document.marks[keys].line if keys in document.marks and keys else line, text)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, keys, document, quoted)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*keys, index), document, quoted) for index, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(Problem(line, f"{document.file}:{line}", "a key must be text, not a list or map"))
            continue
        key = str(key_node.value)  # as written: a key `on` stays text, where YAML 1.1 reads true
        below = (*keys, key)
        if key in values:
            message = f"key {key!r} is given twice, first on line {document.marks[below].line}; keep one"
            document.problems.append(Problem(line, f"{document.file}:{line}", message))
            continue
        document.marks[below] = Mark(line)
        values[key] = _plain(value_node, below, document, quoted)
    return values


def _scalar(node: Any, keys: Keys, document: Document, quoted: bool) -> Any:
    """A scalar as YAML 1.1 reads it, except where nobody means that."""
    text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    if "\0" in text:
        document.report(keys, "a zero character cannot stand in a recipe")
        return text.replace("\0", "")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in {"yes", "true", "on"}
    if kind not in {"int", "float"}:
        return text  # dates too
    name = keys[-1] if keys and isinstance(keys[-1], str) else "value"
    loader = yaml.SafeLoader("")
    try:
        number = loader.construct_yaml_int(node) if kind == "int" else loader.construct_yaml_float(node)
    except (ValueError, OverflowError):
        document.report(keys, f"{name} {text[:20]}... is no number that can be read")
        return 0
    if ":" in text and quoted:
        return text
    if ":" in text:
        document.report(keys, f'YAML reads an unquoted {text} as the number {number}; write {name}: "{text}" in quotes')
        return text
    if kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", text):
        document.report(keys, f'YAML reads {text} as octal, {number}; leave the leading 0 out, or write "{text}"')
    if not math.isfinite(number):
        document.report(keys, f"{name} {text} is not a finite number")
        return 0.0
    return number
