"""Ablations of AST in one process: every arm of recipes/ast shares the teacher, the tokens and the compiled blocks.

    python docs/benchmarks/ast_ablation.py recipes/ast/table4.yaml --out ast_table4.json
    python docs/benchmarks/ast_ablation.py recipes/ast/table4.yaml --arms fixed-kd adaptive --seeds 1 2 --out s.json
    python docs/benchmarks/ast_ablation.py recipes/ast/*.yaml --arms adaptive@99.6M slorb-16 --within 300 --out s.json
    python docs/benchmarks/ast_ablation.py --table --out ast_table4.json

Each file is a comparison whose arms end with an `ast` step; the steps before it are run once, and again only
for another file. An arm that --out holds with the same steps, tokens and seed is not repeated. What is scored
is what an export would store, on the file's first evaluation text (--text names another). Choose there; score
a test text once, for the arm that was chosen.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from sparsekit.checkpoint import BlockState, StepStore
from sparsekit.errors import RecipeError
from sparsekit.evaluation.evaluate import perplexity
from sparsekit.files import read_json, write_json
from sparsekit.formats import FORMATS
from sparsekit.formats.coded import Coded
from sparsekit.interchange.export import export_as
from sparsekit.listener import Silent
from sparsekit.models.chain import Chain
from sparsekit.models.view import ModelView
from sparsekit.recipe import Recipe
from sparsekit.recipe.entries import Exports, Measurements
from sparsekit.recipe.variants import read_arms
from sparsekit.run import Run
from sparsekit.training.loop import Trained, TrainJob
from sparsekit.units import Count

VALIDATED = 32  # windows of the curve
SCORED_AT_ONCE = {"cpu": 4, "cuda": 32}  # windows


@dataclass
class Bench:
    """What the arms of a file share.

    Attributes:
        run: An opened run of one of the arms, for its texts.
        text: The evaluation text that is scored.
        runs: Where the steps before AST are kept.
    """

    run: Run
    text: str
    runs: Path
    starts: dict[str, list[BlockState]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.run.recipe
        assert recipe.data.train is not None  # a recipe with ast has it
        self.tokens = self.run.windows(recipe.data.train)
        self.scored = self.run.windows(recipe.data.evaluation[self.text])
        self.teacher, self.student = self.run.view.copy(), self.run.view.copy()
        self.dense = [self.teacher.dense_block(index) for index in range(len(self.teacher.blocks))]
        self.teacher.materialise_all(self.dense)

    def fits(self, recipe: Recipe, text: str) -> bool:
        """Whether an arm has this model and these texts; arms of several files may."""
        own = self.run.recipe
        return (
            text == self.text
            and recipe.model == own.model
            and recipe.data.train == own.data.train
            and recipe.data.evaluation[text] == own.data.evaluation[text]
            and recipe.resolve(".") == own.resolve(".")  # paths start at the file
        )

    def start(self, recipe: Recipe) -> list[BlockState]:
        """The blocks that the steps before AST leave; each such chain is run once."""
        before = recipe.steps[:-1]
        if not before:
            return self.dense
        calibration = recipe.data.calibration
        key = json.dumps([calibration and calibration.model_dump(), *(step.as_dict() for step in before)])
        if key not in self.starts:
            place = self.runs / "-".join(step.method.name for step in before)
            changes = {"steps": before, "output": str(place), "export": Exports(formats=[]), "evaluate": Measurements()}
            run = Run.open(recipe.model_copy(update=changes), Silent())
            run.execute()
            assert run.last is not None  # there are steps
            chain = Chain(run.view, [StepStore(run.shared / "steps" / run.last.directory, run.view.dtype)])
            self.starts[key] = list(chain.blocks())
        return self.starts[key]

    def train(self, recipe: Recipe, arguments: Mapping[str, Any], seed: int) -> tuple[Trained, list[dict[str, Any]]]:
        """One arm on a fresh student; returns what it made and its curve."""
        blocks = self.start(recipe)
        self.student.load_rest({})
        self.student.materialise_all(blocks)
        curve: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as directory:
            job = TrainJob(
                student=self.student.module,
                teacher=self.teacher.module,
                linears={name: state for block in blocks for name, state in block.linears.items()},
                tokens=self.tokens,
                valid=self.scored[:VALIDATED],
                seed=seed,
                directory=Path(directory),
                log=curve.append,
                progress=lambda done, total: None,
            )
            trained: Trained = recipe.steps[-1].method.function(job, **arguments)
        return trained, curve

    def trained_block(self, trained: Trained, index: int) -> BlockState:
        """What training made of a block."""
        dense = self.dense[index]
        params = {name: trained.params.get(name, value) for name, value in dense.params.items()}
        return BlockState({name: trained.linears[name] for name in dense.linears}, params)

    def score(self, trained: Trained | None) -> dict[str, Any]:
        """Perplexity of what would be stored; of the dense model for None."""
        if trained is not None:
            blocks = [self.trained_block(trained, index) for index in range(len(self.dense))]
            self.student.materialise_all(blocks)
            inside = {name for block in blocks for name in block.params}
            self.student.load_rest({name: value for name, value in trained.params.items() if name not in inside})
        view = self.teacher if trained is None else self.student
        return perplexity(
            lambda tokens: logits(view, tokens),
            self.scored,
            batch=SCORED_AT_ONCE[view.device.type],
            progress=lambda done, total: None,
        ).as_dict()


def logits(view: ModelView, tokens: Tensor) -> Tensor:
    """Logits [batch, seq_len, vocabulary] of tokens int [batch, seq_len]."""
    with torch.inference_mode():
        found: Tensor = view.module(input_ids=tokens.long().to(view.device), use_cache=False).logits
    return found


def arms_of(
    files: Sequence[Path], wanted: Sequence[str], overrides: Sequence[str]
) -> Iterator[tuple[Path, str, Recipe, int | None]]:
    """The wanted arms of the files in the order in which they are wanted, with the tokens that a name asks for."""
    known = [(file, name, arm) for file in files for name, arm in read_arms([file], overrides).recipes.items()]
    for file, name, recipe in known:
        if recipe.steps[-1].method.name != "ast":
            raise RecipeError(f"arm {name} ends with {recipe.steps[-1].method.name}, not with ast", where=str(file))
    for text in wanted or ["*"]:
        glob, _, tokens = text.partition("@")
        found = [arm for arm in known if fnmatchcase(arm[1], glob)]
        if not found:
            raise RecipeError(f"no arm is called {glob!r}")
        yield from ((*arm, count(tokens) if tokens else None) for arm in found)


def arguments_of(recipe: Recipe, tokens: int | None) -> dict[str, Any]:
    """Arguments of an arm's AST step; no checkpoints, nobody goes on with an ablation."""
    params = recipe.steps[-1].params
    given = {name: getattr(params, name) for name in type(params).model_fields}
    changed = {} if tokens is None else {"tokens": tokens, "budget": None}
    return {**given, "checkpoint_every": 10**9, **changed}


