"""Zero-shot tasks through the LM evaluation harness, without its traps.

What is guarded against, with the harness's version 0.4.13:

1. The batch size is set on the harness's model; given to `simple_evaluate` it is ignored.
2. Its model ties the embeddings again, which undoes a compressed head: tying is off meanwhile. It
   leaves the model in evaluation mode and gives the tokenizer a padding token: one is restored, the
   other is a copy. It would read how an export was stored, of which it knows no format of sparsekit's.
3. Its caches know a prompt, not the model: none is used.
4. Its index of 220 folders is not read, but for tasks that are not ours and need the network.
5. Standard errors are computed here from the documents, not by its process pool.
6. Metrics and data it would fetch are refused (`sparsekit.evaluation.tasks`).
7. It compiles its Jinja templates anew for every document, three quarters of a small model's time: once here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

from sparsekit.data import encoder
from sparsekit.errors import DataError, ModelError, nearest
from sparsekit.evaluation.tasks import chosen, task_files
from sparsekit.pieces import Encode

BATCH = 32  # sequences of a forward; fixed, since it moves scores slightly (lm-eval issues 1645, 3055)


def lm_eval_scores(
    module: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None,
    limit: int | None,
    seed: int,
    allow_network: bool,
) -> dict[str, Any]:
    """Scores of a transformers model on zero-shot tasks.

    Args:
        module: The model, weights in place. Left as it was.
        tokenizer: Its tokenizer. Not modified.
        tasks: Names of `sparsekit/tasks`, of task files in `tasks_dir`, or with the network of the harness.
        tasks_dir: Directory of the data, laid out as the task files say.
        limit: Documents of each task, from the start; all when None.
        seed: Of the examples a task with shots draws.
        allow_network: Whether tasks of the harness may fetch their data.
    Returns:
        For each task its metrics with standard errors (`acc`, `acc_stderr`, `acc_norm`, ...) and
        `documents`: `n`, how many were `truncated` to the context, and `correct`, for each metric the 0 or 1
        of every document in order. A group has the mean of its tasks, named in `documents.tasks`.
    Raises:
        DataError: The harness is missing, a task is unknown, or its data cannot be read.
        ModelError: The model is not in memory.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ModelError("zero-shot tasks need the whole model in memory, and it does not fit the device")
    known = task_files(tasks_dir)
    ours, others = chosen(list(tasks), known)
    manager = _manager(others, [*known, *ours], allow_network)
    members = list(dict.fromkeys(name for names in ours.values() for name in names))
    specs = [known[name].with_data(tasks_dir) for name in members]
    with _quiet(), _untouched(module), _templates_kept():
        loaded = _load(manager, [*specs, *others], seed)
        scores = _evaluate(module, tokenizer, loaded, limit)
    for name, parts in ours.items():
        if parts != [name]:
            scores[name] = _mean([scores[part] for part in parts], parts)
    order = [name for name in (*ours, *others) if name in scores]
    return {name: scores[name] for name in [*order, *(each for each in scores if each not in order)]}


def _manager(others: list[str], known: Sequence[str], allow_network: bool) -> Any:
    """The harness's index: empty, or its own tasks when some are asked for."""
    try:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise DataError(f"zero-shot tasks need lm-eval: pip install 'sparsekit[eval]' ({error})") from error
    manager = TaskManager(include_defaults=bool(others) and allow_network)
    names = [*known, *manager.all_tasks]
    for name in others:
        if name not in manager.all_tasks:
            hub = "" if allow_network else " Tasks of lm-eval itself need allow_network: true."
            raise DataError(f"no task {name!r}.{nearest(name, names)}{hub}")
    return manager


def _load(manager: Any, specs: list[Any], seed: int) -> Any:
    try:
        loaded = manager.load(specs)
    except Exception as error:  # a template or a download may raise anything
        raise DataError(f"a task cannot be prepared: {type(error).__name__}: {error}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _evaluate(module: nn.Module, tokenizer: Any, loaded: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    model = HFLM(pretrained=module, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH)
    found = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    encode, _ = encoder(tokenizer)
    scores = {}
    for name, samples in found["samples"].items():
        long = sum(_longest(encode, row["arguments"]) > model.max_length for row in samples)
        scores[name] = _score(found["results"][name], sorted(samples, key=lambda row: row["doc_id"]), long)
    return scores


def _longest(encode: Encode, requests: Sequence[Any]) -> int:
    """Tokens of the longest request of a document; what is generated does not count."""
    texts = [context + (follows if isinstance(follows, str) else "") for context, follows in requests]
    return max(map(len, encode(texts)))


def _score(values: Mapping[str, Any], samples: list[Mapping[str, Any]], truncated: int) -> dict[str, Any]:
    """One task's metrics, their standard errors and the documents behind them."""
    score: dict[str, Any] = {}
    correct: dict[str, list[int]] = {}
    for key, value in values.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr"):
            continue
        name = metric if kept == "none" else key
        documents = [row[metric] for row in samples if row["filter"] == kept]
        score[name] = value
        if (error := _stderr(metric, value, documents)) is not None:
            score[f"{metric}_stderr" if kept == "none" else f"{metric}_stderr,{kept}"] = error
        if all(document in (0, 1) for document in documents):
            correct[name] = [int(document) for document in documents]
    count = len({row["doc_id"] for row in samples})
    return {**score, "documents": {"n": count, "truncated": truncated, "correct": correct}}


def _stderr(metric: str, value: float, documents: list[Any]) -> float | None:
    """Standard error of a mean over documents, or of its exponential; None for what is no such thing."""
    if len(documents) < 2 or not all(isinstance(document, int | float) for document in documents):
        return None
    error = stdev(map(float, documents)) / len(documents) ** 0.5
    if metric == "perplexity":  # exp(-mean of the documents' log-likelihoods), so by the delta method
        return float(value * error)
    return error if abs(fmean(documents) - value) < 1e-9 else None


def _mean(scores: list[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """Mean of tasks of one group, each counted once; the errors are independent."""
    metrics = [key for key in scores[0] if key != "documents" and "_stderr" not in key]
    mean: dict[str, Any] = {}
    for metric in metrics:
        mean[metric] = fmean(score[metric] for score in scores)
        errors = [score.get(f"{metric}_stderr") for score in scores]
        if all(error is not None for error in errors):
            mean[f"{metric}_stderr"] = sum(error**2 for error in errors if error is not None) ** 0.5 / len(scores)
    counted = {key: sum(score["documents"][key] for score in scores) for key in ("n", "truncated")}
    return {**mean, "documents": {**counted, "tasks": names}}


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Keep the harness from tying embeddings and from how the weights were stored, and put the training mode back."""
    training, config = module.training, module.config
    module.tie_weights = lambda *_, **__: None  # type: ignore[assignment]
    module.config = copy.copy(config)
    vars(module.config).pop("quantization_config", None)
    try:
        yield
    finally:
        del module.tie_weights
        module.config = config
        module.train(training)


@contextlib.contextmanager
def _templates_kept() -> Iterator[None]:
    """Compile a template of the harness when it is first rendered."""
    from lm_eval.utils import env  # noqa: PLC0415

    env.from_string = lru_cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mute the harness's progress bars and advice."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
