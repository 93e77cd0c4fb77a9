"""Whole runs with the model on a second device: calibration, training, proofs and exports keep tensors together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import THERE, elsewhere
from torch.utils._python_dispatch import _disable_current_modes

from sparsekit.blockwise import activations
from sparsekit.evaluation import scoring
from sparsekit.listener import Silent
from sparsekit.models import view
from sparsekit.recipe import read_recipe
from sparsekit.run import Run
from sparsekit.training import schedule

PLUGINS = Path(__file__).parents[1] / "plugins"
RUNS = {  # steps, formats, memory mode
    "one-shot": (
        '{method: sparsegpt, pattern: "2:4", schedule: group}, {method: gptq, group_size: 16, schedule: group},'
        ' {method: lowrank, rank: 4, group_size: 16, owed: 0.25, schedule: group, targets: ["*.o_proj"]}',
        "gptq, sparsekit-24-compact",
        "auto",
    ),
    "aimed": (
        '{method: alps_aimed, pattern: "2:4", iterations: 5, owed: 0.25, schedule: group}, {method: pcg},'
        " {method: ebft, epochs: 1, batch: 4}",
        "",
        "auto",
    ),
    "allocated": ("{method: wanda, sparsity: 0.5, allocate: {method: owl, outlier: 2.0}}", "", "auto"),
    "permuted": (
        '{method: permute}, {method: ria, pattern: "2:4"}, {method: dsnot, pattern: "2:4"},'
        " {method: rtn, group_size: 16}",
        "compressed-tensors",
        "auto",
    ),
    "low": ("{method: awq, group_size: 16}", "awq", "low"),
    "balanced": ('{method: sparsegpt, pattern: "2:4", bits: 4, group_size: 16}', "sparsekit-24", "balanced"),
    "trained": (
        '{method: ast, pattern: "2:4", tokens: 512, batch: 4, micro_batch: 2, slorb: 16, bits: 4, group_size: 16}',
        "sparsekit-24-compact",
        "auto",
    ),
}


@pytest.fixture
def second_device(monkeypatch):
    """A model is opened there, with what is chosen by a device's type as on CUDA where it is about correctness."""
    skeleton = view.skeleton

    def skeleton_of_here(*given):  # its parameters are on the true `meta`
        with _disable_current_modes():
            return skeleton(*given)

    for tokens in (activations.MICRO_BATCH_TOKENS, scoring.EVALUATION_TOKENS, schedule.MICRO_BATCH_TOKENS):
        monkeypatch.setitem(tokens, THERE.type, 64)
    monkeypatch.setattr(activations, "QUICK", (THERE.type,))
    monkeypatch.setattr(view, "device_of", lambda *given: THERE)
    monkeypatch.setattr(view, "skeleton", skeleton_of_here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *given: "elsewhere")


@pytest.mark.parametrize(("steps", "formats", "memory"), RUNS.values(), ids=RUNS)
def test_a_run_keeps_its_tensors_together(steps, formats, memory, tmp_path, random_model, second_device):
    if "permute" in steps:
        pytest.importorskip("scipy")
    plugins = ", ".join(str(PLUGINS / f"{name}.py") for name in ("alps", "dsnot", "ebft", "owl", "permute", "ria"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: elsewhere\noutput: {tmp_path / 'run'}\nplugins: [{plugins}]\n"
        f"model: {{path: {random_model}, memory: {memory}}}\n"
        "data:\n"
        "  calibration: {path: builtin:calibration, samples: 4, seq_len: 32}\n"
        "  train: {path: builtin:train, samples: 8, seq_len: 32}\n"
        "  evaluation: {heldout: {path: builtin:heldout, seq_len: 32, samples: 4}}\n"
        f"steps: [{steps}]\n"
        f"evaluate: {{perplexity: [heldout], agreement: [heldout]}}\nexport: {{formats: [{formats}]}}\n"
    )
    with elsewhere():
        report = Run.open(read_recipe(recipe), Silent()).execute()
    assert report["environment"]["device"] == "elsewhere"
    assert all(step["violations"] == 0 for step in report["steps"])
    assert [export["format"] for export in report["exports"]] == [name for name in formats.split(", ") if name]
