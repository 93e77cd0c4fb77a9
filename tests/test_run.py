"""The whole way: recipe in, run directory out; killed, damaged and repeated runs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import children
import pytest
import torch
from click.testing import CliRunner

from sparsekit.cli import main

RECIPE = """\
name: chain
seed: 0
output: {output}
model: {{path: {model}}}
data:
  calibration: {{path: builtin:calibration, samples: 8, seq_len: 32}}
  train: {{path: builtin:train, seq_len: 32, samples: 32}}
  evaluation:
    heldout: {{path: builtin:heldout, seq_len: 32, samples: 16}}
steps:
{steps}
evaluate: {{perplexity: [heldout]}}
export: {{formats: [{formats}]}}
"""
AST = '  - {method: ast, pattern: "2:4", tokens: 1024, batch: 4, micro_batch: 2, mask_every: 2, checkpoint_every: 2}\n'
SPARSEGPT = '  - {method: sparsegpt, pattern: "2:4"}\n'
GPTQ = "  - {method: gptq, bits: 4, group_size: 16}\n"


def write(tmp_path: Path, model: Path, steps: str, name: str = "run", formats: str = "dense, gptq") -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(RECIPE.format(output=tmp_path / name, model=model, steps=steps, formats=formats))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def weights(directory: Path) -> dict[str, bytes]:
    """Content of every tensor file of the steps and exports."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*.safetensors"))
        if "checkpoint" not in path.parts
    }


def test_chained_run_keeps_the_pattern_and_reports_it(tmp_path, random_model):
    output = run(write(tmp_path, random_model, AST + GPTQ))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [step["method"] for step in report["steps"]] == ["ast", "gptq"]
    for step in report["steps"]:
        assert step["violations"] == 0
        assert step["groups"] > 0
        assert step["sparsity"] >= 0.5
        assert step["perplexity"]["heldout"]["perplexity"] > 1
    assert report["steps"][1]["bits"] == [4]
    assert "groups broken" in output
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "recipe.yaml").exists()


def test_exports_load_and_hold_the_evaluated_weights(tmp_path, random_model):
    from transformers import AutoModelForCausalLM

    run(write(tmp_path, random_model, SPARSEGPT + GPTQ))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "dense", dtype=torch.float32)
    for name, parameter in dense.named_parameters():
        if name.endswith("proj.weight"):
            groups = (parameter != 0).reshape(parameter.shape[0], -1, 4).sum(-1)
            assert int(groups.max()) <= 2
    config = json.loads((tmp_path / "run" / "export" / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4


def test_second_run_repeats_nothing_and_changes_nothing(tmp_path, random_model):
    recipe = write(tmp_path, random_model, SPARSEGPT + GPTQ)
    run(recipe)
    before = weights(tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "steps").rglob("*.safetensors")}
    output = run(recipe)
    assert output.count("done before") == 2
    assert weights(tmp_path / "run") == before
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "steps").rglob("*.safetensors")}


def test_changed_parameter_redoes_only_what_depends_on_it(tmp_path, random_model):
    recipe = write(tmp_path, random_model, SPARSEGPT + GPTQ)
    run(recipe)
    output = run(recipe, "--set", "steps.1.bits=3")
    assert output.count("done before") == 1
    assert "int3" in output


def test_damaged_step_is_redone_to_the_same_bits(tmp_path, random_model):
    recipe = write(tmp_path, random_model, SPARSEGPT + GPTQ)
    run(recipe)
    before = weights(tmp_path / "run")
    (victim,) = (tmp_path / "run" / "steps").glob("1-*/block-0001.safetensors")
    with open(victim, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xxx")
    run(recipe)
    assert weights(tmp_path / "run") == before


@pytest.mark.parametrize("moment", ["ast", "gptq"])
def test_killed_run_continues_to_the_same_bits(tmp_path, random_model, moment):
    whole = write(tmp_path, random_model, AST + GPTQ, "whole")
    run(whole)
    recipe = write(tmp_path, random_model, AST + GPTQ, "killed")
    process = children.started(children.command, "run", str(recipe), log=tmp_path / "log")
    steps = tmp_path / "killed" / "steps"
    waited_for = {"ast": "1-ast-*/checkpoint/*", "gptq": "2-gptq-*/block-0000.json"}[moment]
    deadline = time.monotonic() + 120
    while not list(steps.glob(waited_for)):
        assert process.is_alive(), children.said(tmp_path / "log")
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "report.json").exists()
    run(recipe)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_interrupt_exits_130_with_a_plain_message(tmp_path, random_model):
    recipe, log = write(tmp_path, random_model, AST + GPTQ), tmp_path / "log"
    process = children.started(children.command, "run", str(recipe), log=log)
    while not list((tmp_path / "run" / "steps").glob("1-ast-*/checkpoint/*")):
        assert process.is_alive(), children.said(log)
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    output = children.ended(process, log)
    assert process.exitcode == 130
    assert "run the same command to continue" in output
    assert "Traceback" not in output


def test_gptq_after_wanda_repairs_from_the_dense_weights(tmp_path, random_model):
    chained = '  - {method: wanda, pattern: "2:4"}\n' + GPTQ
    run(write(tmp_path, random_model, chained, "wanda"))
    rounded = '  - {method: wanda, pattern: "2:4"}\n  - {method: rtn, group_size: 16}\n'
    run(write(tmp_path, random_model, rounded, "rtn"))
    from sparsekit.checkpoint import StepStore

    (step,) = (tmp_path / "wanda" / "steps").glob("1-wanda-*")
    block = StepStore(step, torch.float32).block(0)
    assert block is not None
    state = next(iter(block.linears.values()))
    assert state.mask is not None
    assert bool((state.source[~state.mask] != 0).any())  # the dense values travelled with the mask


@pytest.mark.parametrize(
    ("pruner", "quantizer"),
    [(p, q) for p in ("magnitude", "wanda", "sparsegpt") for q in ("rtn", "gptq", "awq")],
)
def test_every_pair_keeps_every_group(tmp_path, random_model, pruner, quantizer):
    steps = f'  - {{method: {pruner}, pattern: "2:4"}}\n  - {{method: {quantizer}, bits: 4, group_size: 16}}\n'
    run(write(tmp_path, random_model, steps, formats=""))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [step["violations"] for step in report["steps"]] == [0, 0]
    assert report["steps"][1]["sparsity"] >= 0.5


def test_gate_exits_3_and_keeps_the_results(tmp_path, random_model):
    recipe = write(tmp_path, random_model, GPTQ)
    text = recipe.read_text().replace("[heldout]}", "[heldout], gates: {max_ppl_increase: 0.0}}")
    recipe.write_text(text.replace("bits: 4", "bits: 2"))
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code in (0, 3)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (result.exit_code == 3) == (report["gates"][0]["increase"] > 0)


def test_coverage_and_selection_errors(tmp_path, random_model):
    recipe = write(tmp_path, random_model, "  - {method: gptq, group_size: 48}\n")
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 2
    assert "group_size 48 does not divide" in result.output
    assert f"{recipe}:" in result.output
    recipe = write(tmp_path, random_model, '  - {method: wanda, pattern: "2:4", ignore: [lm_haed]}\n', formats="dense")
    result = CliRunner().invoke(main, ["run", str(recipe)])
    assert result.exit_code == 2
    assert "'lm_haed' matches none" in result.output
    assert not (tmp_path / "run").exists()
