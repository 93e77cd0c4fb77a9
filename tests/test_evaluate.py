"""Scores against naive loops in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparsekit.errors import NumericsError
from sparsekit.evaluation import evaluate
from sparsekit.evaluation.evaluate import agreement, perplexity


def table_model(vocabulary: int = 19, dtype: torch.dtype = torch.float32):
    """A model whose logits depend on the current token only."""
    table = 3 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
    return lambda tokens: table[tokens.long()].to(dtype)


def windows_of(count: int = 5, seq_len: int = 7, vocabulary: int = 19) -> torch.Tensor:
    return torch.randint(vocabulary, (count, seq_len), generator=torch.Generator().manual_seed(1)).int()


def silent(done: int, total: int) -> None:
    pass


def naive(forward, windows) -> list[float]:
    losses = []
    for window in windows:
        probabilities = forward(window[None])[0].double().softmax(-1)
        picked = [-math.log(probabilities[i, window[i + 1]]) for i in range(len(window) - 1)]
        losses.append(sum(picked) / len(picked))
    return losses


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_perplexity_equals_a_naive_loop(monkeypatch, batch, chunk):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    forward, windows = table_model(), windows_of()
    score = perplexity(forward, windows, batch=batch, progress=silent)
    expected = naive(forward, windows)
    assert score.losses.tolist() == pytest.approx(expected, rel=1e-6)
    mean = sum(expected) / len(expected)
    assert score.loss == pytest.approx(mean, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    spread = math.sqrt(sum((x - mean) ** 2 for x in expected) / (len(expected) - 1) / len(expected))
    assert score.stderr == pytest.approx(spread, rel=1e-5)


def test_half_precision_logits_are_scored_in_float32():
    windows = windows_of()
    rounded = table_model(dtype=torch.bfloat16)
    score = perplexity(rounded, windows, batch=2, progress=silent)
    assert score.losses.tolist() == pytest.approx(naive(rounded, windows), rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    score = perplexity(lambda tokens: torch.zeros(*tokens.shape, 50), windows_of(), batch=2, progress=silent)
    assert score.perplexity == pytest.approx(50, rel=1e-6)


def test_score_as_json_says_what_was_measured():
    steps = []
    score = perplexity(table_model(), windows_of(5, 7), batch=2, progress=lambda *at: steps.append(at))
    assert steps == [(2, 5), (4, 5), (5, 5)]
    about = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert about["tokens"] == 30 and about["windows"] == 5 and about["seq_len"] == 7
    assert len(about["window_losses"]) == 5
    assert sum(about["window_losses"]) / 5 == pytest.approx(about["loss"], abs=1e-6)
    assert "6 next-token losses of 5 windows of 7 tokens" in about["protocol"]


def test_one_window_has_no_standard_error():
    score = perplexity(table_model(), windows_of(1), batch=4, progress=silent)
    assert score.as_dict()["stderr"] is None


def test_nan_logits_are_an_error_that_names_the_window():
    windows = windows_of()

    def broken(tokens):
        logits = table_model()(tokens)
        logits[(tokens == windows[3]).all(1)] = float("nan")
        return logits

    with pytest.raises(NumericsError, match="window 3 is not finite"):
        perplexity(broken, windows, batch=2, progress=silent)


def test_agreement_equals_a_naive_loop_and_adds_up(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    student, dense = torch.randn(2, 2, 6, 11, generator=generator)
    p, q = dense.double().softmax(-1), student.double().softmax(-1)
    whole = agreement(student, dense)
    assert whole.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    assert whole.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    parts = agreement(student[:, :2], dense[:, :2]) + agreement(student[:, 2:], dense[:, 2:])
    assert (parts.agreed, parts.tokens) == (whole.agreed, whole.tokens)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-12)
    monkeypatch.setattr(evaluate, "CHUNK", 30)
    assert agreement(student, dense).kl == pytest.approx(whole.kl, rel=1e-9)


def test_a_model_agrees_with_itself():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(3))
    same = agreement(logits, logits)
    assert same.kl == 0 and same.top1 == 1
