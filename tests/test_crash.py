"""Runs that are killed, stopped, starved of disk or handed damaged files: nothing is lost and nothing is silent."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import children
import pytest
import torch
from click.testing import CliRunner
from crash import RECIPE, weights

from sparsekit.cli import main
from sparsekit.files import RunLock

ROOT = Path(__file__).parents[1]
SHORT = RECIPE.replace("tokens: 2048", "tokens: 512").replace("samples: 64", "samples: 32")  # four steps


@pytest.mark.slow
def test_killed_at_four_random_moments(tmp_path):
    out = tmp_path / "crash.json"
    log, harness = tmp_path / "log", str(ROOT / "scripts" / "crash_harness.py")
    process = children.started(children.script, harness, "--moments", "4", "--out", str(out), log=log)
    output = children.ended(process, log)
    assert process.exitcode == 0, output
    assert json.loads(out.read_text())["random"]["identical"] == 4


def run(recipe: Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(random_model, tmp_path_factory) -> Path:
    """A directory with a recipe and the finished run of it."""
    directory = tmp_path_factory.mktemp("finished")
    recipe = directory / "crash.yaml"
    recipe.write_text(SHORT.format(model=random_model) + f"output: {directory / 'run'}\n")
    code, output = run(recipe)
    assert code == 0, output
    return directory


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of the finished run, to be damaged; its report is gone, so that a repetition shows."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    recipe = tmp_path / "crash.yaml"
    recipe.write_text((finished / "crash.yaml").read_text().replace(str(finished), str(tmp_path)))
    return tmp_path


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) - 5 if path.suffix == ".safetensors" else len(data) // 2
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "flipped": data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :],
        "foreign": b"[1, 2, 3]",
        "keyless": b"{}",
    }
    path.write_bytes(damaged[how])


FILES = [
    ("steps/1-*/block-0001.safetensors", ("truncated", "empty", "flipped")),
    ("steps/1-*/rest.safetensors", ("truncated", "flipped")),
    ("steps/1-*/DONE", ("truncated", "empty", "foreign", "keyless")),
    ("steps/1-*/train.jsonl", ("truncated", "foreign")),
    ("steps/2-*/block-0000.safetensors", ("truncated", "flipped")),
    ("steps/2-*/block-0000.json", ("truncated", "empty", "foreign", "keyless")),
    ("steps/2-*/perplexity.json", ("truncated", "empty", "foreign", "keyless")),
    ("dense/perplexity.json", ("truncated", "foreign")),
    ("tokens/*.safetensors", ("truncated", "flipped")),
]


@pytest.mark.parametrize(("pattern", "how"), [(pattern, how) for pattern, hows in FILES for how in hows])
def test_damaged_files_are_found_and_redone(finished, again, pattern, how):
    for victim in (again / "run").glob(pattern):
        damage(victim, how)
    if pattern.startswith("tokens"):  # what reads them is to be done again
        for step in (again / "run" / "steps").iterdir():
            shutil.rmtree(step)
    elif "train.jsonl" in pattern or "block-0000.json" in pattern:
        next((again / "run").glob(pattern)).with_name("DONE").unlink()
    code, output = run(again / "crash.yaml")
    assert code == 0, output
    assert weights(again / "run") == weights(finished / "run")


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "keyless", "foreign"])
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_damaged_training_checkpoints_are_not_used(finished, again, how, ending):
    step = next((again / "run" / "steps").glob("1-*"))
    checkpoint = list((step / "checkpoint").glob(f"*.{ending}"))
    assert checkpoint
    for path in step.iterdir():
        if path.is_file():
            path.unlink()
    for path in checkpoint:
        damage(path, how)
    code, output = run(again / "crash.yaml")
    assert code == 0, output
    assert weights(again / "run") == weights(finished / "run")


def test_sigterm_stops_with_a_message_and_the_run_goes_on_later(finished, again):
    for path in (again / "run" / "steps").iterdir():
        shutil.rmtree(path)
    log = again / "log"
    process = children.started(children.command, "run", str(again / "crash.yaml"), log=log)
    while not list((again / "run" / "steps").glob("1-ast-*/checkpoint/*")):
        assert process.is_alive(), children.said(log)
        time.sleep(0.005)
    process.terminate()
    output = children.ended(process, log)
    assert process.exitcode == 143
    assert "run the same command to continue" in output
    assert "Traceback" not in output
    code, output = run(again / "crash.yaml")
    assert code == 0, output
    assert weights(again / "run") == weights(finished / "run")


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(finished, again):
    for path in (again / "run" / "steps").iterdir():
        shutil.rmtree(path)
    log, work = again / "log", children.command_with_small_files
    process = children.started(work, 300_000, "run", str(again / "crash.yaml"), log=log)
    output = children.ended(process, log)
    assert process.exitcode == 2, output
    assert re.search(r"error: cannot write .*File too large", output)
    assert "Traceback" not in output
    assert not [path for path in (again / "run").rglob(".*") if path.name != ".lock"]
    code, output = run(again / "crash.yaml")
    assert code == 0, output
    assert weights(again / "run") == weights(finished / "run")


@pytest.fixture
def tiny_disk(tmp_path) -> Path:
    """A file system of 1 MB, where mounting is allowed."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here; the limit on file sizes is tested instead")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_small_file_system_is_full_by_name(tiny_disk, again):
    recipe = again / "crash.yaml"
    recipe.write_text(recipe.read_text().replace(f"output: {again / 'run'}", f"output: {tiny_disk / 'run'}"))
    code, output = run(recipe)
    assert code == 2, output
    assert "No space left on device" in output
    assert not [path for path in tiny_disk.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("place", ["file", "/proc/1"])
def test_a_place_that_cannot_be_written_is_named_before_any_work(again, place):
    (again / "file").write_text("")
    recipe = again / "crash.yaml"
    recipe.write_text(re.sub(r"output: .*", f"output: {again / place / 'run'}", recipe.read_text()))
    code, output = run(recipe)
    assert code == 2
    assert f"cannot write {again / place / 'run'}" in output


def test_the_second_process_on_a_directory_is_refused_and_changes_nothing(again):
    before = {path: path.stat().st_mtime_ns for path in (again / "run").rglob("*") if path.is_file()}
    with RunLock(again / "run"):
        process = children.started(children.command, "run", str(again / "crash.yaml"), log=again / "log")
        output = children.ended(process, again / "log")
    assert process.exitcode == 2
    assert f"{again / 'run'} is in use by another sparsekit process" in output
    assert before == {path: path.stat().st_mtime_ns for path in (again / "run").rglob("*") if path.is_file()}


def test_limits_of_this_process_are_as_they_were():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert torch.get_num_threads() == 1
