"""What a model directory holds, as sparsekit sees it: architecture, patterns, bits, violations.

Any safetensors directory will do: a dense model, zeros of others stored as zeros, a quantized
checkpoint. A model transformers cannot build is looked at tensor by tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekit.errors import CheckpointError, ModelError, RecipeError
from sparsekit.interchange.since import changes
from sparsekit.models.groups import Producer
from sparsekit.models.locate import locate
from sparsekit.models.shapes import FEW, entering, sizes_of, width_of
from sparsekit.models.view import ModelView
from sparsekit.pattern import Pattern
from sparsekit.state import LinearState

LENGTHS = (2, 4, 8, 16, 32)  # of a group, in the order patterns are looked for
SPARSE = 0.05  # share of zeros from which a layer counts as sparse
CHANCE = 1e-4  # a pattern that scattered zeros would hold more often than this is none
MOST = 250_000_000  # parameters of a block for which made-up weights are worth their memory


@dataclass(frozen=True, slots=True)
class LayerLook:
    """One linear.

    Attributes:
        name: Full name.
        shape: [out, in].
        sparsity: Share of exact zeros.
        pattern: What every group holds, as in "2:4"; "unstructured" or "dense" where there is no such thing.
        counted: The pattern violations are counted of, None for none.
        not_finite: Values that are inf or NaN.
        groups: Groups counted.
        violations: Groups with more non-zeros than `counted` allows.
        bits: Bits of a code, None for plain values.
        group_size: Inputs that share a scale, None for plain values.
        dtype: Of plain values.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str
    counted: str | None
    not_finite: int
    groups: int
    violations: int
    bits: int | None
    group_size: int | None
    dtype: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {field: getattr(self, field) for field in self.__slots__} | {"shape": list(self.shape)}