def one(
    bench: Bench, file: Path, name: str, recipe: Recipe, seed: int, tokens: int | None, export: str | None
) -> dict[str, Any]:
    """Train and score an arm, and export it where a format is given."""
    cuda = bench.student.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    trained, curve = bench.train(recipe, arguments_of(recipe, tokens), seed)
    seconds, score = time.monotonic() - began, strip(bench.score(trained))
    if export is not None:
        place = bench.runs / "exports" / f"{name}-{seed}-{trained.metrics['tokens']}"
        export_as(FORMATS[export], bench.student, partial(bench.trained_block, trained), place)
    return {
        "arm": name,
        "file": file.name,
        "seed": seed,
        "steps": [step.as_dict() for step in recipe.steps],
        "budget": tokens,
        "text": bench.text,
        "score": score,
        "seconds": seconds,
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "metrics": dict(trained.metrics),
        "coded_bits_per_weight": coded_bits(trained),
        "curve": curve,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }


def coded_bits(trained: Trained) -> float | None:
    """Bits that a weight takes in sparsekit-coded, all bytes of its linears but branches; None without integers."""
    states = [(state.quantized, state.mask) for state in trained.linears.values()]
    packed = [Coded().pack(weight, "", mask) for weight, mask in states if weight is not None]
    held = sum(part.nbytes for parts in packed for part in parts.values())
    return 8 * held / sum(state.source.numel() for state in trained.linears.values()) if packed else None


