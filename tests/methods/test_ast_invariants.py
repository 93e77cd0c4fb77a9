"""Where each of the 16 invariants of the AST reference (its section 5) is tested, and those tested nowhere else."""

import ast as syntax
import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_ast import SETTING, assert_same, make_job, policy
from test_optim import TWO_OF_FOUR, sparse_model
from test_run import AST, write
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsekit.errors import CheckpointError
from sparsekit.methods.ast import ast
from sparsekit.training.annealing import AstPolicy
from sparsekit.training.blocks import blocks_of
from sparsekit.training.optim import Rule, SparseAdamW, Step
from sparsekit.training.schedule import Schedule
from sparsekit.training.snapshots import Snapshots
from sparsekit.training.world import ALONE

TESTS = Path(__file__).parents[1]

INDEX = {
    "T1 N:M in forward": [
        "methods/test_ast.py::test_every_matmul_sees_two_of_four",
        "methods/test_ast_bits.py::test_every_matmul_sees_the_grid_from_its_step_on",
        "test_optim.py::test_the_model_computes_with_exactly_two_of_four",
        "test_optim.py::test_ties_keep_exactly_n",
    ],
    "T2 mask optimality": [
        "test_optim.py::test_refresh_keeps_the_largest_and_counts_flips",
        "test_optim.py::test_constant_importance_is_magnitude_and_hysteresis_keeps_the_mask",
        "test_pattern.py::test_keep_is_the_definition_whatever_the_ties",
    ],
    "T3 straight through": [
        "test_optim.py::test_gradient_reaches_pruned_entries",
        "methods/test_ast_bits.py::test_gradients_go_straight_through",
        "methods/test_ast_invariants.py::test_gradient_of_the_weight_is_that_of_the_masked_weight",
    ],
    "T4 decay": [
        "test_optim.py::test_decay_touches_only_pruned_weights_and_pulls_them_to_zero",
        "test_optim.py::test_masks_of_other_dtypes_are_refused",
        "test_optim.py::test_a_pruned_weight_without_a_gradient_is_not_thrown_across_zero",
    ],
    "T5 schedule of the decay": [
        "methods/test_ast.py::test_decay_rises_over_the_ramp_stays_and_ends_with_the_freeze",
        "methods/test_ast_invariants.py::test_logged_decay_is_the_schedules_whatever_is_logged",
    ],
    "T6 decoupling": [
        "test_optim.py::test_decay_is_not_remembered_in_the_first_moment",
        "test_optim.py::test_update_matches_ten_written_lines",
        "test_optim.py::test_without_decay_and_with_the_gradient_it_is_torch_adamw",
    ],
    "T7 second moment": ["test_optim.py::test_step_on_noise_has_the_size_the_second_moment_gives"],
    "T8 refresh": [
        "methods/test_ast.py::test_masks_are_chosen_again_exactly_every_so_many_steps",
        "methods/test_ast_bits.py::test_steps_stay_between_choices_of_the_mask",
        "methods/test_ast_memory.py::test_both_passes_of_a_recomputed_block_see_the_same_masks",
        "methods/test_ast_ranks.py::test_all_ranks_compute_with_the_same_masks_at_every_step",
        "methods/test_ast_invariants.py::test_masks_change_between_steps_only",
    ],
    "T9 flips": [
        "test_optim.py::test_refresh_keeps_the_largest_and_counts_flips",
        "methods/test_ast_memory.py::test_packed_first_masks_count_the_same_flips",
        "methods/test_ast_invariants.py::test_flips_are_zero_at_first_without_a_rate_and_after_the_freeze",
    ],
    "T10 SLoRB": [
        "methods/test_slorb.py::test_residual_is_the_pruned_part_without_its_block_means",
        "methods/test_slorb.py::test_sums_of_blocks_are_kept",
        "methods/test_slorb.py::test_drop_of_the_residual_is_one_in_k_and_sums_are_a_worse_start",
        "methods/test_slorb.py::test_parameters_of_a_llama_2_7b",
        "methods/test_slorb.py::test_a_block_that_divides_no_layer_is_refused",
        "methods/test_slorb.py::test_segment_sum_is_the_product_with_x",
    ],
    "T11 distillation": [
        "test_distill.py::test_equal_logits_have_no_divergence_and_no_gradient",
        "test_distill.py::test_direction_is_forward",
        "test_distill.py::test_constant_added_to_logits_changes_nothing",
        "test_distill.py::test_chunks_give_the_loss_and_gradients_of_the_whole",
        "test_distill.py::test_gradient_hardly_depends_on_temperature_for_small_gaps",
        "methods/test_ast_invariants.py::test_the_teacher_has_no_dropout_no_gradient_and_one_hash",
        "methods/test_ast_invariants.py::test_without_divergence_the_loss_is_cross_entropy",
    ],
    "T12 resume": [
        "methods/test_ast.py::test_killed_training_continues_to_the_same_bits",
        "methods/test_ast_bits.py::test_killed_training_continues_to_the_same_bits",
        "methods/test_ast_ranks.py::test_a_run_of_two_ranks_goes_on_alone",
        "methods/test_ast_invariants.py::test_a_resumed_run_has_the_same_state_in_every_tensor",
        "methods/test_ast_invariants.py::test_a_stale_mask_is_restored_and_not_chosen_again",
        "methods/test_ast_invariants.py::test_checkpoints_of_weights_alone_or_of_another_run_are_not_used",
        "methods/test_ast_invariants.py::test_empty_second_moments_are_noticed",
        "test_run.py::test_killed_run_continues_to_the_same_bits",
    ],
    "T13 export": [
        "methods/test_ast.py::test_result_is_what_the_student_computes",
        "methods/test_ast_bits.py::test_the_integers_are_what_the_student_computes_with",
        "methods/test_ast_invariants.py::test_scope_on_a_llama_2_7b",
        "test_export.py::test_dense_export_computes_the_same_logits",
        "test_run.py::test_exports_load_and_hold_the_evaluated_weights",
        "methods/test_slorb.py::test_folding_is_refused",
        "methods/test_slorb.py::test_an_export_has_an_adapter_that_computes_the_branch",
    ],
    "T14 quantizers keep the pattern": [
        "test_run.py::test_every_pair_keeps_every_group",
        "methods/test_gptq.py::test_pruned_entries_stay_exactly_zero",
        "methods/test_simple.py::test_rtn_keeps_pruned_entries_exactly_zero",
        "methods/test_awq.py::test_masks_and_zeros_stay",
        "methods/test_slorb.py::test_gptq_quantizes_the_weight_and_leaves_the_branch",
        "test_export.py::test_bytes_are_those_of_the_files_and_shards_have_an_index",
    ],
    "T15 precision": [
        "test_lowbits.py::test_bfloat16_masters_without_stochastic_rounding_are_refused",
        "test_optim.py::test_bfloat16_parameters_keep_float32_masters",
        "methods/test_ast_invariants.py::test_masks_come_from_the_masters_and_not_from_their_copies",
        "methods/test_ast_invariants.py::test_a_mask_of_another_shape_raises_and_is_never_skipped",
    ],
    "T16 protocol": [
        "methods/test_ast_invariants.py::test_a_run_scores_the_dense_model_and_says_how",
        "methods/test_ast_invariants.py::test_the_last_step_is_the_result_whatever_the_held_out_text_says",
        "test_evaluate.py::test_score_as_json_says_what_was_measured",
        "test_zeroshot.py::test_scores_equal_a_count_by_hand",
    ],
}


