"""What is wrong between parts of a recipe that are right by themselves."""

from __future__ import annotations

from collections.abc import Iterator

from sparsekit.errors import nearest
from sparsekit.formats import FORMATS
from sparsekit.recipe.entries import TextEntry
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.yamllines import Keys
from sparsekit.training.schedule import undivided


def contradictions(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Every contradiction: (keys, message)."""
    yield from _wrong_order(recipe)
    yield from _missing_texts(recipe)
    yield from _wrong_batches(recipe)
    yield from _wrong_measurements(recipe)
    yield from _wrong_paths(recipe)
    yield from _wrong_exports(recipe)


def _wrong_order(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """After a quantizer nothing may write weights: integers have no room for it."""
    quantizer: int | None = None
    for index, step in enumerate(recipe.steps):
        if quantizer is None:
            quantizer = index if step.quantizes else None
            continue
        first = f"step {quantizer + 1} ({recipe.steps[quantizer].method.name}, {recipe.where('steps', quantizer)})"
        this = f"step {index + 1} ({step.method.name})"
        if step.method.kind == "branch":  # beside the integers
            continue
        if step.quantizes:
            yield ("steps", index), f"{this} quantizes what {first} has quantized already; keep one quantizer"
        else:
            verb = {"prune": "prunes", "train": "trains"}[step.method.kind]
            message = f"{this} {verb} weights that {first} has quantized; put it before step {quantizer + 1}"
            yield ("steps", index), message


def _wrong_exports(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    for index, name in enumerate(recipe.export.formats):
        keys = ("export", "formats", index)
        if wrong := _wrong_integers(recipe, name):
            yield keys, wrong
        if name in recipe.export.formats[:index]:
            yield keys, f"format {name!r} is listed twice"


def _wrong_integers(recipe: Recipe, name: str) -> str | None:
    """A format of integers needs some, of bits that it has a layout for."""
    storage = FORMATS[name].storage
    if storage is None or not recipe.steps:  # without steps the model may be a quantized checkpoint
        return None
    made = next(((number, step) for number, step in enumerate(recipe.steps, 1) if step.quantizes), None)
    if made is None:
        return f"a {name} export holds integers, and no step quantizes; add one such as method: gptq"
    number, step = made
    if step.code_bits is None or step.code_bits in storage.bits:
        return None
    known = " or ".join(map(str, storage.bits))
    told = f"the export {name} holds codes of {known} bits, and those of step {number}"
    return f"{told} ({step.method.name}) have {step.code_bits}"


def _missing_texts(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    for index, step in enumerate(recipe.steps):
        name = f"step {index + 1} ({step.method.name})"
        if step.calibrated and recipe.data.calibration is None:
            example = "calibration: {path: builtin:calibration, samples: 128}"
            yield ("steps", index), f"{name} reads a calibration text and there is no data.calibration; add {example}"
        if (step.method.scope == "model" or step.method.kind == "train") and recipe.data.train is None:
            example = "train: {path: builtin:train}"
            yield ("steps", index), f"{name} reads a training text and there is no data.train; add {example}"


def _wrong_batches(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """The windows of a training step divide among processes and forwards, and its tokens are a step at least."""
    data = recipe.data.train
    for index, step in enumerate(recipe.steps):
        batch, micro, tokens = (step.values.get(key) for key in ("batch", "micro_batch", "tokens"))
        if step.method.scope != "model" or not isinstance(batch, int):
            continue
        if wrong := undivided(batch, micro if isinstance(micro, int) else None, step.gpus):
            yield ("steps", index, wrong[0]), wrong[1]
        if data is not None and isinstance(tokens, int) and tokens < batch * data.seq_len:
            a_step = f"{batch} x {data.seq_len} = {batch * data.seq_len:,}"
            yield ("steps", index, "tokens"), f"tokens {tokens:,} is less than one step of {a_step}"


def _wrong_measurements(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    names, wanted = list(recipe.data.evaluation), recipe.evaluate
    for index, name in enumerate(wanted.perplexity):
        keys = ("evaluate", "perplexity", index)
        if name not in names:
            yield keys, _no_text(name, names)
        elif name in wanted.perplexity[:index]:
            yield keys, f"text {name!r} is listed twice"
    for index, name in enumerate(wanted.agreement if isinstance(wanted.agreement, list) else []):
        if name not in wanted.perplexity:
            hint = nearest(name, wanted.perplexity)
            yield ("evaluate", "agreement", index), f"text {name!r} is not among those of evaluate.perplexity.{hint}"
    if wanted.agreement is True and not wanted.perplexity:
        yield ("evaluate", "agreement"), "agreement is measured on the texts of evaluate.perplexity, and it names none"
    yield from _wrong_measures(recipe)
    yield from _wrong_redo(recipe)
    if wanted.gates.max_ppl_increase is not None and not wanted.perplexity:
        yield ("evaluate", "gates"), "max_ppl_increase needs a text to measure; name one in evaluate.perplexity"
    if not wanted.lm_eval.tasks and (wanted.lm_eval.tasks_dir or wanted.lm_eval.limit):
        yield ("evaluate", "lm_eval"), "lm_eval names no tasks, so nothing would be measured; add tasks: [...]"


def _wrong_measures(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """A measure reads a text of data.evaluation, and is asked for once."""
    names, titles = list(recipe.data.evaluation), [measure.title for measure in recipe.evaluate.measures]
    for index, measure in enumerate(recipe.evaluate.measures):
        keys = ("evaluate", "measures", index)
        if measure.text not in names:
            yield keys, _no_text(measure.text, names)
        elif measure.title in titles[:index]:
            yield keys, f"{measure.title} is listed twice"


def _no_text(name: str, names: list[str]) -> str:
    there = f"there is {', '.join(names)}" if names else "data.evaluation is empty"
    return f"no text {name!r} in data.evaluation; {there}.{nearest(name, names)}"


def _wrong_redo(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Layers can be redone by the last step, if it works layer by layer."""
    gates, keys = recipe.evaluate.gates, ("evaluate", "gates", "redo")
    if gates.redo is None:
        return
    if not recipe.steps:
        yield keys, "redo repeats layers of the last step, and steps is empty"
        return
    last = recipe.steps[-1]
    name = f"step {len(recipe.steps)} ({last.method.name})"
    if gates.max_ppl_increase is None:
        yield keys, "redo needs the limit that makes it happen; add max_ppl_increase"
    if last.method.scope == "model":
        yield keys, f"{name} trains the whole model, so single layers cannot be redone; put a pruner or quantizer last"
    if gates.redo.bits is None:
        return
    bits = last.values.get("bits")
    if bits is None:
        yield (*keys, "bits"), f"{name} has no bits; leave them out, and the worst layers stay as they were before it"
    elif gates.redo.bits <= bits:
        yield (*keys, "bits"), f"bits {gates.redo.bits} is no higher precision than that of {name}"
    integers = [name for name in recipe.export.formats if FORMATS[name].storage is not None]
    if integers:
        told = f"a {integers[0]} export has one number of bits"
        yield (*keys, "bits"), f"{told}; leave bits out, and the worst layers stay unquantized"


def _wrong_paths(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Hub texts need the network, which a recipe has to allow."""
    data = recipe.data
    entries: list[tuple[Keys, TextEntry | None]] = [
        (("data", "calibration"), data.calibration),
        (("data", "train"), data.train),
        *((("data", "evaluation", name), entry) for name, entry in data.evaluation.items()),
    ]
    for keys, entry in entries:
        hub = [path for path in entry.paths if path.startswith("hub:")] if entry else []
        if hub and not recipe.allow_network:
            yield (*keys, "path"), f"{hub[0]} is on the hub, and the recipe lacks allow_network: true"
