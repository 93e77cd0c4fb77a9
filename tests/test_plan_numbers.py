"""Predicted memory against what torch held, sizes against the model, the commands."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from allocations import peak_of_torch
from click.testing import CliRunner

from sparsekit.checkpoint import StepStore
from sparsekit.cli import main
from sparsekit.errors import DataError
from sparsekit.evaluation.evaluate import perplexity
from sparsekit.listener import Silent
from sparsekit.models.chain import Chain
from sparsekit.models.shapes import BlockSizes, ModelSizes, sizes_of
from sparsekit.models.view import ModelView
from sparsekit.planning.disk_model import checkpoint_bytes
from sparsekit.planning.disk_time import Files, file_seconds
from sparsekit.planning.estimate import Estimator, _overlapped
from sparsekit.planning.fates import kinds_of
from sparsekit.planning.memory_model import Moment, Part, peak, scoring_moments, walk_moments
from sparsekit.planning.microbench import Bench, _extrapolated
from sparsekit.planning.reading import SAMPLE, tokens_of
from sparsekit.planning.training_memory import branch_parameters, training_moments
from sparsekit.recipe import Recipe, read_recipe
from sparsekit.run import Run
from sparsekit.stats import Gram, InputNorm

ASSETS = Path(__file__).parents[1] / "sparsekit" / "assets"
RECIPE = """\
name: plan
output: {output}
model: {{path: {model}}}
data:
  calibration: {{path: builtin:calibration, samples: {samples}, seq_len: {seq_len}}}
  train: {{path: builtin:train, samples: 16, seq_len: 128}}
  evaluation: {{heldout: {{path: builtin:heldout, samples: 4, seq_len: 128}}}}
