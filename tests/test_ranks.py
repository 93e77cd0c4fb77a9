"""A recipe that says `gpus: 2`: the training step on two processes, here on the CPU; errors by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_run import AST, GPTQ, write

from sparsekit.checkpoint import StepStore
from sparsekit.cli import main
from sparsekit.errors import MethodError, RecipeError
from sparsekit.training.ranks import Place, _event, _listened, _same_error, check_devices

TWO = AST.replace("}\n", ", gpus: 2}\n")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    return result.exit_code, result.output + str(result.exception)


def test_a_step_on_two_processes_is_the_step_on_one(tmp_path, random_model):
    code, output = run(write(tmp_path, random_model, AST + GPTQ, "one"))
    assert code == 0, output
    code, output = run(write(tmp_path, random_model, TWO + GPTQ, "two"))
    assert code == 0, output
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    one, two = (report["steps"][0] for report in reports)
    assert one["fingerprint"] == two["fingerprint"]
    assert two["violations"] == 0
    assert two["training"]["steps"] == one["training"]["steps"]
    assert two["peak_memory"] > 0
    assert [line["step"] for line in two["curve"]] == [line["step"] for line in one["curve"]]
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    differing = count = 0
    for name in ("one", "two"):
        assert not list((tmp_path / name / "steps").rglob("ranks*.json"))
    (first,), (second,) = ((tmp_path / name / "steps").glob("1-ast-*") for name in ("one", "two"))
    for index in range(2):
        a, b = (StepStore(step, torch.float32).block(index) for step in (first, second))
        assert a is not None
        assert b is not None
        for name, state in a.linears.items():
            differing += int((state.mask ^ b.linears[name].mask).sum())
            count += state.mask.numel()
    assert differing < 1e-3 * count


def test_events_reach_the_listener_and_the_first_error_is_kept():
    lines = [{"progress": [1, 2]}, {"noted": "valid 3"}, "W1124 a warning", {"error": {"type": "MethodError"}}]
    code = f"import json\nfor x in {lines!r}: print(x if isinstance(x, str) else json.dumps(x))\n"
    heard: list[object] = []

    class Ear:
        def progress(self, done: int, total: int) -> None:
            heard.append((done, total))

        def noted(self, text: str) -> None:
            heard.append(text)

    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    error, other = _listened(process, Ear())
    process.communicate()
    assert heard == [(1, 2), "valid 3"]
    assert error == {"type": "MethodError"}
    assert other == ["W1124 a warning\n"]


def test_devices_are_counted_before_anything_starts(monkeypatch):
    place = Place(Path("r.yaml"), "r.yaml:7", Path("."), "", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2, place)
    with pytest.raises(RecipeError, match=r"r.yaml:7: gpus: 4, and this machine has 2"):
        check_devices(4, place)
    with pytest.raises(RecipeError, match="write device: cuda, not cuda:1"):
        check_devices(2, Place(Path("r.yaml"), "r.yaml:7", Path("."), "", torch.device("cuda:1")))


def test_events_are_told_from_other_output():
    assert _event('{"progress": [1, 2]}\n') == {"progress": [1, 2]}
    assert _event("W1124 some warning\n") is None
    assert _event('{"other": 1}') is None
    assert _event("12") is None
    error = _same_error({"type": "MethodError", "message": "no"})
    assert type(error) is MethodError
    assert str(error) == "no"
