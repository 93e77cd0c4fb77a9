"""Each plugin against its definition: plain loops, exhaustive search or an exact solver."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from brute import loss_of
from click.testing import CliRunner

import sparsekit as sk
from sparsekit.allocate import Measured
from sparsekit.checkpoint import StepStore
from sparsekit.cli import main
from sparsekit.errors import MethodError
from sparsekit.models.blocks import Call
from sparsekit.pattern import Pattern
from sparsekit.testing import Subject, training
from sparsekit.testing.specimens import training_job

PLUGINS = Path(__file__).parents[2] / "plugins"
CPU = torch.device("cpu")
HALF = Pattern.unstructured(0.5)


def method(file: str, name: str | None = None):
    sk.METHODS.load_path(PLUGINS / f"{file}.py")
    return sk.METHODS.get(name or file)


def layer(rows=12, columns=32, seed=0):
    return sk.LinearState("block.linear", torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def inputs(columns=32, tokens=128, seed=1, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator))
    return x * (1 + 3 * torch.rand(columns, generator=generator)) + shift * torch.randn(columns, generator=generator)


def statistic(kind, x):
    found = kind.empty(x.shape[1], CPU)
    found.update(x)
    return found


def kept_of(scores, pattern):
    """Columns of a row that stay; equal scores keep the lower index."""
    spans = [range(len(scores))]
    if pattern.structured:
        spans = [range(start, start + pattern.m) for start in range(0, len(scores), pattern.m)]
    kept = set()
    for span in spans:
        count = pattern.n if pattern.structured else len(span) - math.floor(pattern.sparsity * len(span))
        kept |= set(sorted(span, key=lambda j: (-scores[j], j))[:count])
    return kept


# RIA


@pytest.mark.parametrize("pattern", [Pattern(2, 4), HALF], ids=str)
def test_ria_by_definition(pattern):
    given, x = layer(), inputs()
    mask = method("ria").function(given, statistic(sk.InputNorm, x), pattern=pattern).mask
    weight = given.source.abs().double()
    norm = x.double().square().mean(0).sqrt()
    for i, row in enumerate(weight):
        score = [float((w / row.sum() + w / weight[:, j].sum()) * norm[j] ** 0.5) for j, w in enumerate(row)]
        assert set(mask[i].nonzero().flatten().tolist()) == kept_of(score, pattern)


def test_ria_keeps_a_weak_channel_that_wanda_empties():
    weight = torch.ones(8, 4) + 0.01 * torch.arange(8).unsqueeze(1)
    weight[:, 3] = 0.1  # the only weights of its channel: their relative importance in it is the others'
    weight[:, 2] = 0.2
    x = statistic(sk.InputNorm, torch.ones(4, 4))
    layer_ = sk.LinearState("layer", weight)
    assert not sk.METHODS.get("wanda").function(layer_, x, pattern=Pattern(2, 4)).mask[:, 2:].any()
    weight[0, 3] = 0.9  # the strongest of a weak channel
    assert method("ria").function(sk.LinearState("layer", weight), x, pattern=Pattern(2, 4)).mask[0, 3]


# DSnoT


def swapped_by_definition(weight, x, keep, pattern, cycles, threshold):
    mean, norm = x.mean(0), x.square().mean(0).sqrt()
    variance = x.square().mean(0) - mean.square()
    keep = keep.clone()
    for i, w in enumerate(weight):
        for _ in range(cycles):
            error = sum(float(w[j] * mean[j]) for j in range(len(w)) if not keep[i, j])
            if abs(error) <= threshold:
                break
            sign = math.copysign(1, error)
            best = None
            size = pattern.m if pattern.structured else len(w)
            for j in range(len(w)):
                start = j // size * size
                prunable = [k for k in range(start, start + size) if keep[i, k] and sign * float(w[k] * mean[k]) <= 0]
                gain = sign * float(w[j] * mean[j] / variance[j].clamp(min=1e-8))
                if not keep[i, j] and prunable and (best is None or gain > best[0]):
                    best = (gain, j, min(prunable, key=lambda k: float(w[k].abs() * norm[k])))
            if best is None:
                break
            _, j, k = best
            change = float(w[k] * mean[k] - w[j] * mean[j])
            if abs(error + change) >= abs(error):
                break
            keep[i, j], keep[i, k] = True, False
    return keep


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), HALF], ids=str)
def test_dsnot_by_definition(pattern):
    given, x = layer(), inputs(shift=3.0)
    found = method("dsnot")
    moments = statistic(found.stats, x)
    pruned = found.function(given, moments, pattern=pattern)
    wanda = sk.METHODS.get("wanda").function(given, statistic(sk.InputNorm, x), pattern=pattern)
    expected = swapped_by_definition(given.source.double(), x.double(), wanda.mask, pattern, 50, 0.1)
    assert torch.equal(pruned.mask, expected)
    assert not torch.equal(pruned.mask, wanda.mask)
    assert torch.equal(pruned.source, given.source)
    before, after = ((given.source.masked_fill(k, 0) @ x.mean(0)).abs() for k in (wanda.mask, pruned.mask))
    assert (after <= before + 1e-4).all()
    assert after.sum() < 0.5 * before.sum()
    assert pattern.violations(pruned.mask) == 0
    assert torch.equal(pruned.mask.sum(1), wanda.mask.sum(1))


def test_dsnot_starts_from_the_mask_that_is_there():
    found, x = method("dsnot"), inputs(shift=3.0)
    given = layer()
    start = Pattern(2, 4).keep(given.source.abs())
    moments = statistic(found.stats, x)
    pruned = found.function(given.masked(start), moments)
    expected = swapped_by_definition(given.source.double(), x.double(), start, Pattern(2, 4), 50, 0.1)
    assert torch.equal(pruned.mask, expected)


def test_moments_merge():
    kind, x = method("dsnot").stats, inputs()
    whole, first, second = statistic(kind, x), statistic(kind, x[:50]), statistic(kind, x[50:])
    first.merge(second)
    assert first.tokens == whole.tokens
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.variance, x.var(0, unbiased=False))


# conjugate gradients and ALPS


def exact(weight, keep, matrix):
    """The least-squares answer of every row over its kept weights."""
    result = torch.zeros_like(weight)
    for i, row in enumerate(keep):
        index = row.nonzero().flatten()
        result[i, index] = torch.linalg.solve(matrix[index][:, index], (weight[i] @ matrix)[index])
    return result


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_pcg_reaches_the_exact_answer_and_never_loses(pruner):
    found, x = method("alps", "pcg"), inputs(tokens=256)
    gram, given = statistic(sk.Gram, x), layer()
    needs = sk.METHODS.get(pruner)
    pruned = needs.function(given, gram if needs.stats is sk.Gram else statistic(sk.InputNorm, x))
    pruned = sk.LinearState(given.name, pruned.source, pruned.mask, dense=given.source)
    matrix = gram.matrix.double() + 1e-6 * gram.matrix.diagonal().mean() * torch.eye(32)
    best = loss_of(given.source.double(), exact(given.source.double(), pruned.mask, matrix), matrix)
    losses = [loss_of(given.source.double(), pruned.weight.double(), matrix)]
    for steps in (1, 2, 5, 10, 100):
        refined = found.function(pruned, gram, steps=steps)
        assert torch.equal(refined.mask, pruned.mask)
        assert not refined.weight[~pruned.mask].any()
        losses.append(loss_of(given.source.double(), refined.weight.double(), matrix))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(float(best), rel=1e-3)
    assert losses[-2] < 1.1 * best  # the ten steps of the paper
    assert losses[0] > 1.2 * best


def test_pcg_needs_a_pruned_layer():
    with pytest.raises(MethodError, match="put a pruner before it"):
        method("alps", "pcg").function(layer(), statistic(sk.Gram, inputs()))


def best_of_all(weight, matrix, pattern):
    """Least loss over every mask of a row, each with its exact values."""
    starts = range(0, len(weight), pattern.m)
    groups = [list(itertools.combinations(range(start, start + pattern.m), pattern.n)) for start in starts]
    least = math.inf
    for choice in itertools.product(*groups):
        keep = torch.zeros(1, len(weight), dtype=torch.bool)
        keep[0, [j for part in choice for j in part]] = True
        least = min(least, float(loss_of(weight[None], exact(weight[None], keep, matrix), matrix)))
    return least


def test_alps_is_near_the_best_mask_of_all_and_beats_sparsegpt():
    found = method("alps")
    ratios, rivals = [], []
    for seed in range(6):
        x, given = inputs(columns=12, tokens=200, seed=seed), layer(rows=4, columns=12, seed=seed)
        gram = statistic(sk.Gram, x)
        matrix = gram.matrix.double()
        least = sum(best_of_all(row, matrix, Pattern(2, 4)) for row in given.source.double())
        for results, state in (
            (ratios, found.function(given, gram)),
            (rivals, sk.METHODS.get("sparsegpt").function(given, gram)),
        ):
            results.append(float(loss_of(given.source.double(), state.weight.double(), matrix)) / least)
    assert min(ratios) >= 1 - 1e-4  # nothing is better than the best of all
    assert sum(ratios) / 6 < 1.15
    assert sum(rivals) > sum(ratios)


def test_alps_unstructured_has_the_sparsity_asked_for():
    pruned = method("alps").function(layer(), statistic(sk.Gram, inputs()), pattern=Pattern.unstructured(0.7))
    assert float((pruned.weight == 0).float().mean()) == pytest.approx(0.7, abs=0.005)


def test_alps_aimed_is_near_the_best_of_all_masks_for_the_dense_models_outputs():
    ratios = {"alps_aimed": [], "half": [], "alps": []}
    for seed in range(6):
        x, given = inputs(columns=12, tokens=200, seed=seed), layer(rows=4, columns=12, seed=seed)
        now = x @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(seed)))
        gram = sk.StreamGram.empty(12, CPU)
        gram.pair(x, now)
        outputs = x.double() @ given.source.double().t()
        free = torch.linalg.lstsq(now.double(), outputs).solution.t()
        rest = (outputs - now.double() @ free.t()).square().sum() / len(x)
        matrix = now.double().t() @ now.double() / len(x)
        least = float(rest) + sum(best_of_all(row, matrix, Pattern(2, 4)) for row in free)
        for name, share in (("alps_aimed", {"share": 1.0}), ("half", {"share": 0.5}), ("alps", {})):
            found = method("alps", "alps" if name == "alps" else "alps_aimed").function(given, gram, **share)
            lost = (outputs - now.double() @ found.weight.double().t()).square().sum() / len(x)
            ratios[name].append(float(lost) / least)
    full, half, none = (sum(found) / 6 for found in ratios.values())
    assert min(ratios["alps_aimed"]) >= 1 - 1e-4  # nothing is better than the best of all
    assert full < 1.2
    assert full < half < none


def test_what_the_stream_lacks_is_part_of_the_target():
    """Against the best of all masks for the outputs and what the stream lacks together."""
    ratios = {0.0: [], 1.0: []}
    for seed in range(4):
        x, given = inputs(columns=12, tokens=200, seed=seed), layer(rows=4, columns=12, seed=seed)
        random = torch.Generator().manual_seed(seed)
        now = x @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=random))
        lacking = now @ (0.3 * torch.randn(12, 4, generator=random)) + 0.1 * torch.randn(200, 4, generator=random)
        gram = sk.StreamGram.empty(12, CPU)
        gram.pair(x, now)
        gram.owe(lacking, now)
        goal = x.double() @ given.source.double().t() + lacking.double()
        free = torch.linalg.lstsq(now.double(), goal).solution.t()
        rest = (goal - now.double() @ free.t()).square().sum() / len(x)
        matrix = now.double().t() @ now.double() / len(x)
        least = float(rest) + sum(best_of_all(row, matrix, Pattern(2, 4)) for row in free)
        for owed, found in ratios.items():
            pruned = method("alps", "alps_aimed").function(given, gram, share=1.0, owed=owed).weight
            found.append(float((goal - now.double() @ pruned.double().t()).square().sum() / len(x)) / least)
    assert min(ratios[1.0]) >= 1 - 1e-4
    assert sum(ratios[1.0]) / 4 < 1.2 < sum(ratios[0.0]) / 4


# OWL


def test_owl_by_definition():
    layers, outliers = [], {}
    for block in range(3):
        given, x = layer(seed=block), inputs(seed=block)
        weight = given.source.clone()
        weight[:, : block + 1] *= 20
        layers.append(Measured(sk.LinearState(f"b{block}", weight), statistic(sk.InputNorm, x), block, 0))
        score = weight.abs() * x.square().mean(0).sqrt()
        outliers[block] = float((score > 5 * score.mean()).float().mean())
    shares = method("owl").function(iter(layers), 0.7, outlier=5.0, spread=0.08)
    low, high = min(outliers.values()), max(outliers.values())
    relief = [(outliers[b] - low) / (high - low) * 0.16 for b in range(3)]
    for block in range(3):
        assert shares[f"b{block}"] == pytest.approx(0.7 + sum(relief) / 3 - relief[block], abs=1e-6)
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)


RECIPE = """\
name: plugins
output: {output}
plugins: [{plugin}]
model: {{path: {model}}}
data:
  calibration: {{path: builtin:calibration, samples: 4, seq_len: 32}}
  evaluation: {{heldout: {{path: builtin:heldout, seq_len: 32, samples: 4}}}}
