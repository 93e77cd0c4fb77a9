"""The command line. No logic lives here, and torch is imported only by the commands that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsekit import __version__
from sparsekit.terminal.exits import named_errors, named_errors_nothing_kept


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sparsekit")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and the libraries' own messages.")
def main(verbose: bool) -> None:
    """Make a causal language model smaller, and know what it cost.

    A recipe names a model, texts, and the steps to apply: pruners, sparse training and quantizers.
    """
    if not verbose:
        _quiet()


def _quiet() -> None:
    """Silence the libraries' progress bars and advice; sparsekit's own messages stay."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, as in --set steps.1.bits=3."
)
_plugin = click.option(
    "--plugin", "plugins", multiple=True, type=click.Path(path_type=Path), help="Load a plugin file; may be repeated."
)

_trust = click.option(
    "--trust-remote-code", "trust", is_flag=True, help="Agree to a recipe's trust_remote_code: the model's code runs."
)


def _load_plugins(paths: tuple[Path, ...]) -> None:
    from sparsekit.registry import METHODS

    for path in paths:
        METHODS.load_path(path)


@main.command()
@_recipe
@_set
@_plugin
@_trust
@click.option("--dry-run", is_flag=True, help="Check the recipe against the model, print the plan and stop.")
@named_errors
def run(recipe: Path, overrides: tuple[str, ...], plugins: tuple[Path, ...], trust: bool, dry_run: bool) -> None:
    """Run RECIPE, or continue it where it stopped."""
    from rich.console import Console

    from sparsekit.recipe import read_recipe, refuse_code
    from sparsekit.run import Run
    from sparsekit.terminal.console import Terminal
    from sparsekit.terminal.plan import print_plan

    read = read_recipe(recipe, overrides, plugins=plugins)
    refuse_code(read, trust)
    if dry_run:
        print_plan(Console(), read)
    else:
        Run.open(read, Terminal(Console())).execute()


@main.command()
@_recipe
@_set
@_plugin
@_trust
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, every layer and every part.")
@named_errors
def plan(recipe: Path, overrides: tuple[str, ...], plugins: tuple[Path, ...], trust: bool, as_json: bool) -> None:
    """Predict what RECIPE does to each layer, and its memory, disk and time, without reading weights."""
    import json

    from rich.console import Console

    from sparsekit.planning.estimate import Estimator
    from sparsekit.recipe import read_recipe, refuse_code
    from sparsekit.terminal.plan import print_plan

    read = read_recipe(recipe, overrides, plugins=plugins)
    refuse_code(read, trust)
    if as_json:
        click.echo(json.dumps(Estimator.open(read).all(), indent=2))
    else:
        print_plan(Console(), read)


@main.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@_set
@_plugin
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the comparison; default runs/NAME.")
@click.option("--deploy", is_flag=True, help="Measure the speed of every arm on this device too.")
@named_errors
def compare(
    sources: tuple[Path, ...], overrides: tuple[str, ...], plugins: tuple[Path, ...], out: Path | None, deploy: bool
) -> None:
    """Compare recipes, the arms of one file with `variants:`, or finished run directories."""
    from rich.console import Console

    from sparsekit.compare import compare_sources
    from sparsekit.terminal.compare import ComparisonTerminal

    terminal = ComparisonTerminal(Console())
    compare_sources(sources, overrides, plugins=plugins, out=out, deploy=deploy, listener=terminal)


@main.command()
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--deploy", is_flag=True, help="Measure bytes, memory and speed on this device, and add the card.")
@named_errors
def report(run_directory: Path, deploy: bool) -> None:
    """Write the report of a finished RUN again, with a deploy card if asked for."""
    from rich.console import Console

    from sparsekit.deployed import add_card
    from sparsekit.reporting.report import kept_report, write_report
    from sparsekit.terminal.console import Terminal

    terminal = Terminal(Console())
    found = add_card(run_directory, terminal) if deploy else kept_report(run_directory)
    terminal.closed(found, write_report(found, run_directory))


@main.command()
@click.argument("model")
@click.option("--pattern", help="Count violations of this pattern, as in 2:4; default: what most sparse layers hold.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, layer by layer.")
@named_errors
def inspect(model: str, pattern: str | None, as_json: bool) -> None:
    """Show MODEL as sparsekit sees it: blocks, groups, and the pattern, bits and violations of its layers."""
    import json

    from rich.console import Console

    from sparsekit.models.inspection import inspect_model, pattern_of
    from sparsekit.terminal.inspect import print_inspection

    found = inspect_model(model, pattern=pattern_of(pattern))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_inspection(Console(), found)


@main.command()
@click.argument("name", required=False)
@_plugin
@named_errors
def methods(name: str | None, plugins: tuple[Path, ...]) -> None:
    """List the methods, export formats, evaluators and report sections, or show what is called NAME."""
    from rich.console import Console

    from sparsekit.evaluation.measures import EVALUATORS
    from sparsekit.formats import FORMATS
    from sparsekit.registry import METHODS
    from sparsekit.reporting.sections import SECTIONS
    from sparsekit.shelf import Shelf
    from sparsekit.terminal.console import method_page, methods_table, shelf_page, shelves_table

    _load_plugins(plugins)
    console = Console()
    shelves: tuple[Shelf[Any], ...] = (FORMATS, EVALUATORS, SECTIONS)
    if name is None:
        console.print(methods_table(METHODS), "", shelves_table(shelves), sep="\n", highlight=False)
        return
    pages = [shelf_page(shelf.noun, shelf[name]) for shelf in shelves if name in shelf]
    if name in METHODS.names() or not pages:
        pages.insert(0, method_page(METHODS.get(name)))
    console.print(*pages, sep="\n\n", highlight=False)