def functions_of(path):
    return {node.name for node in syntax.parse(path.read_text()).body if isinstance(node, syntax.FunctionDef)}


def test_every_invariant_has_tests_that_are_there():
    assert [name.split()[0] for name in INDEX] == [f"T{number}" for number in range(1, 17)]
    missing = [
        test
        for tests in INDEX.values()
        for test in tests
        if test.partition("::")[2] not in functions_of(TESTS / test.partition("::")[0])
    ]
    assert not missing
    assert all(INDEX.values())


def digest(tensors):
    """Of the content of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_gradient_of_the_weight_is_that_of_the_masked_weight():
    model, masks = sparse_model()
    SparseAdamW(model, masks, TWO_OF_FOUR, Rule())
    x, target = torch.randn(5, 16), torch.randn(5, 8)
    ((model(x) - target) ** 2).sum().backward()
    masked = model.weight.detach().clone().requires_grad_(True)
    ((x @ masked.t() + model.bias.detach() - target) ** 2).sum().backward()
    assert torch.equal(model.weight.grad, masked.grad)
    residual = 2 * (x @ masked.detach().t() + model.bias.detach() - target)
    torch.testing.assert_close(model.weight.grad, residual.t() @ x)  # by hand, at every entry
    assert bool((model.weight.grad[~masks["weight"]] != 0).all())


def test_logged_decay_is_the_schedules_whatever_is_logged(tmp_path, monkeypatch):
    logs = []
    for name, lines in (("all", 100), ("few", 4)):
        monkeypatch.setattr("sparsekit.training.loop.LOGGED", lines)
        job = make_job(tmp_path / name)
        ast(job, **SETTING)
        logs.append({line["step"]: line for line in job.student.log})
    made = policy(24, decay=SETTING["decay"], freeze=SETTING["freeze"], mask_every=3)
    for step, line in logs[0].items():
        assert line["decay"] == pytest.approx(made.decay_at(step - 1), rel=1e-6)
    assert len(logs[1]) < len(logs[0])
    for step, line in logs[1].items():
        for key in ("decay", "flip_rate", "initial_flip_rate", "lr"):
            assert line[key] == logs[0][step][key]


def test_masks_change_between_steps_only(tmp_path, monkeypatch):
    """Neither gradient accumulation nor held-out scores nor the log moves a choice of the masks."""
    changes = []
    ways = ({"micro_batch": 4}, {"micro_batch": 1}, {"micro_batch": 4, "checkpointing": True})
    for number, options in enumerate(ways):
        monkeypatch.setattr("sparsekit.training.loop.VALIDATED", (10, 24, 1)[number])
        job = make_job(tmp_path / str(number))
        asked = []
        monkeypatch.setattr(AstPolicy, "after", recording(AstPolicy.after, asked))
        ast(job, **{**SETTING, **options})
        monkeypatch.undo()
        changes.append(asked)
    assert changes[0] == changes[1] == changes[2]
    assert changes[0] == [(step, min(step + 1, 19) // 3) for step in range(24)]


def recording(after, into):
    def wrapped(self, step):
        result = after(self, step)
        into.append((step, self.refreshes))
        return result

    return wrapped


def test_flips_are_zero_at_first_without_a_rate_and_after_the_freeze(plain):
    log = plain[0].student.log
    assert log[0]["flip_rate"] == log[0]["initial_flip_rate"] == 0.0  # before the first choice
    late = [line["initial_flip_rate"] for line in log if line["step"] >= 19]  # frozen from step 19 on
    assert len(set(late)) == 1
    assert late[0] > 0
    model, masks = sparse_model()
    optimizer = SparseAdamW(model, masks, TWO_OF_FOUR, Rule())
    for number in range(1, 4):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.advance(Step(number, lr=0.0, decay=1.0, refresh=True))
        assert [int(count) for count in optimizer.flips] == [0, 0]


def test_masks_are_frozen_in_the_freeze(tmp_path):
    job = make_job(tmp_path)
    name = next(iter(job.linears))
    module, seen = dict(job.student.named_modules())[name], []
    module.register_forward_pre_hook(
        lambda module, _: seen.append(module.weight.detach() != 0) if torch.is_grad_enabled() else None
    )
    ast(job, **SETTING)
    assert all(torch.equal(mask, seen[19]) for mask in seen[19:])


def test_the_teacher_has_no_dropout_no_gradient_and_one_hash(tmp_path, plain):
    job = make_job(tmp_path)
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.attention_dropout = 0.5
    teacher = AutoModelForCausalLM.from_config(config).train()
    teacher.load_state_dict(job.teacher.state_dict())
    student = copy.deepcopy(teacher).requires_grad_(False)
    before = digest(teacher.state_dict())
    log: list = []
    trained = ast(replace(job, teacher=teacher, student=student, log=log.append), **SETTING)
    assert not teacher.training
    assert digest(teacher.state_dict()) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert sum("valid_perplexity" in line for line in log) > 1  # it was evaluated on the way
    assert_same(trained, plain[1])


def test_without_divergence_the_loss_is_cross_entropy(tmp_path):
    job = make_job(tmp_path)
    ast(job, **{**SETTING, "kl": 0.0})
    assert all(line["loss"] == line["ce"] for line in job.student.log)


class Killed(Exception):
    """Ends a run."""


def cut(directory, step, **options):
    def progress(done, total):
        if done == step * 64:
            raise Killed

    with pytest.raises(Killed):
        ast(replace(make_job(directory), progress=progress), **SETTING, checkpoint_every=1, **options)


@pytest.mark.parametrize("options", [{}, {"weight_scaling": 2, "flip_target": 1e-3}, {"slorb": 16}])
def test_a_resumed_run_has_the_same_state_in_every_tensor(tmp_path, monkeypatch, options):
    """W, m, v, masks, first masks and sums after 23 of 24 steps, and what else the checkpoint holds."""
    monkeypatch.setattr("sparsekit.training.loop.LOGGED", 2)  # so that there are sums
    for name, kept in (("whole", None), ("cut", 8)):
        if kept is not None:
            cut(tmp_path / name, kept, **options)
            torch.manual_seed(12345)  # nothing of the process may matter
        ast(make_job(tmp_path / name), **SETTING, checkpoint_every=1, **options)
    whole, again = (load_file(tmp_path / name / "step-00000023.safetensors") for name in ("whole", "cut"))
    assert {key.partition("/")[0] for key in whole} >= {"dense", "mask", "initial_mask", "exp_avg", "exp_avg_sq", "sum"}
    assert digest(whole) == digest(again)
    described = [json.loads((tmp_path / name / "step-00000023.json").read_text()) for name in ("whole", "cut")]
    assert described[0] == described[1]


def test_a_stale_mask_is_restored_and_not_chosen_again(tmp_path):
    cut(tmp_path, 9)  # masks were chosen after step 6, and the checkpoint is of step 8
    job = make_job(tmp_path)
    masks = {f"{n}.weight": TWO_OF_FOUR.keep(state.source.abs()) for n, state in job.linears.items()}
    optimizer = SparseAdamW(job.student.requires_grad_(True), masks, TWO_OF_FOUR, Rule())
    found = Snapshots(tmp_path, ALONE).restore(optimizer, torch.device("cpu"))
    assert found is not None
    assert found[0]["step"] == 8
    stored = load_file(tmp_path / "step-00000008.safetensors")
    differing = 0
    for name in masks:
        assert torch.equal(optimizer.mask(name), stored[f"mask/{name}"])
        differing += int((TWO_OF_FOUR.keep(optimizer.weight(name).abs()) ^ optimizer.mask(name)).sum())
    assert differing > 0  # choosing them again would have been another run


def test_checkpoints_of_weights_alone_or_of_another_run_are_not_used(tmp_path, plain):
    cut(tmp_path / "weights", 8)
    path = tmp_path / "weights" / "step-00000007.safetensors"
    weights = {key: value for key, value in load_file(path).items() if key.startswith(("dense/", "parameter/"))}
    save_file(weights, path)
    assert_same(ast(make_job(tmp_path / "weights"), **SETTING), plain[1])  # begun anew
    cut(tmp_path / "other", 8)
    with pytest.raises(CheckpointError, match="of a run of 24 steps, not 12"):
        ast(make_job(tmp_path / "other"), **{**SETTING, "tokens": 12 * 64})


def test_empty_second_moments_are_noticed(tmp_path):
    cut(tmp_path, 8)
    job = make_job(tmp_path)
    masks = {f"{n}.weight": TWO_OF_FOUR.keep(state.source.abs()) for n, state in job.linears.items()}
    optimizer = SparseAdamW(job.student.requires_grad_(True), masks, TWO_OF_FOUR, Rule())
    snapshots = Snapshots(tmp_path, ALONE)
    described, sums = snapshots.restore(optimizer, torch.device("cpu"))
    optimizer.forget()
    about = {key: value for key, value in described.items() if key in ("steps", "policy")}
    snapshots.save(described["step"], optimizer, sums, about)
    with pytest.raises(CheckpointError, match="every second moment is 0 after 7 steps"):
        ast(make_job(tmp_path), **SETTING)


def test_scope_on_a_llama_2_7b():
    """224 linears and 3,238,002,688 zeros; embeddings and head are no part of it."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = blocks_of(model)
    linears = [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]
    assert len(blocks) == 32
    assert len(linears) == 224
    assert sum(module.weight.numel() for module in linears) // 2 == 3_238_002_688
    assert model.lm_head not in linears