steps: [{steps}]
evaluate: {{perplexity: [heldout]}}
export: {{formats: []}}
"""
SPREAD = "{method: wanda, sparsity: 0.5, allocate: {method: owl, outlier: 2.0}}"


def run(tmp_path, model, plugin, steps, code=0):
    path = tmp_path / "recipe.yaml"
    plugin = PLUGINS / f"{plugin}.py"
    path.write_text(RECIPE.format(output=tmp_path / "run", plugin=plugin, model=model, steps=steps))
    result = CliRunner().invoke(main, ["run", str(path)])
    assert result.exit_code == code, result.output + str(result.exception)
    if code:
        return " ".join(result.output.split())
    return json.loads((tmp_path / "run" / "report.json").read_text())["steps"]


@pytest.mark.parametrize("pruner", ["wanda", "magnitude", "sparsegpt"])
def test_a_step_takes_its_sparsities_from_an_allocation(tmp_path, random_model, pruner):
    steps = SPREAD.replace("wanda", pruner)
    (step,) = run(tmp_path, random_model, "owl", steps)
    shares = step["allocation"]
    assert len(shares) == 14 and len(set(shares.values())) == 2  # two blocks
    for each in step["layers"]:
        assert each["sparsity"] == pytest.approx(shares[each["name"]], abs=0.02)
    assert step["sparsity"] == pytest.approx(0.5, abs=0.02)  # whole entries of 32-wide rows
    (plugin,) = step["plugins"]
    assert plugin["method"] == "owl" and plugin["origin"].endswith("plugins/owl.py") and len(plugin["sha256"]) == 64


def test_other_parameters_of_an_allocation_are_another_step(tmp_path, random_model):
    (first,) = run(tmp_path, random_model, "owl", SPREAD)
    (second,) = run(tmp_path, random_model, "owl", SPREAD.replace("2.0", "2.0, spread: 0.2"))
    assert first["allocation"] != second["allocation"]
    assert len(list((tmp_path / "run" / "steps").iterdir())) == 2


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ('{method: wanda, pattern: "2:4", allocate: owl}', "allocate needs sparsity: 0.5 instead"),
        ("{method: owl}", "owl prunes nothing itself; name it in a pruning step"),
        ("{method: wanda, sparsity: 0.5, allocate: wanda}", "it does not allot sparsity"),
        ("{method: wanda, sparsity: 0.5, allocate: {method: owl, spraed: 0.1}}", "spraed"),
        ("{method: rtn, group_size: 16, allocate: owl}", "allocate"),
    ],
)
def test_mistakes_about_allocations_are_named(tmp_path, random_model, steps, said):
    assert said in run(tmp_path, random_model, "owl", steps, code=2)


def test_pcg_repairs_towards_the_dense_weights_after_a_pruner_that_updates(tmp_path, random_model):
    steps = run(tmp_path, random_model, "alps", '{method: sparsegpt, pattern: "2:4"}, {method: pcg}')
    pruned, repaired = steps
    assert repaired["violations"] == 0 and repaired["groups"] == pruned["groups"]
    assert repaired["perplexity"]["heldout"] != pruned["perplexity"]["heldout"]


def test_pcg_alone_is_refused_by_layer_name(tmp_path, random_model):
    assert "model.layers.0" in run(tmp_path, random_model, "alps", "{method: pcg}", code=2)


# channel permutation


def partitions(columns, size):
    """Every way to split columns into groups."""
    if not columns:
        yield []
        return
    first, *rest = columns
    for others in itertools.combinations(rest, size - 1):
        left = [c for c in rest if c not in others]
        for tail in partitions(left, size):
            yield [[first, *others], *tail]


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4)], ids=str)
def test_the_order_of_channels_is_near_the_best_of_all(pattern):
    arranged = method("permute").function.__globals__["arranged"]
    won = possible = 0.0
    for seed in range(10):
        score = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).abs() ** 2
        score *= 1 + 3 * torch.arange(8).flip(0).div(4, rounding_mode="floor")  # strong channels side by side
        order, before, after = arranged(score, pattern, 10)
        keep = pattern.keep(score[:, order])
        assert float(score[:, order][keep].sum()) == pytest.approx(after, rel=1e-6)
        assert sorted(order.tolist()) == list(range(8))
        best = max(
            sum(float(score[:, group].topk(pattern.n, dim=1).values.sum()) for group in groups)
            for groups in partitions(list(range(8)), 4)
        )
        assert before <= after <= best * (1 + 1e-6)
        won, possible = won + after - before, possible + best - before
    assert won > 0.7 * possible


def trained_steps(output, model, plugins, steps, samples=8):
    """What the report of a run says of its steps, which may read a training text."""
    train = f"  train: {{{{path: builtin:train, seq_len: 32, samples: {samples}}}}}\n  evaluation:"
    files = ", ".join(str(PLUGINS / f"{name}.py") for name in plugins)
    path = output.with_suffix(".yaml")
    text = RECIPE.replace("  evaluation:", train)
    path.write_text(text.format(output=output, plugin=files, model=model, steps=steps))
    result = CliRunner().invoke(main, ["run", str(path)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads((output / "report.json").read_text())["steps"]


def test_permuting_changes_nothing_but_what_a_pattern_keeps(tmp_path, random_model):
    steps = '{method: permute}, {method: ria, pattern: "2:4"}, {method: pcg}'
    plain = '{method: ria, pattern: "2:4"}'
    kept = {
        name: trained_steps(tmp_path / name, random_model, ("permute", "ria", "alps"), chosen)
        for name, chosen in (("permuted", steps), ("plain", plain))
    }
    first = kept["permuted"][0]
    before, after = (first[key]["heldout"]["perplexity"] for key in ("before", "perplexity"))
    assert after == pytest.approx(before, rel=1e-4)
    assert first["training"]["permuted"] == 2  # the down projections of two blocks
    assert first["training"]["kept_score_gain"] > 0.01
    down = [each["name"].endswith(("down_proj", "gate_proj", "up_proj")) for each in first["layers"]]
    assert [bool(each["notes"]) for each in first["layers"]] == down

    def error(steps, index):
        return {each["name"]: each["error"] for each in steps[index]["layers"]}

    permuted, plain_error = error(kept["permuted"], 1), error(kept["plain"], 0)
    for name in plain_error:
        if name.endswith("down_proj"):
            assert permuted[name] < plain_error[name]
    assert kept["permuted"][2]["violations"] == 0  # and the dense reference of pcg is the permuted one
    assert max(each["error"] for each in kept["permuted"][2]["layers"]) < 1


def test_after_training_the_dense_reference_is_what_training_left(tmp_path, random_model):
    steps = '{method: ast, pattern: "2:4", tokens: 256, batch: 2, micro_batch: 2}, {method: pcg}'
    _, repaired = trained_steps(tmp_path / "run", random_model, ("alps",), steps)
    assert max(each["error"] for each in repaired["layers"]) < 1e-9  # nothing to repair: it is its own reference
    assert repaired["violations"] == 0 and repaired["groups"] > 0


class Adding(torch.nn.Module):
    """A block that is one linear: what it is trained to has an exact answer."""

    def __init__(self, inputs):
        super().__init__()
        self.linear = torch.nn.Linear(inputs, inputs, bias=False)

    def forward(self, x):
        return (x + self.linear(x),)  # as a block that returns more than hidden states


def test_block_wise_training_comes_to_the_least_squares_answer():
    torch.manual_seed(0)
    functions = method("ebft").function.__globals__
    block, inputs = Adding(8), torch.randn(16, 6, 8)
    target = inputs + inputs @ torch.randn(8, 8).t() * 0.3
    mask = Pattern(2, 4).keep(torch.rand(8, 8))
    block.linear.weight.data *= mask
    given = block.linear.weight.detach().clone()
    calls = {8: Call((), {})}
    order = functions["batches"](16, 8, 400, seed=0)
    trained, (before, after) = functions["fitted"](block, {"linear": mask}, inputs, target, order, calls, 0.03)
    x, y = inputs.flatten(0, 1).double(), (target - inputs).flatten(0, 1).double()
    for row in range(8):
        chosen = mask[row]
        exact = torch.linalg.lstsq(x[:, chosen], y[:, [row]]).solution.flatten()
        torch.testing.assert_close(trained["linear"][row, chosen].double(), exact, atol=2e-3, rtol=0)
    assert torch.equal(block.linear.weight, given)
    best = (x @ torch.where(mask, trained["linear"], 0.0).double().t() - y).square().mean() / y.square().mean()
    assert after == pytest.approx(float(best), rel=0.05) and after < before


def test_every_epoch_has_all_windows_and_rates_end_at_a_tenth():
    functions = method("ebft").function.__globals__
    order = functions["batches"](10, 4, 3, seed=1)
    assert [len(part) for part in order] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(torch.cat(order[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(10))
    rates = [functions["Schedule"](100, 4, lr=1.0).lr_at(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_block_wise_training_keeps_the_contract():
    training(Subject(method("ebft"), {"windows": 3, "batch": 2, "epochs": 2}))


def test_block_wise_training_has_no_other_teacher():
    with training_job() as job, pytest.raises(MethodError, match="leave `teacher` out"):
        method("ebft").function(replace(job, another_teacher=True))


def test_block_wise_training_keeps_masks_and_what_was_left_out(tmp_path, random_model):
    ignored = '{method: wanda, pattern: "2:4"}, {method: ebft, batch: 4, ignore: ["*.down_proj", "model.layers.0.*"]}'
    _, tuned = trained_steps(tmp_path / "run", random_model, ("ebft",), ignored, samples=10)
    assert tuned["violations"] == 0 and tuned["groups"] > 0
    assert tuned["training"]["block_error"] < tuned["training"]["block_error_before"]
    stores = [StepStore(directory, torch.float32) for directory in sorted((tmp_path / "run/steps").iterdir())]
    for index in range(2):
        before, after = (store.block(index).linears for store in stores)
        for name, state in before.items():
            assert torch.equal(state.mask, after[name].mask)
            assert torch.equal(state.weight, after[name].weight) == (name.endswith("down_proj") or index == 0)
