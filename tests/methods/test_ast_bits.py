"""AST with bits: masks and integer grids trained together."""

import json

import pytest
import torch
from test_ast import SETTING, make_job
from test_ast_options import Killed, killed_at
from test_run import AST, run, write

from sparsekit.errors import RecipeError
from sparsekit.methods.ast import ast
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.quant import Grid, store_scale
from sparsekit.recipe import read_recipe
from sparsekit.training.grids import bits_per_weight, first_step, fitted, learn_, on_grid, rounding_of
from sparsekit.training.optim import Rule, SparseAdamW, Step
from sparsekit.verify import verified

SEARCHED = 5
SHORT = AST.replace("tokens: 1024", "tokens: 256")  # two steps, and a choice of masks and grids after the second
TWO_OF_FOUR, DENSE = Pattern(2, 4), Pattern.unstructured(0.0)
INT4 = {**SETTING, "bits": 4, "group_size": 8}
ODD2 = {**SETTING, "bits": 2, "levels": "odd", "group_size": 8}
SIX = {**SETTING, "bits": 3, "levels": "six", "group_size": 8}
TERNARY = {**SETTING, "bits": 2, "levels": "ternary", "group_size": 8}
ARMS = {
    "int4": INT4,
    "int3 a row": {**INT4, "bits": 3, "group_size": -1},
    "odd 2": ODD2,
    "fitted": {**ODD2, "scales": "fitted"},
    "signs": {**ODD2, "bits": 1},
    "six": SIX,
    "ternary": TERNARY,
    "late": {**INT4, "quantize_from": 0.5},
    "at the end": {**INT4, "quantize_from": 1.0},
    "in the freeze": {**INT4, "quantize_from": 0.9},
    "lean": {**ODD2, "states": "float8", "masters": "bfloat16"},
    "branch": {**INT4, "slorb": 16},
    "fixed": {**INT4, "freeze": 1.0, "decay": 0.0},
}


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """Steps are searched for at every choice of the mask, which takes longer than the rest of these runs."""
    monkeypatch.setattr("sparsekit.quant.MSE_STEPS", SEARCHED)


def same(a, b):
    for name, state in a.linears.items():
        assert state.quantized.equal(b.linears[name].quantized), name
        assert torch.equal(state.mask, b.linears[name].mask), name
    for name in a.params:
        assert torch.equal(a.params[name], b.params[name]), name


@pytest.mark.parametrize("setting", ARMS.values(), ids=ARMS.keys())
def test_the_integers_are_what_the_student_computes_with(tmp_path, setting):
    job = make_job(tmp_path)
    trained = ast(job, **{**setting, "tokens": 12 * 64})
    modules = dict(job.student.named_modules())
    odd = setting.get("levels") in ("odd", "six")
    for name, state in trained.linears.items():
        assert torch.equal(state.quantized.dequantize(), modules[name].weight), name
        assert torch.equal(state.weight, modules[name].weight)
        record = verified(job.linears[name], state, kind="train", pattern=TWO_OF_FOUR, integers=True)
        assert record.violations == 0
        assert record.bits == setting["bits"] + odd
        level = state.quantized.codes.int() - 2 ** (record.bits - 1)
        assert not level[~state.mask].any()
        if odd:
            assert torch.equal(level % 2 == 1, state.mask)
            assert level.abs().max() == (5 if setting["levels"] == "six" else 2 ** setting["bits"] - 1)


def test_every_matmul_sees_the_grid_from_its_step_on(tmp_path):
    job, seen = make_job(tmp_path), []
    name = next(iter(job.linears))

    def look(module, arguments):
        if module.training or torch.is_grad_enabled():
            seen.append(max(len(row.unique()) for row in module.weight.detach()))

    dict(job.student.named_modules())[name].register_forward_pre_hook(look)
    ast(job, **{**ODD2, "group_size": -1, "quantize_from": 0.5})
    calls = len(seen) // 24
    assert min(seen[: 12 * calls]) > 5
    assert max(seen[12 * calls :]) <= 5  # ±1, ±3 and 0