steps: [{step}]
evaluate: {{perplexity: [heldout]}}
"""
PROCESS = ("Python and its libraries", "embeddings, head, final norm")  # held before the step begins


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Times are measured once, and with little on the disk: these tests look at no time that depends on it."""
    monkeypatch.setattr("sparsekit.planning.microbench.SLOW", 0.0)
    monkeypatch.setattr("sparsekit.planning.disk_time.DISK", 2**20)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """One block of 128 × 384, wide enough for tensors to outweigh what is not modelled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, directory / name)
    return directory


def recipe(tmp_path: Path, model: Path, step: str, samples: int = 16, seq_len: int = 128) -> Recipe:
    path = tmp_path / "plan.yaml"
    text = RECIPE.format(output=tmp_path / "run", model=model, step=step, samples=samples, seq_len=seq_len)
    path.write_text(text)
    return read_recipe(path)


def predicted(part: dict, held: tuple[str, ...] = PROCESS) -> int:
    """Bytes of a part of the plan beyond what is there before it begins."""
    return sum(piece["bytes"] for piece in part["device"]["parts"] if piece["name"] not in held)


@pytest.mark.parametrize(
    "step",
    [
        '{method: wanda, pattern: "2:4"}',
        "{method: gptq, bits: 4, group_size: 64}",
        "{method: sparsegpt, bits: 4, group_size: 64}",
        '{method: ast, pattern: "2:4", tokens: 1024, batch: 8, micro_batch: 4}',
        '{method: ast, pattern: "2:4", tokens: 1024, batch: 8, micro_batch: 4, slorb: 16}',
    ],
    ids=["wanda", "gptq", "sparsegpt with bits", "ast", "slorb"],
)
def test_peak_memory_is_within_a_fifth(tmp_path, wide_model, step):
    read = recipe(tmp_path, wide_model, step, samples=1 if "gpt" in step else 16, seq_len=64)
    told = Estimator.open(read).all()
    run = Run.open(read, Silent())
    (planned,) = run.plan.steps
    with peak_of_torch() as found:
        run.work.apply(planned, Chain(run.view), StepStore(tmp_path / "store", run.view.dtype))
    assert predicted(told["steps"][0]) == pytest.approx(found.bytes, rel=0.2)


def test_scoring_memory_is_within_a_fifth(tmp_path, wide_model):
    read = recipe(tmp_path, wide_model, "{method: rtn, group_size: 64}")
    told = Estimator.open(read).all()["scoring"]
    run = Run.open(read, Silent())
    windows = run.windows(read.data.evaluation["heldout"])
    with Chain(run.view).forward() as forward, peak_of_torch() as found:
        perplexity(forward, windows, batch=32, progress=lambda done, total: None)
    assert predicted(told, (*PROCESS, "the whole model")) == pytest.approx(found.bytes, rel=0.2)


def base_on_cuda() -> ModelSizes:
    """The sizes of models/base of the benchmarks, in bfloat16 on CUDA."""
    kinds = {"q": (512, 512), "k": (256, 512), "v": (256, 512), "o": (512, 512)}
    kinds |= {"gate": (1408, 512), "up": (1408, 512), "down": (512, 1408)}
    groups = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    blocks = [
        BlockSizes({f"{i}.{k}": shape for k, shape in kinds.items()}, [[f"{i}.{k}" for k in g] for g in groups], 1024)
        for i in range(7)
    ]
    return ModelSizes(blocks, outside=8192 * 512 + 512, width=512, vocabulary=8192, stored=2, computed=2, cuda=True)


@pytest.mark.parametrize(
    ("method", "kind", "measured"),  # bytes torch.cuda.max_memory_allocated told on an H100, 128 windows of 1024
    [
        ("wanda", InputNorm, 428045824),
        ("gptq", Gram, 571978240),
        ("sparsegpt", Gram, 571694592),
        ("awq", Gram, 543514112),
    ],
)
def test_what_an_h100_allocated_is_predicted(method, kind, measured):
    told = walk_moments(
        base_on_cuda(), method, kind, samples=128, seq_len=1024, on_device=True, in_order=False, grouped=method == "awq"
    )
    assert peak(told).bytes == pytest.approx(measured, rel=0.1)  # blocks travel in threads since then


def test_scoring_on_an_h100_is_predicted():
    assert peak(scoring_moments(base_on_cuda(), 64, 1024, agreement=True)).bytes == pytest.approx(1377337344, rel=0.05)


AST = {
    "masters": "float32", "states": "float32", "checkpointing": False, "batch": 64,
    "slorb": None, "slorb_projection": "trained",
}  # fmt: skip


def test_ranks_share_models_and_states():
    sizes = base_on_cuda()
    alone = peak(training_moments(sizes, AST, 1024, 8))
    shared = peak(training_moments(sizes, AST, 1024, 8, ranks=4))
    for name in ("student", "teacher", "dense weights", "moments", "mask and first mask", "gradients"):
        (one,), (part,) = ([p.bytes for p in moment.parts if p.name == name] for moment in (alone, shared))
        assert part == pytest.approx(one / 4, abs=1)
    assert shared.bytes < alone.bytes
    few = {**AST, "batch": 4}
    titles = {moment.name: moment.bytes for moment in training_moments(sizes, few, 16, 1, ranks=4)}
    assert titles["models whole before they are cut"] > 4 * sizes.numel


def test_branches_are_counted():
    sizes = base_on_cuda()
    summed = branch_parameters(sizes, {**AST, "slorb": 16, "slorb_projection": "sum"})
    assert summed == sum(out * into // 16 for block in sizes.blocks for out, into in block.linears.values())
    trained = branch_parameters(sizes, {**AST, "slorb": 16})
    assert trained - summed == sum(into * into // 16 for block in sizes.blocks for _, into in block.linears.values())
    assert branch_parameters(sizes, AST) == 0


class Clocked(Bench):
    """A bench that believes to be on CUDA."""

    def _wait(self) -> None:
        pass


def test_compilation_is_start_up_and_not_the_time_of_a_layer():
    bench = Clocked(SimpleNamespace(device=torch.device("cuda")), None)
    deadline, waits = bench.deadline, iter([0.2])
    steady = bench.timed(lambda: time.sleep(next(waits, 0.002)))
    assert steady < 0.05
    assert 0.15 < bench.startup < 0.5
    assert bench.deadline - deadline == pytest.approx(bench.startup)


def test_a_repair_after_a_pruner_is_timed_on_a_pruned_layer(tmp_path, random_model):
    read = recipe(
        tmp_path, random_model, '{method: magnitude, pattern: "2:4"}, {method: gptq, bits: 4, group_size: 16}'
    )
    estimator = Estimator.open(read)
    _, planned = estimator.plan.steps
    name = next(iter(estimator.sizes.blocks[0].linears))
    made = estimator.bench._made_up(planned, name, (8, 16))
    assert made.mask is not None
    assert planned.patterns[name].violations(made.weight) == 0


def test_sizes_are_those_of_the_model(random_model):
    view = ModelView.open(random_model, device="cpu", empty=True)
    assert all(parameter.is_meta for parameter in view.module.parameters())
    sizes = sizes_of(view)
    assert sizes.numel == sum(row.numel for row in view.ledger())
    assert [len(group) for group in sizes.blocks[1].groups] == [3, 1, 2, 1]
    assert sizes.blocks[1].groups[0][0].startswith("model.layers.1.")
    assert sizes.blocks[0].inputs() == [64, 64, 64, 128]
    assert sizes.outside == 8192 * 64 + 64


def test_formulas(random_model):
    sizes = sizes_of(ModelView.open(random_model, device="cpu", empty=True))
    moments = walk_moments(sizes, "gptq", Gram, samples=4, seq_len=32, on_device=True, in_order=False)
    factoring = [moment for moment in moments if moment.name == "factoring"]
    assert max(part.bytes for moment in factoring for part in moment.parts if "float64" in part.name) == 12 * 128 * 128
    statistics = {part.bytes for moment in moments for part in moment.parts if part.name == "statistics"}
    assert statistics == {sum(4 * n * n + 4 * n for n in (64, 64, 64, 128))}
    plain = walk_moments(sizes, "wanda", InputNorm, samples=4, seq_len=32, on_device=False, in_order=False)
    assert not any(part.name.startswith("hidden states of all") for moment in plain for part in moment.parts)
    parts = [Part("a", "", 3), Part("b", "", 4)]
    assert peak([Moment("small", parts[:1]), Moment("large", parts)]).bytes == 7


def test_plan_and_dry_run_show_the_same_and_write_nothing(tmp_path, random_model):
    path = tmp_path / "plan.yaml"
    step = '{method: sparsegpt, pattern: "2:4", ignore: ["*.down_proj"]}'
    recipe(tmp_path, random_model, step, samples=2, seq_len=32)
    shown = CliRunner().invoke(main, ["plan", str(path)])
    dry = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert shown.exit_code == dry.exit_code == 0, shown.output + dry.output
    for output in (shown.output, dry.output):
        assert "sparsegpt 2:4" in output
        assert "left as it is" in output
        assert "peak memory" in output
    assert not (tmp_path / "run").exists()
    found = CliRunner().invoke(main, ["plan", str(path), "--json"])
    data = json.loads(found.output)
    fates = {kind["kind"]: kind["steps"] for kind in kinds_of(data["layers"])}
    assert fates["mlp.down_proj"] == ()
    assert fates["mlp.up_proj"] == ("sparsegpt 2:4",)
    assert data["seconds"] > 0
    assert data["disk"] > 0
    masks, tokenizer = data["coverage"]["total"] // 8, (random_model / "tokenizer.json").stat().st_size
    assert 4 * data["coverage"]["total"] + tokenizer < data["exports"]["dense"]
    assert data["exports"]["dense"] < 4 * data["coverage"]["total"] + tokenizer + masks


@pytest.mark.parametrize(("every", "seconds", "kept"), [(None, 10.0, False), (None, 300.0, True), (5, 10.0, True)])
def test_a_short_training_run_keeps_no_checkpoint(tmp_path, random_model, every, seconds, kept):
    option = "" if every is None else f", checkpoint_every: {every}"
    read = recipe(tmp_path, random_model, f'{{method: ast, pattern: "2:4", tokens: 1024, batch: 8{option}}}')
    run = Run.open(read, Silent())
    assert (checkpoint_bytes(sizes_of(run.view), run.plan.steps[0], seconds) > 0) is kept


def test_reading_a_text_is_in_the_time_once(tmp_path, random_model, monkeypatch):
    text = tmp_path / "long.txt"
    text.write_text("Once upon a time there was a plan.\n" * 20_000)  # 700,000 characters
    changed = ("builtin:heldout", str(text)), ("builtin:train", str(text)), ("builtin:calibration", str(text))
    read = recipe(tmp_path, random_model, "{method: gptq, group_size: 16}", samples=2, seq_len=32)
    path = tmp_path / "plan.yaml"
    for old, new in changed:
        path.write_text(path.read_text().replace(old, new))
    read = read_recipe(path)
    monkeypatch.setattr("sparsekit.planning.reading.time.perf_counter", iter(range(100)).__next__)
    estimator = Estimator.open(read)
    asked = 64 * 4 * 128  # tokens that the longer of two entries is drawn from
    assert tokens_of(read.data.evaluation["heldout"], read.resolve) == 175_000
    assert estimator._reading() == pytest.approx(4 * asked / SAMPLE)  # the second that encoding the sample took
    monkeypatch.undo()
    found = CliRunner().invoke(main, ["plan", str(path), "--json"])
    told = json.loads(found.output)
    assert 0 < told["reading"] < told["seconds"]


def test_a_missing_text_is_named(tmp_path, random_model):
    read = recipe(tmp_path, random_model, "{method: rtn, group_size: 16}")
    changed = read.data.calibration.model_copy(update={"path": "nowhere.txt"})
    broken = read.model_copy(update={"data": read.data.model_copy(update={"calibration": changed})})
    broken._document = read._document
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        Estimator.open(broken)


def test_what_does_not_fit_the_budget_is_extrapolated(random_model, tmp_path):
    assert _extrapolated([(1.0, 1.0)], 4.0) == pytest.approx(4.0)
    assert _extrapolated([(1.0, 1.0), (4.0, 2.0)], 16.0) == pytest.approx(4.0)  # a square root
    view = ModelView.open(random_model, device="cpu", empty=True)
    sizes = sizes_of(view)
    read = recipe(tmp_path, random_model, "{method: gptq, bits: 4, group_size: 16}")
    planned = Estimator.open(read).plan.steps[0]
    bench = Bench(view, sizes, deadline=0.0)
    found = bench.method_seconds(planned, sizes.blocks[0])
    assert set(found) == set(sizes.blocks[0].linears)
    assert all(seconds > 0 for seconds in found.values())
    assert bench.notes


@pytest.mark.parametrize("refusing", ["os.fsync", "tempfile.mkdtemp"])
def test_a_full_disk_is_no_reason_not_to_plan(tmp_path, random_model, monkeypatch, refusing):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    estimator = Estimator.open(recipe(tmp_path, random_model, "{method: rtn, group_size: 16}"))
    monkeypatch.setattr(refusing, full)
    told = estimator.all()
    assert told["steps"][0]["disk"] > 0
    (note,) = (note for note in told["notes"] if "No space left" in note)
    assert note.startswith("the time of files is not in it: ")
    assert [place.name for place in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scoring_takes_the_time_to_hold_each_model_that_is_compared(tmp_path, random_model, dtype):
    read = recipe(tmp_path, random_model, "{method: rtn, group_size: 16}")
    path = tmp_path / "plan.yaml"
    path.write_text(path.read_text().replace(f"{random_model}", f"{random_model}, dtype: {dtype}"))
    estimator = Estimator.open(read_recipe(path))
    files = file_seconds(estimator.bench, tmp_path)
    assert min(files.holding[0], files.constant) > 0
    blocks = len(estimator.sizes.blocks)
    assert files.held(blocks, 0) == pytest.approx(blocks * files.holding[0])
    slow = Files(constant=0.0, written=0.0, read=0.0, holding=(100.0, 0.0))
    for agreement, models in ((False, 1), (True, 2)):
        evaluate = read.evaluate.model_copy(update={"agreement": ["heldout"] if agreement else False})
        estimator.recipe = read.model_copy(update={"evaluate": evaluate})
        found = estimator._scoring(0.0, slow)
        assert found["seconds"] == pytest.approx(models * blocks * 100.0, rel=0.1)


def test_files_are_read_and_written_while_another_block_is_worked_on():
    files = Files(constant=0.0, written=3e-9, read=1e-9)  # 3 s and 1 s
    assert _overlapped(8.0, files, 4, 10**9) == pytest.approx(9.0)  # the first is read and the last written alone
    assert _overlapped(1.0, files, 4, 10**9) == pytest.approx(3.0)  # a thread reads while another one writes
    assert _overlapped(0.0, Files(constant=1.0, written=0.0, read=0.0), 4, 10**9) == pytest.approx(4.0)


def test_what_nobody_knows_of_a_plugin_is_not_told_as_nothing(tmp_path, random_model):
    path, plugin = tmp_path / "plan.yaml", Path(__file__).parents[1] / "plugins/ebft.py"
    steps = '{method: magnitude, pattern: "2:4"}, {method: ebft}'
    told = RECIPE.format(output=tmp_path / "run", model=random_model, samples=2, seq_len=32, step=steps)
    path.write_text(f"plugins: [{plugin}]\n{told}")
    shown = CliRunner().invoke(main, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    table = {line.split()[1]: line for line in shown.output.splitlines() if re.match(r" +(\d|in all)", line)}
    assert table["ebft"].split()[2:4] == ["not", "known"] and table["ebft"].count("not known") == 2
    assert table["all"].count("≥") == 2 and "not known" not in table["magnitude"]
    assert "ebft is largest" not in shown.output
