"""Zero-shot tasks: prompts as written, scores as counted by hand, nothing changed, every mistake named."""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from sparsekit.data import load_tokenizer
from sparsekit.errors import DataError, ModelError
from sparsekit.evaluation import zeroshot
from sparsekit.evaluation.evaluate import lm_eval_scores
from sparsekit.evaluation.tasks import task_files

ARC = {
    "question": {
        "stem": "Which is hot?",
        "choices": [{"text": "ice water", "label": "1"}, {"text": "fire", "label": "2"}, {"text": "fog", "label": "3"}],
    },
    "answerKey": "2",
}
DATA = {
    "arc_easy/test.jsonl": ARC,
    "piqa/valid.jsonl": {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the jar's floor."},
    "hellaswag/hellaswag_val.jsonl": {
        "query": "Cooking: A man [step] cooks. he",
        "endings": ["eats.", "eats [title] it's a pan.", 'says "no".', "sleeps."],
        "label": 3,
    },
    "lambada/lambada_test.jsonl": {"text": "I care about\n\nall the signs"},
    "superglue_boolq/val.jsonl": {"passage": "Water is wet.", "question": "is water wet", "label": "true"},
    "superglue_rte/val.jsonl": {"premise": "It rains.", "hypothesis": "It is dry.", "label": "not_entailment"},
}
PROMPTS = {  # (context, the choices as they are scored, gold)
    "arc_easy": ("Question: Which is hot?\nAnswer:", [" ice water", " fire", " fog"], 1),
    "piqa": ("Question: Open a jar\nAnswer:", [" Turn the lid.", " Turn the jar's floor."], 1),
    "hellaswag": ("Cooking: A man cooks. he", [" eats.", " eats. it's a pan.", ' says "no".', " sleeps."], 3),
    "lambada": ("I care about\n\nall the", [" signs"], " signs"),
    "boolq": ("Water is wet.\nQuestion: is water wet?\nAnswer:", [" no", " yes"], 1),
    "rte": ("It rains.\nQuestion: It is dry. True or False?\nAnswer:", [" True", " False"], 1),
    "blimp_wh_island": ("", [" It is good.", " It good is."], 0),
}
OWN = """\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a task went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def tasks_dir(tmp_path) -> Path:
    """Data of every packaged task, and a task of the user's own."""
    files = dict(DATA)
    for name in task_files(None):
        if name.startswith("blimp_"):
            pair = {"sentence_good": "It is good.", "sentence_bad": "It good is."}
            files[f"blimp/{name.removeprefix('blimp_')}.jsonl"] = pair
    for name, row in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{json.dumps(row)}\n" * 2)
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n0\n")
    words = "sun moon river stone glass paper window green seven".split()
    rows = [
        {"q": f"The {a} and the", "choices": [b, f"{c} {a}", f"very {b} {c} indeed"], "answer": (i * 2) % 3}
        for i, (a, b, c) in enumerate(zip(words, words[1:], words[2:], strict=False))
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path


@pytest.fixture
def model(random_model):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


@pytest.fixture
def tokenizer(random_model):
    return load_tokenizer(random_model, trust_remote_code=False)


def score(model, tokenizer, tasks, directory, **changed):
    given = {"tasks_dir": directory, "limit": None, "seed": 0, "allow_network": False}
    return lm_eval_scores(model, tokenizer, tasks, **{**given, **changed})


def test_packaged_prompts(tasks_dir):
    known = task_files(tasks_dir)
    manager = zeroshot._manager([], list(known), False)
    with zeroshot._quiet():
        loaded = zeroshot._load(manager, [known[name].with_data(tasks_dir) for name in PROMPTS], 0)
    for name, task in loaded["tasks"].items():
        task.build_all_requests(limit=1, rank=0, world_size=1)
        context, choices, gold = PROMPTS[name]
        assert [request.args for request in task.instances] == [(context, choice) for choice in choices]
        assert task.doc_to_target(task.instances[0].doc) == gold


def test_every_packaged_task_is_there():
    names = set(task_files(None))
    assert {"arc_easy", "piqa", "hellaswag", "lambada", "boolq", "rte"} < names
    assert sum(name.startswith("blimp_") for name in names) == 33


def by_hand(model, tokenizer, directory) -> tuple[list[int], list[int]]:
    """Correctness by plain and by length-normalised likelihood, in float64."""
    plain, normed = [], []
    for line in (directory / "own.jsonl").read_text().splitlines():
        row, found = json.loads(line), []
        for choice in row["choices"]:
            context = tokenizer.encode(row["q"])
            tokens = torch.tensor([tokenizer.encode(f"{row['q']} {choice}")])
            with torch.inference_mode():
                likely = model(input_ids=tokens).logits[0].double().log_softmax(-1)
            places = range(len(context), tokens.shape[1])
            found.append(sum(float(likely[at - 1, tokens[0, at]]) for at in places))
        by_length = [value / len(choice) for value, choice in zip(found, row["choices"], strict=True)]
        plain.append(int(found.index(max(found)) == row["answer"]))
        normed.append(int(by_length.index(max(by_length)) == row["answer"]))
    return plain, normed


def test_scores_equal_a_count_by_hand(model, tokenizer, tasks_dir):
    plain, normed = by_hand(model, tokenizer, tasks_dir)
    assert plain != normed  # the two metrics are told apart
    (found,) = score(model, tokenizer, ["own"], tasks_dir).values()
    assert found["documents"]["correct"] == {"acc": plain, "acc_norm": normed}
    for metric, correct in (("acc", plain), ("acc_norm", normed)):
        share, n = sum(correct) / len(correct), len(correct)
        assert found[metric] == pytest.approx(share)
        assert found[f"{metric}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    assert found["documents"]["n"] == 7
    json.dumps(found, allow_nan=False)


def test_limit_takes_the_first_documents(model, tokenizer, tasks_dir):
    whole = score(model, tokenizer, ["own"], tasks_dir)["own"]["documents"]
    part = score(model, tokenizer, ["own"], tasks_dir, limit=3)["own"]["documents"]
    assert part["n"] == 3
    assert part["correct"]["acc"] == whole["correct"]["acc"][:3]


def test_group_is_the_mean_of_its_sets(model, tokenizer, tasks_dir):
    found = score(model, tokenizer, ["lambada", "blimp", "blimp_wh_island"], tasks_dir)
    assert list(found)[:3] == ["lambada", "blimp", "blimp_wh_island"]
    group = found["blimp"]
    sets = [found[name] for name in group["documents"]["tasks"]]
    assert len(sets) == 33 and group["documents"]["n"] == 66
    assert group["acc"] == pytest.approx(sum(each["acc"] for each in sets) / 33)
    errors = [each["acc_stderr"] for each in sets]
    assert group["acc_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 33)
    assert found["lambada"]["perplexity"] > 1 and "perplexity_stderr" in found["lambada"]


def test_nothing_of_the_model_or_tokenizer_changes(model, tokenizer, tasks_dir):
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.train()
    score(model, tokenizer, ["own"], tasks_dir)
    assert model.config.tie_word_embeddings and not model.lm_head.weight.any()
    assert model.training
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token is None


def test_an_export_is_scored_as_the_model_it_is(model, tokenizer, tasks_dir):
    expected = score(model, tokenizer, ["own"], tasks_dir)
    stored = {"quant_method": "sparsekit-24-compact", "bits": 2}
    model.config.quantization_config = stored  # as a view of an export has it
    assert score(model, tokenizer, ["own"], tasks_dir) == expected
    assert model.config.quantization_config is stored


def test_two_models_do_not_share_a_cache(model, tokenizer, tasks_dir):
    first = score(model, tokenizer, ["lambada"], tasks_dir)["lambada"]["perplexity"]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert score(model, tokenizer, ["lambada"], tasks_dir)["lambada"]["perplexity"] != first


def test_documents_longer_than_the_context_are_counted(model, tokenizer, tasks_dir):
    row = {"passage": "Water is wet. " * 200, "question": "is it", "label": "false"}
    with open(tasks_dir / "superglue_boolq/val.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    documents = score(model, tokenizer, ["boolq"], tasks_dir)["boolq"]["documents"]
    assert documents["n"] == 3 and documents["truncated"] == 1


def test_unknown_tasks_are_named_with_the_nearest(model, tokenizer, tasks_dir):
    with pytest.raises(DataError, match=r"no task 'arc_esay'\. Did you mean 'arc_easy'.*allow_network"):
        score(model, tokenizer, ["own", "arc_esay"], tasks_dir)
    (tasks_dir / "tasks").mkdir()
    with pytest.raises(DataError, match=r"tasks_dir .*tsaks is no directory\. Did you mean 'tasks'"):
        score(model, tokenizer, ["own"], tasks_dir / "tsaks")
    with pytest.raises(DataError, match=r"needs evaluate\.lm_eval\.tasks_dir"):
        score(model, tokenizer, ["arc_easy"], None)


def test_data_mistakes_are_named(model, tokenizer, tasks_dir):
    (tasks_dir / "piqa/valid-labels.lst").write_text("1\n")
    with pytest.raises(DataError, match="has 1 labels for the 2 rows"):
        score(model, tokenizer, ["piqa"], tasks_dir)
    (tasks_dir / "own.jsonl").rename(tasks_dir / "own.json")
    with pytest.raises(DataError, match=r"task own: no data file .*own\.jsonl\. Did you mean 'own\.json'"):
        score(model, tokenizer, ["own"], tasks_dir)
    (tasks_dir / "own.jsonl").write_text('{"q": 1}\n{')
    with pytest.raises(DataError, match=r"own\.jsonl:2 is no JSON"):
        score(model, tokenizer, ["own"], tasks_dir)
    (tasks_dir / "own.jsonl").write_text('{"q": "x"}\n')
    with pytest.raises(DataError, match="a task cannot be prepared"):
        score(model, tokenizer, ["own"], tasks_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('doc_to_text: "{{q}}"', "doc_to_text: !function own.py"), "may not run code"),
        (("metric: acc_norm", "metric: rouge"), "metric 'rouge' is not one of acc"),
        (("dataset_path: json", "dataset_path: owner/name"), "needs dataset_path: json"),
        (("task: own", "task: rte"), "a task 'rte' is in .*rte.yaml too"),
        (("task: own", "include: x.yaml\ntask: own"), "include is not supported"),
        (("task: own", "tsak: own"), "needs task: NAME"),
        (("task: own", "task: [own"), "is no task file"),
    ],
)
def test_task_file_mistakes_are_named(model, tokenizer, tasks_dir, change, message):
    (tasks_dir / "own.yaml").write_text(OWN.replace(*change))
    with pytest.raises(DataError, match=message):
        score(model, tokenizer, ["own"], tasks_dir)


def test_missing_harness_says_what_to_install(monkeypatch, model, tokenizer, tasks_dir):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DataError, match=r"pip install 'sparsekit\[eval\]'"):
        score(model, tokenizer, ["own"], tasks_dir)


def test_model_that_is_not_in_memory_is_refused(model, tokenizer, tasks_dir):
    with pytest.raises(ModelError, match="whole model in memory"):
        score(model.to("meta"), tokenizer, ["own"], tasks_dir)