def test_dense_weights_on_a_grid_have_no_mask(tmp_path):
    job = make_job(tmp_path)
    trained = ast(job, pattern=DENSE, **ODD2)
    for state in trained.linears.values():
        assert state.mask is None
        assert (state.quantized.codes % 2 == 1).all()
    assert trained.metrics["initial_flip_rate"] == 0
    assert trained.metrics["bits_per_weight"] == 2 + 16 / 8


@pytest.mark.parametrize(
    ("setting", "codes", "bits"), [(TERNARY, [1, 2, 3], 8 / 5), (SIX, [3, 5, 7, 9, 11, 13], 8 / 3)]
)
def test_dense_weights_have_all_levels_and_no_other(tmp_path, setting, codes, bits):
    trained = ast(make_job(tmp_path), pattern=DENSE, **setting)
    for state in trained.linears.values():
        assert state.mask is None
        assert state.quantized.codes.unique().tolist() == codes
    assert trained.metrics["bits_per_weight"] == pytest.approx(bits + 16 / 8)


def test_a_mask_from_before_stays_without_a_pattern(tmp_path):
    job = make_job(tmp_path)
    masks = {name: TWO_OF_FOUR.keep(torch.rand_like(state.source)) for name, state in job.linears.items()}
    job.linears.update({name: state.masked(masks[name]) for name, state in job.linears.items()})
    trained = ast(job, pattern=DENSE, **INT4)
    for name, state in trained.linears.items():
        assert torch.equal(state.mask, masks[name])


@pytest.mark.parametrize("arm", ["odd 2", "late", "fitted", "lean"])
def test_killed_training_continues_to_the_same_bits(tmp_path, arm):
    setting = {**ARMS[arm], "checkpoint_every": 5}
    whole = ast(make_job(tmp_path / "whole"), **setting)
    for step in (7, 16, 23) if arm == "late" else (16,):  # before the grids, between two masks, in the freeze
        job = make_job(tmp_path / f"killed-{step}")
        object.__setattr__(job, "progress", killed_at(step))
        with pytest.raises(Killed):
            ast(job, **setting)
        again = ast(make_job(tmp_path / f"killed-{step}"), **setting)
        same(whole, again)


def brute(weight, levels):
    """The least Σ |error|^2.4 of a group over the scales that the search tries, by hand."""
    best = None
    high = float(weight.abs().max())
    for i in range(80):
        step = torch.tensor(high * (1 - i / 100) / max(levels)).half().float()
        values = torch.tensor([level * float(step) for level in levels])
        error = (weight[:, None] - values).abs().min(1).values.pow(2.4).sum()
        if best is None or error < best[0]:
            best = float(error), float(step)
    return best


@pytest.mark.parametrize(
    ("bits", "kind", "levels"),
    [
        (1, "odd", [-1, 1]),
        (2, "odd", [-3, -1, 1, 3]),
        (3, "odd", [-7, -5, -3, -1, 1, 3, 5, 7]),
        (3, "six", [-5, -3, -1, 1, 3, 5]),
        (2, "ternary", [-1, 0, 1]),
    ],
)
def test_steps_are_the_best_of_all_that_are_tried(bits, kind, levels, monkeypatch):
    monkeypatch.setattr("sparsekit.quant.MSE_STEPS", 80)
    torch.manual_seed(bits)
    weight = torch.randn(6, 32)
    mask = torch.ones(6, 32, dtype=torch.bool) if kind == "ternary" else TWO_OF_FOUR.keep(weight.abs())
    rounding = rounding_of(bits, 16, kind)
    step = fitted(weight, mask, rounding, 16)
    rounded = on_grid(weight, mask, step, rounding)
    for row in range(6):
        for group in range(2):
            part = slice(16 * group, 16 * group + 16)
            kept = mask[row, part]
            error, expected = brute(weight[row, part][kept], levels)
            found = (rounded[row, part] - weight[row, part])[kept].abs().pow(2.4).sum()
            assert found == pytest.approx(error, rel=1e-4)
            assert float(step[row, group]) == pytest.approx(expected, rel=2e-3)
            values = torch.tensor(levels) * step[row, group]
            nearest = (weight[row, part][kept][:, None] - values).abs().min(1).values
            assert torch.allclose((rounded[row, part] - weight[row, part])[kept].abs(), nearest, atol=1e-6)