@main.command()
@_plugin
@named_errors
def schema(plugins: tuple[Path, ...]) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from sparsekit.recipe import recipe_schema

    _load_plugins(plugins)
    click.echo(json.dumps(recipe_schema(), indent=2))


@main.command()
@click.argument("name")
@_plugin
@click.option("--set", "values", multiple=True, metavar="KEY=VALUE", help="A parameter of the method or evaluator.")
@named_errors
def check(name: str, plugins: tuple[Path, ...], values: tuple[str, ...]) -> None:
    """Try what every method, export format, evaluator or report section promises, on the one called NAME."""
    from rich.console import Console

    from sparsekit.errors import ContractError
    from sparsekit.terminal.console import outcomes_table
    from sparsekit.testing import outcomes
    from sparsekit.testing.specimens import assigned

    _load_plugins(plugins)
    found = outcomes(name, arguments=assigned(values))
    for noun, tried in found.items():
        Console().print(outcomes_table(f"{noun} {name}", tried), highlight=False)
    every = [outcome for tried in found.values() for outcome in tried]
    failed = [outcome.error for outcome in every if outcome.status == "failed"]
    if failed:
        raise ContractError(f"{name!r} breaks {len(failed)} of {len(every)} promises") from failed[0]


@main.command()
@click.option("--small", is_flag=True, help="A block that a CPU compresses in seconds, not Llama-2-7B's.")
@click.option("--device", default="auto", show_default=True, help="Where: cuda or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@named_errors
def bench(small: bool, device: str, as_json: bool) -> None:
    """Time SparseGPT and GPTQ of one block beside the papers' column recursion."""
    import json

    from rich.console import Console

    from sparsekit import bench as benches
    from sparsekit.terminal.bench import LEGEND, bench_table

    console = Console()
    told = (lambda job, rows: None) if as_json else (lambda job, rows: console.print(bench_table(job, rows)))
    found = benches.run_bench(benches.SMALL if small else benches.LLAMA_7B, device, told=told)
    if as_json:
        click.echo(json.dumps({"shape": benches.described(small), "jobs": found}, indent=2))
    else:
        console.print(LEGEND, highlight=False)


@main.command()
@click.argument("directory")
@click.option("--prompt", required=True, help="The text to go on from.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Tokens to generate at most.")
@click.option(
    "--temperature", type=float, default=0.0, help="0, the default, takes the most likely token; above, draws."
)
@click.option("--seed", type=int, default=0, show_default=True, help="For drawing.")
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@click.option("--fuse", is_flag=True, help="Compile the step first: a minute for a large model, then faster tokens.")
@click.option("--device", default="auto", show_default=True, help="Where: cuda or cpu.")
@click.option("--dtype", default="auto", help="What is computed in; the checkpoint's own, on a CPU float32.")
@click.option("--stats", "with_stats", is_flag=True, help="Print time to first token, tokens per second and memory.")
@_plugin
@named_errors_nothing_kept
def generate(
    directory: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    fuse: bool,
    device: str,
    dtype: str,
    with_stats: bool,
    plugins: tuple[Path, ...],
) -> None:
    """Go on from a prompt with the model in DIRECTORY, its weights packed as they are on disk."""
    from functools import partial

    from sparsekit.data import load_tokenizer
    from sparsekit.inference.generate import Stats, check_settings, prompt_tokens, stream
    from sparsekit.inference.load import forms_of, load_model
    from sparsekit.models.locate import locate
    from sparsekit.shortage import named
    from sparsekit.terminal.generate import stats_lines, write_text

    _load_plugins(plugins)
    check_settings(max_tokens, temperature, seed)
    tokenizer = load_tokenizer(locate(directory), trust_remote_code=False)
    tokens = prompt_tokens(tokenizer, prompt, chat=chat)
    with named("Choose another device, a shorter prompt or a smaller --max-tokens"):
        loaded, stats = load_model(directory, device=device, dtype=dtype), Stats()
        for note in loaded.notes:
            click.echo(f"note: {note}", err=True)
        coming = stream(
            loaded.model, tokens, max_tokens=max_tokens, temperature=temperature, seed=seed, fuse=fuse, stats=stats
        )
        try:
            write_text(coming, tokenizer, partial(click.echo, nl=False))
        finally:
            for line in stats_lines(stats, forms_of(loaded.model)) if with_stats and stats.tokens else ():
                click.echo(line, err=True)


@main.command("new-method")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["prune", "quantize", "allocate", "format", "evaluator", "section"]),
    default="prune",
    show_default=True,
    help="What it brings; allocate is a sparsity for each layer, section one of the report.",
)
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), default=".", help="Where; default here.")
@named_errors
def new_method(name: str, kind: str, directory: Path) -> None:
    """Write a working plugin NAME.py and its test."""
    from sparsekit.testing import scaffold

    plugin, test = scaffold.new_method(name, kind, directory)
    click.echo(f"{plugin}  the plugin\n{test}  its test")
    click.echo(f"\nsparsekit check {name} --plugin {plugin}\npython -m pytest {test}")
