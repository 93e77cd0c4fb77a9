"""A plugin in a distribution of its own, installed into a fresh environment."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import textwrap
import venv
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "plugins" / "sparsekit-erk"
JOB = """
import sys
import pytest
from click.testing import CliRunner
from sparsekit.cli import main

for arguments in (["methods"], ["check", "erk"], ["run", sys.argv[1]]):
    result = CliRunner().invoke(main, arguments)
    print(result.output)
    assert result.exit_code == 0, result.exception
assert pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]]) == 0
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Python of a new environment that sees the packages of this one, with the distribution installed."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place / "venv", with_pip=False)
    python = place / "venv" / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    # addsitedir, and not a plain path: sparsekit itself may be an editable install, which is a .pth file too
    lines = [f"import site; site.addsitedir({directory!r})" for directory in site.getsitepackages()]
    (own / "parent.pth").write_text("\n".join(lines) + "\n")
    source = shutil.copytree(PACKAGE, place / "source")  # the build leaves files beside the sources
    command = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", source]
    subprocess.run([python, *command], check=True)
    return python


def recipe(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        textwrap.dedent(f"""\
        name: erk
        output: {tmp_path / "run"}
        model: {{path: {model}}}
        steps: [{{method: magnitude, sparsity: 0.6, allocate: erk}}]
        export: {{formats: []}}
        """)
    )
    return path


@pytest.mark.slow
def test_an_installed_distribution_is_found_used_and_recorded(environment, tmp_path, random_model):
    job = [environment, "-c", JOB, recipe(tmp_path, random_model), environment.parents[2] / "source" / "tests"]
    done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "erk" in done.stdout and "allocation" in done.stdout and "3 passed" in done.stdout
    (step,) = json.loads((tmp_path / "run" / "report.json").read_text())["steps"]
    (plugin,) = step["plugins"]
    assert plugin["method"] == "erk"
    assert "sparsekit_erk" in plugin["origin"] and len(plugin["sha256"]) == 64
    assert len(set(step["allocation"].values())) > 1
    assert plugin["sha256"] in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_the_switch_starts_without_plugins(environment, tmp_path, random_model):
    command = [environment, "-m", "sparsekit", "run", recipe(tmp_path, random_model)]
    switch = {**os.environ, "SPARSEKIT_NO_PLUGINS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=switch, cwd=tmp_path)
    assert done.returncode == 2
    assert "no method 'erk'" in done.stderr
