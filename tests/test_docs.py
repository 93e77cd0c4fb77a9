"""The docs: generated parts are fresh, links lead somewhere, every example runs."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import children
import pytest
import yaml
from click.testing import CliRunner

from sparsekit.cli import main
from sparsekit.evaluation.measures import EVALUATORS
from sparsekit.formats import FORMATS
from sparsekit.recipe import read_recipe
from sparsekit.registry import METHODS
from sparsekit.reporting.sections import SECTIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "plugins").glob("*.md"))]
COMMENT, FENCE = r"(?:^<!-- test: (?P<test>[^\n]*) -->\n)?", r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$"
BLOCK = re.compile(COMMENT + FENCE, re.M | re.S)
FRAGMENT = """\
name: fragment
plugins: [{plugins}]
model: {{path: builtin:tiny}}
data:
  calibration: {{path: builtin:calibration, samples: 4, seq_len: 64}}
  train: {{path: builtin:train, seq_len: 64}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 64}}}}
evaluate: {{perplexity: [heldout]}}
export: {{formats: [dense]}}
"""


@dataclass(frozen=True)
class Example:
    """A block of a page, and what its comment says about testing it."""

    language: str
    code: str
    how: str
    rest: str


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples(path: Path) -> Iterator[Example]:
    for match in BLOCK.finditer(path.read_text()):
        if match["language"] != "text":
            how, _, rest = (match["test"] or "").partition(" ")
            yield Example(match["language"], match["code"], how.rstrip(","), rest)


def with_examples() -> list[Path]:
    return [path for path in PAGES if any(each.how != "skip" for each in examples(path))]


def test_generated_parts_are_fresh(tmp_path, monkeypatch):
    """In a process of its own: other tests register methods and formats, which the pages would list."""
    files = [str(path) for path in PAGES if "[[[cog" in path.read_text()]
    assert len(files) > 10
    prologue = ["-I", "scripts", "-p", "import cog, figures, generated, headlines"]
    monkeypatch.chdir(ROOT)
    process = children.started(children.module, "cogapp", "--check", *prologue, *files, log=tmp_path / "log")
    output = children.ended(process, tmp_path / "log")
    assert process.exitcode == 0, f"make docs-write brings these up to date:\n{output}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = path if not file else (path.parent / file)
        assert found.exists(), f"{target} in {path.name}"
        if anchor:
            assert anchor in anchors(found), f"{target} in {path.name}"


def anchors(path: Path) -> set[str]:
    found = set(re.findall(r"\{#([\w-]+)\}", path.read_text()))
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return found | {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation():
    text = (ROOT / "zensical.toml").read_text()
    for path in sorted((ROOT / "docs").rglob("*.md")):
        assert f'"{path.relative_to(ROOT / "docs")}"' in text, f"add {path.name} to nav in zensical.toml"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_is_not_run_says_why(path):
    for example in examples(path):
        assert example.how in ("", "skip", "set", "file", "fragment"), example
        if example.how == "skip":
            assert len(example.rest) > 5, example


@pytest.mark.parametrize("path", with_examples(), ids=name_of)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_methods", {m.name: m for m in METHODS if m.built_in})
    monkeypatch.setattr(FORMATS, "_things", {f.name: f for f in FORMATS.values() if f.origin.built_in})
    monkeypatch.setattr(EVALUATORS, "_things", {})
    monkeypatch.setattr(SECTIONS, "_things", {})
    monkeypatch.setattr(METHODS, "_loaded", {name for name in METHODS._loaded if name.startswith("sparsekit.methods.")})
    for folder in ("recipes", "plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for example in examples(path):
        if example.how != "skip":
            {"python": run_python, "bash": run_bash, "yaml": read_yaml}[example.language](example, tmp_path)


def run_python(example: Example, place: Path) -> None:
    if example.how == "file":
        (place / example.rest).write_text(example.code)
    else:
        exec(compile(example.code, "example", "exec"), {"__name__": "__main__"})


def run_bash(example: Example, place: Path) -> None:
    """Every `sparsekit` command of the block, with smaller settings; nothing else is allowed but installing."""
    overrides = [word for setting in example.rest.split() for word in ("--set", setting)]
    for line in example.code.splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if not words or "pip" in words[0] or words[1:3] == ["-m", "venv"]:
                continue
            assert Path(words[0]).name == "sparsekit", f"do not know how to test {command!r}"
            result = CliRunner().invoke(main, words[1:] + overrides)
            assert result.exit_code == 0, f"{command}\n{result.output}"


def read_yaml(example: Example, place: Path) -> None:
    if example.how == "file":
        (place / example.rest).write_text(example.code)
        return
    plugins = ", ".join(f if (place / f).exists() else f"plugins/{f}" for f in example.rest.split())
    values = yaml.safe_load(FRAGMENT.format(plugins=plugins)) | yaml.safe_load(example.code)
    file = place / "fragment.yaml"
    file.write_text(yaml.safe_dump(values))
    read_recipe(file)