def test_masks_come_from_the_masters_and_not_from_their_copies():
    """bfloat16 sees a tie where float32 has an order."""
    row = torch.tensor([[1.0, 1.0 + 2**-10, 1.0 + 2**-9, 0.0]])
    model = torch.nn.Linear(4, 1, bias=False).bfloat16()
    first = torch.tensor([[True, True, False, False]])
    optimizer = SparseAdamW(model, {"weight": first}, TWO_OF_FOUR, Rule(), weights={"weight": row})
    optimizer.refresh()
    assert optimizer.mask("weight").tolist() == [[False, True, True, False]]
    assert TWO_OF_FOUR.keep(row.bfloat16()).tolist() == [[True, True, False, False]]


def test_a_mask_of_another_shape_raises_and_is_never_skipped():
    model, masks = sparse_model()
    with pytest.raises(ValueError, match=r"must be bool \[8, 16\]"):
        SparseAdamW(model, {"weight": masks["weight"][:4]}, TWO_OF_FOUR, Rule())
    optimizer = SparseAdamW(model, masks, TWO_OF_FOUR, Rule())
    optimizer.state[model.weight]["mask"] = masks["weight"][:, :8]
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        optimizer.advance(Step(1, lr=1e-3, decay=1e-3))


def test_a_run_scores_the_dense_model_and_says_how(tmp_path, random_model):
    from click.testing import CliRunner

    from sparsekit.cli import main

    result = CliRunner().invoke(main, ["run", str(write(tmp_path, random_model, AST, formats="dense"))])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for scores in (report["dense"], report["final"]):
        assert scores["heldout"]["seq_len"] == 32
        assert scores["heldout"]["windows"] == 16
    assert report["dense"]["heldout"]["perplexity"] != report["final"]["heldout"]["perplexity"]


def test_the_last_step_is_the_result_whatever_the_held_out_text_says(tmp_path, plain):
    """Nothing is selected by a held-out score, so no test text can leak into the weights."""
    for name, valid in (("other", slice(20, 24)), ("none", None)):
        job = make_job(tmp_path / name)
        job = replace(job, valid=None if valid is None else job.tokens[valid])
        assert_same(ast(job, **SETTING), plain[1])


def test_the_rate_of_a_run_is_the_schedules(plain):
    plan = Schedule(steps=24, batch=4, lr=SETTING["lr"])
    assert [line["lr"] for line in plain[0].student.log] == [plan.lr_at(step) for step in range(24)]