def detected(weight: Tensor) -> str:
    """The tightest N:M every group of a weight [out, in] holds and not by chance, else "unstructured" or "dense"."""
    nonzero = weight != 0
    kept = float(nonzero.float().mean())
    found: list[tuple[float, int, int]] = []
    for m in LENGTHS:
        if weight.shape[1] % m == 0:
            n = int(nonzero.reshape(len(weight), -1, m).sum(-1).max())
            if 0 < n < m and by_chance(n, m, kept, weight.numel() // m) < CHANCE:
                found.append((n / m, m, n))
    if found:
        _, m, n = min(found)
        return f"{n}:{m}"
    if not bool(nonzero.any()):
        return "all zero"
    return "unstructured" if float((~nonzero).float().mean()) >= SPARSE else "dense"


def by_chance(n: int, m: int, kept: float, groups: int) -> float:
    """Probability that no group of M holds more than N non-zeros when they lie anywhere."""
    within = sum(math.comb(m, k) * kept**k * (1 - kept) ** (m - k) for k in range(n + 1))
    return min(within, 1.0) ** groups


def look(state: LinearState, dtype: str, counted: Pattern | None) -> LayerLook:
    """Look at one linear; violations are those of `counted`."""
    weight, quantized = state.weight, state.quantized
    applies = counted is not None and counted.structured and counted.fits(weight.shape[1])
    return LayerLook(
        name=state.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity=float((weight == 0).float().mean()),
        pattern=detected(weight),
        counted=str(counted) if applies else None,
        not_finite=int((~torch.isfinite(weight)).sum()),
        groups=counted.groups(weight) if counted is not None and applies else 0,
        violations=counted.violations(weight) if counted is not None and applies else 0,
        bits=quantized.bits if quantized else None,
        group_size=quantized.group_size if quantized else None,
        dtype=None if quantized else dtype,
    )


def main_pattern(patterns: Mapping[str, str], sparsities: Mapping[str, float]) -> Pattern | None:
    """What the sparse layers of a model seem meant to hold: their commonest N:M, or 2:4 for about half zeros."""
    structured = Counter(pattern for pattern in patterns.values() if ":" in pattern)
    if structured:
        return Pattern.parse(structured.most_common(1)[0][0])
    half = [name for name, share in sparsities.items() if 0.4 <= share <= 0.6]
    return Pattern(2, 4) if half else None


def pattern_of(text: str | None) -> Pattern | None:
    """The pattern of a command line.

    Raises:
        RecipeError: It is none.
    """
    try:
        return None if text is None else Pattern.parse(text)
    except ValueError as error:
        raise RecipeError(str(error), where="--pattern") from error


def inspect_model(path: str, *, pattern: Pattern | None = None) -> dict[str, Any]:
    """Look at a model.

    Args:
        path: A directory, or builtin:NAME.
        pattern: Count violations of it; by default of what most sparse layers hold.
    Raises:
        ModelError: No such directory, or nothing in it can be read.
    """
    directory = locate(path)
    try:
        view = ModelView.open(directory, device="cpu", empty=True)
    except ModelError as error:
        states, found = dict(_raw(directory)), {"notes": [f"{error}; its matrices are looked at one by one"]}
        return {**_base(directory), **found, "layers": _layers(lambda: iter(states.values()), "as stored", pattern)}
    dtype = str(view.dtype).removeprefix("torch.")
    layers, about = _layers(lambda: _linears(view), dtype, pattern), _architecture(view)
    notes = [*view.notes, *changes(directory, weights=True), *_striking(layers, pattern)]  # all is read here anyway
    return {**_base(directory), **about, "notes": list(dict.fromkeys(notes)), "layers": layers}


def _striking(layers: Sequence[Mapping[str, Any]], pattern: Pattern | None) -> Iterator[str]:
    """What the table of layers would not show, a sentence each."""
    broken = [layer["name"] for layer in layers if layer["not_finite"]]
    if broken:
        yield f"{len(broken)} linears hold inf or NaN: {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}"
    if pattern is not None and not any(layer["counted"] for layer in layers):
        yield f"the groups of {pattern} divide the inputs of no layer: nothing was counted"


def _base(directory: Path) -> dict[str, Any]:
    files = sorted(directory.glob("*.safetensors"))
    return {"path": str(directory), "bytes": sum(file.stat().st_size for file in files), "files": len(files)}


def _linears(view: ModelView) -> Iterator[LinearState]:
    """Every linear, one block in memory at a time."""
    for index in range(len(view.blocks)):
        yield from view.dense_block(index).linears.values()


def _layers(states: Any, dtype: str, pattern: Pattern | None) -> list[dict[str, Any]]:
    """Two passes: the first finds what the model is meant to hold, the second counts who breaks it."""
    if pattern is None:
        firsts = [look(state, dtype, None) for state in states()]
        pattern = main_pattern({x.name: x.pattern for x in firsts}, {x.name: x.sparsity for x in firsts})
        if pattern is None:
            return [first.as_dict() for first in firsts]
    looks = [look(state, dtype, pattern) for state in states()]
    return [one.as_dict() for one in looks]


def _architecture(view: ModelView) -> dict[str, Any]:
    """Blocks, groups, who feeds them, and the ledger of all parameters."""
    sizes, ledger = sizes_of(view), view.ledger()
    totals: dict[str, int] = {}
    for row in ledger:
        totals[row.category] = totals.get(row.category, 0) + row.numel
    kinds: list[dict[str, Any]] = []
    seen: dict[Any, dict[str, Any]] = {}
    for index, block in enumerate(sizes.blocks):
        name = view.blocks[index]
        key = tuple((full.removeprefix(name), shape) for full, shape in block.linears.items())
        if key not in seen:
            seen[key] = {"first": name, "count": 0, "groups": _groups(view, index, block.groups, block.numel)}
            kinds.append(seen[key])
        seen[key]["count"] += 1
    return {
        "architecture": type(view.module).__name__,
        "parameters": sizes.numel,
        "blocks": len(sizes.blocks),
        "kinds": kinds,
        "ledger": totals,
        "unreachable": {row.name: row.numel for row in ledger if row.category == "not reachable"},
    }


def _made_up(shape: torch.Size) -> Tensor:
    return torch.randn(shape) / math.sqrt(shape[-1]) if len(shape) > 1 else torch.rand(shape) + 0.5


def _groups(view: ModelView, index: int, groups: Any, numel: int) -> list[dict[str, Any]]:
    """Linears that share an input, and what absorbs a scale of it, proven on made-up weights."""
    prefix, found = view.blocks[index] + ".", list[Any]()
    if numel > MOST:
        found = [f"not looked for: a block has {numel:,} parameters"] * len(groups)
    else:
        call = entering(view, 1, FEW)[index]
        torch.manual_seed(0)
        view.pretend(index, _made_up)
        hidden = torch.randn(1, FEW, width_of(view))
        try:
            with torch.inference_mode():
                found = list(view.producers(index, [list(group) for group in groups], hidden, call))
        finally:
            view.release(index)
    return [
        {
            "linears": [name.removeprefix(prefix) for name in group],
            "inputs": view.module.get_submodule(group[0]).in_features,
            "producer": one.module.removeprefix(prefix) if isinstance(one, Producer) else None,
            "why": None if isinstance(one, Producer) else one,
        }
        for group, one in zip(groups, found, strict=True)
    ]


def _raw(directory: Path) -> Iterator[tuple[str, LinearState]]:
    """Every matrix of floating-point values of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} has no .safetensors weights")
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    tensor: Tensor = file.get_tensor(name)
                    if tensor.dim() == 2 and tensor.is_floating_point():
                        yield name, LinearState(name.removesuffix(".weight"), tensor.float())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