def test_kept_zeros_and_empty_groups_have_levels():
    rounding = rounding_of(2, 8, "odd")
    weight, mask = torch.zeros(2, 16), torch.ones(2, 16, dtype=torch.bool)
    weight[0, 3], mask[1] = 0.5, False
    step = fitted(weight, mask, rounding, 8)
    rounded = on_grid(weight, mask, step, rounding)
    assert torch.isfinite(rounded).all()
    assert not rounded[1].any()
    assert (rounded[0].abs() > 0).all()
    assert torch.equal(step, step.half().float())


def test_gradients_go_straight_through():
    torch.manual_seed(0)
    nets = [torch.nn.Linear(16, 4, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    mask = {"weight": TWO_OF_FOUR.keep(nets[0].weight.detach().abs())}
    plain, gridded = (
        SparseAdamW(net, mask, TWO_OF_FOUR, Rule(rounding=rounding))
        for net, rounding in zip(nets, (None, rounding_of(2, 8, "odd")), strict=True)
    )
    gridded.regrid()
    assert not torch.equal(nets[0].weight, nets[1].weight)
    for net in nets:
        net.weight.grad = torch.ones_like(net.weight)
    for optimizer in (plain, gridded):
        optimizer.advance(Step(1, lr=1e-2))
    states = [optimizer.state[net.weight] for optimizer, net in zip((plain, gridded), nets, strict=True)]
    assert torch.equal(states[0]["dense"], states[1]["dense"])


def test_steps_stay_between_choices_of_the_mask():
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 4, bias=False)
    mask = {"weight": TWO_OF_FOUR.keep(net.weight.detach().abs())}
    optimizer = SparseAdamW(net, mask, TWO_OF_FOUR, Rule(rounding=rounding_of(4, 8, "integer")))
    optimizer.regrid()
    first = optimizer.step("weight").clone()
    for number, refresh in ((1, False), (2, False), (3, True)):
        net.weight.grad = torch.randn_like(net.weight)
        optimizer.advance(Step(number, lr=1e-2, refresh=refresh))
        assert torch.equal(optimizer.step("weight"), first) is not refresh
        state = optimizer.state[net.weight]
        assert torch.equal(net.weight, on_grid(state["dense"], state["mask"], state["step"], optimizer.rule.rounding))
    kept = state["dense"].masked_fill(~state["mask"], 0.0).reshape(4, 2, 8)
    assert torch.equal(state["step"], Grid.fit(kept, 4).scale)


@pytest.mark.parametrize(
    ("bits", "levels"), [(4, "integer"), (3, "integer"), (2, "odd"), (1, "odd"), (3, "six"), (2, "ternary")]
)
def test_a_learned_step_gets_autograds_gradient(bits, levels):
    torch.manual_seed(0)
    rounding = rounding_of(bits, 8, levels)
    weight, grad = torch.randn(4, 16), torch.randn(4, 16)
    mask = TWO_OF_FOUR.keep(weight.abs())
    first = fitted(weight, mask, rounding, 8) * 0.4  # so that some are beyond the range
    state = {"dense": weight, "mask": mask, **first_step(store_scale(first), learned=True)}
    step = state["step"].clone().requires_grad_()
    top = 2 ** (rounding.bits - 1)
    lowest, highest = {"integer": (-top, top - 1), "six": (-5, 5)}.get(levels, (1 - top, top - 1))
    half = 1.0 if levels in ("odd", "six") else 0.5
    value = (weight.reshape(4, 2, 8) / step.unsqueeze(2)).clamp(lowest - half, highest + half)
    level = (on_grid(weight, mask, step.detach(), rounding).reshape(4, 2, 8) / step.detach().unsqueeze(2)).round()
    beyond = value.detach() != weight.reshape(4, 2, 8) / step.detach().unsqueeze(2)
    assert beyond.any()
    straight = torch.where(beyond, level, value + (level - value).detach())  # LSQ: rounding has the slope 1
    (straight * step.unsqueeze(2) * mask.reshape(4, 2, 8) * grad.reshape(4, 2, 8)).sum().backward()
    learn_(state, grad, rounding, (0.9, 0.95), 1e-8, 1e-2, 1)
    torch.testing.assert_close(state["step_avg"], 0.1 * step.grad, rtol=1e-4, atol=1e-5)
    moved = step.detach() * (1 - 1e-2 * step.grad.sign())  # Adam's first move
    torch.testing.assert_close(state["step_dense"], moved, rtol=1e-4, atol=0)
    assert torch.equal(state["step"], store_scale(state["step_dense"]))


def test_learned_steps_lower_the_error_of_what_is_on_the_grid():
    torch.manual_seed(0)
    net = torch.nn.Linear(32, 8, bias=False)
    wanted = net.weight.detach().clone()
    mask = {"weight": TWO_OF_FOUR.keep(wanted.abs())}
    optimizer = SparseAdamW(net, mask, TWO_OF_FOUR, Rule(rounding=rounding_of(4, 8, "integer"), learned=True))
    optimizer.state[net.weight]["step"].mul_(3)
    optimizer.state[net.weight]["step_dense"].mul_(3)
    optimizer.compute_with(masked=True, rounded=True)
    errors = []
    for number in range(1, 200):
        net.weight.grad = (net.weight.detach() - wanted) * mask["weight"]
        errors.append(float(net.weight.grad.square().sum()))
        optimizer.state[net.weight]["dense"].copy_(wanted)  # only the steps move
        optimizer.advance(Step(number, lr=1e-2))
    assert errors[-1] < 0.8 * errors[0]


def test_bits_of_a_weight():
    assert bits_per_weight(rounding_of(4, 128, "integer"), TWO_OF_FOUR, 128) == 3 + 1 / 8
    assert bits_per_weight(rounding_of(2, 128, "odd"), TWO_OF_FOUR, 128) == 2 + 1 / 8
    assert bits_per_weight(rounding_of(2, 128, "odd"), DENSE, 128) == 2 + 1 / 8
    assert bits_per_weight(rounding_of(3, 128, "six"), TWO_OF_FOUR, 128) == 2 + 1 / 8
    assert bits_per_weight(rounding_of(3, 128, "six"), Pattern(4, 8), 128) == pytest.approx((8 / 3 + 3) / 2 + 1 / 8)
    assert bits_per_weight(rounding_of(3, 128, "six"), DENSE, 128) == pytest.approx(8 / 3 + 1 / 8)
    assert bits_per_weight(rounding_of(2, 128, "ternary"), DENSE, 128) == 1.6 + 1 / 8
    assert bits_per_weight(rounding_of(4, 64, "integer"), Pattern(4, 8), 64) == 3.5 + 1 / 4


REFUSED = {
    "levels: odd": "levels belongs to the grid, and without bits there is none",
    "scales: fitted": "scales belongs to the grid",
    "quantize_from: 0.5": "quantize_from belongs to the grid",
    "group_size: 16": "group_size belongs to the grid",
    "bits: 1": "1 bit has the levels -1 and 0",
    "bits: 8, levels: odd": "up to 7 bits",
    "bits: 3, levels: ternary": "codes of 2 bits; write bits: 2 in place of 3",
    "levels: ternary": "levels belongs to the grid.*add bits: 2, or drop levels",
    "bits: 4, levels: six": "levels: six are ±1, ±3 and ±5, which take log2 6 = 2.6 bits; write bits: 3 in place of 4",
    "levels: six": "levels belongs to the grid.*add bits: 3, or drop levels",
    "bits: 3, levels: sixx": "sixx",
    "bits: 4, forward: dense": "forward: dense computes with pruned weights",
    "bits: 4, weight_scaling: 2": "weight_scaling multiplies rows",
    "bits: 9": "bits",
    "sparsity: 0": "ast without bits trains N:M patterns",
    "bits: 4, sparsity: 0.5": "ast trains N:M patterns",
}


def recipe_of(tmp_path, steps, formats="[]"):
    path = tmp_path / "r.yaml"
    text = "name: t\nmodel: {path: builtin:tiny}\ndata:\n  train: {path: builtin:train}\n"
    text += "  calibration: {path: builtin:calibration, samples: 2}\n"
    path.write_text(f"{text}steps:\n{steps}\nexport: {{formats: {formats}}}\n")
    return path


@pytest.mark.parametrize(("keys", "message"), REFUSED.items())
def test_contradictions_are_told(tmp_path, keys, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe_of(tmp_path, f"  - {{method: ast, tokens: 33K, {keys}}}"))


def test_a_step_with_bits_is_the_quantizer(tmp_path):
    joint, plain = "  - {method: ast, tokens: 33K, bits: 4}", "  - {method: ast, tokens: 1K}"
    read_recipe(recipe_of(tmp_path, joint, "[gptq, sparsekit-24]"))
    with pytest.raises(RecipeError, match=r"codes of 2 or 3 or 4 or 8 bits, and those of step 1 \(ast\) have 5"):
        read_recipe(recipe_of(tmp_path, joint.replace("4}", "4, levels: odd}"), "[sparsekit-24-compact, gptq]"))
    with pytest.raises(RecipeError, match="no step quantizes"):
        read_recipe(recipe_of(tmp_path, plain, "[gptq]"))
    with pytest.raises(RecipeError, match="quantizes what step 1"):
        read_recipe(recipe_of(tmp_path, f"{joint}\n  - {{method: gptq}}"))
    with pytest.raises(RecipeError, match="trains weights that step 1"):
        read_recipe(recipe_of(tmp_path, f"{joint}\n{plain}"))
    with pytest.raises(RecipeError, match="quantizes what step 1"):
        read_recipe(recipe_of(tmp_path, f"  - {{method: rtn}}\n{joint}"))
    read_recipe(recipe_of(tmp_path, f"  - {{method: wanda}}\n{joint}"))


def test_a_run_reports_evaluates_and_exports_the_integers(tmp_path, random_model):
    step = SHORT.replace("ast,", "ast, bits: 2, levels: odd, group_size: 16,")
    run(write(tmp_path, random_model, step, formats="gptq, sparsekit-24-compact"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"][0]["violations"] == 0
    assert report["steps"][0]["bits"] == [3]  # of a code: the zeros are codes too
    assert report["steps"][0]["training"]["bits_per_weight"] == 2 + 16 / 16
    assert [export["format"] for export in report["exports"]] == ["gptq", "sparsekit-24-compact"]


def logits(directory):
    with Chain(ModelView.open(directory, dtype="float32", device="cpu")).forward() as forward:
        return forward(torch.arange(48).reshape(2, 24))


@pytest.mark.parametrize(
    ("keys", "bits", "of_codes"),
    [
        ("bits: 3", 3, 3),
        ("bits: 2, levels: odd", 2, 3),
        ("bits: 3, levels: six", 8 / 3, 4),
        ("bits: 2, levels: ternary", 1.6, 2),
        ("bits: 1, levels: odd", 1, 2),
    ],
)
def test_rivals_without_a_pattern_are_stored_in_their_bits(tmp_path, random_model, keys, bits, of_codes):
    """Trained, reported, exported, and the export opened again computes the same."""
    step = SHORT.replace("ast,", f"ast, {keys}, sparsity: 0, group_size: 64,")
    step = step.replace('pattern: "2:4", ', "")
    run(write(tmp_path, random_model, step, formats="dense, sparsekit-compact"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"][0]["bits"] == [of_codes]
    assert report["steps"][0]["training"]["bits_per_weight"] == pytest.approx(bits + 16 / 64)
    export = next(export for export in report["exports"] if export["format"] == "sparsekit-compact")
    assert export["bits_per_weight"] == pytest.approx(bits + 16 / 64, abs=0.08)  # short rows end in part of a byte
    assert export["bytes"]["masks"] == 0
    found = [logits(tmp_path / "run" / "export" / name) for name in ("dense", "sparsekit-compact")]
    assert torch.equal(*found)


def test_a_step_tells_the_bits_of_its_codes(tmp_path):
    told = {
        "bits: 4": 4,
        "bits: 2, levels: odd": 3,
        "bits: 3, levels: six": 4,
        "bits: 2, levels: ternary": 2,
        "kl: 1.0": None,
    }
    for keys, bits in told.items():
        (step,) = read_recipe(recipe_of(tmp_path, f"  - {{method: ast, tokens: 33K, {keys}}}")).steps
        assert step.code_bits == bits
        assert step.quantizes == (bits is not None)