def same(old: Mapping[str, Any], name: str, recipe: Recipe, seed: int, tokens: int | None, text: str) -> bool:
    """Whether a result is of this arm."""
    about = (name, seed, tokens, text, [step.as_dict() for step in recipe.steps])
    return about == tuple(old.get(key) for key in ("arm", "seed", "budget", "text", "steps")) and "failed" not in old


def table(results: Mapping[str, Any]) -> str:
    """Markdown, an arm and seed a line."""
    columns = "file,arm,seed,tokens,bits a weight,perplexity,to dense,flips of the first mask,seconds,tok/s".split(",")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in results["arms"]:
        if "failed" in row:
            lines.append(f"| {row['file']} | {row['arm']} | {row['seed']} | | | {row['failed'][:80]} | | | | |")
            continue
        dense = results["dense"][row["text"]]["perplexity"]
        metrics, score = row["metrics"], row["score"]["perplexity"]
        arm = f"{row['file'].removesuffix('.yaml')} | {row['arm']} | {row['seed']}"
        bits = f"{metrics['bits_per_weight']:.3f}" if "bits_per_weight" in metrics else ""
        lines.append(
            f"| {arm} | {metrics['tokens'] / 1e6:.1f}M | {bits} "
            f"| {score:.3f} | {score - dense:+.3f} | {metrics['initial_flip_rate']:.1%} | {row['seconds']:.0f} "
            f"| {metrics['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def measure(given: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Run what is not there yet; returns whether everything went well."""
    bench: Bench | None = None
    good, began, taken = True, time.monotonic(), dict[int | None, float]()
    for file, name, recipe, own in list(arms_of(given.files, given.arms, given.set)):
        text, tokens = given.text or next(iter(recipe.data.evaluation)), own or given.tokens
        for seed in given.seeds:
            if any(same(old, name, recipe, seed, tokens, text) for old in results["arms"]):
                print(f"{file.name} {name} seed {seed}: done before", flush=True)
                continue
            if time.monotonic() - began + taken.get(tokens, 0.0) > given.within:
                print(f"{file.name} {name} seed {seed}: no time left", flush=True)
                continue
            if bench is None or not bench.fits(recipe, text):
                bench = None  # one at a time on the device
                gc.collect()
                run = Run.open(recipe.model_copy(update={"output": str(given.runs)}), Silent())
                bench = Bench(run, text, given.runs)
                results["dense"][text] = strip(bench.score(None))
            try:
                started = time.monotonic()
                row = one(bench, file, name, recipe, seed, tokens, given.export)
                taken[tokens] = time.monotonic() - started
                told = f"{row['score']['perplexity']:.3f}  {row['seconds']:.0f} s"
            except Exception as error:  # the other arms are still worth having; the exit status tells
                good, told = False, f"failed: {type(error).__name__}: {error}"[:300]
                row = {"arm": name, "file": file.name, "seed": seed, "budget": tokens, "failed": told}
            results["arms"] = [old for old in results["arms"] if place_of(old) != place_of(row)] + [row]
            write_json(given.out, results)
            print(f"{file.name} {name} seed {seed}: {told}", flush=True)
    return good


def place_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a new result takes the place of."""
    return tuple(row.get(key) for key in ("file", "arm", "seed", "budget"))


def strip(score: Mapping[str, Any]) -> dict[str, Any]:
    """A score without its windows."""
    return {key: value for key, value in score.items() if not isinstance(value, list)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--arms",
        nargs="*",
        default=[],
        metavar="NAME",
        help="names or globs, all if absent; NAME@99.6M for other tokens",
    )
    parser.add_argument(
        "--within", type=float, default=float("inf"), help="begin no arm that would end after so many seconds"
    )
    parser.add_argument("--tokens", type=count, help="in place of the files', as in 99.6M")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--text", help="evaluation text to score; the first of the file if absent")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every file")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "sparsekit-ablation")
    parser.add_argument("--export", choices=FORMATS, help="also write each arm in this format, under --runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON; arms measured before are kept")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    given = parser.parse_args()
    results = read_json(given.out) if given.out.exists() else {"dense": {}, "arms": []}
    good = measure(given, results)
    if given.table:
        print(table(results))
    sys.exit(not good)


def count(text: str) -> int:
    """`26.2M` as a number."""
    found: int = TypeAdapter(Count).validate_python(text)
    return found


if __name__ == "__main__":
    main()
