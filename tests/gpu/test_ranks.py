"""A training step on two GPUs through NCCL: the losses of one GPU, with compiled blocks and without."""

import json

import pytest
import torch
from click.testing import CliRunner

from sparsekit.cli import main

pytestmark = pytest.mark.gpu

RECIPE = """\
name: {name}
output: {output}
model: {{path: builtin:tiny, device: cuda, compute_dtype: float32}}
data:
  train: {{path: builtin:train, seq_len: 256}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 256, samples: 16}}}}
steps:
  - {{method: ast, pattern: "2:4", tokens: 160K, batch: 16, micro_batch: 8, lr: 5.0e-4, mask_every: 4{options}}}
evaluate: {{perplexity: [heldout]}}
export: {{formats: []}}
"""


def report_of(tmp_path, name, options):
    path = tmp_path / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, output=tmp_path / name, options=options))
    result = CliRunner().invoke(main, ["run", str(path)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads((tmp_path / name / "report.json").read_text())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", ["", ", compile: true", ", slorb: 16", ", checkpointing: true, compile: true"])
def test_two_gpus_train_like_one(tmp_path, options):
    one, two = (report_of(tmp_path, f"on{gpus}", f"{options}, gpus: {gpus}") for gpus in (1, 2))
    for a, b in zip(one["steps"][0]["curve"], two["steps"][0]["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    assert two["steps"][0]["violations"] == 0
    scores = [report["final"]["heldout"]["perplexity"] for report in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=5e-3)
