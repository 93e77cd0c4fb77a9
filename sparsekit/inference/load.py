"""Loading a compressed model to run it: a Hugging Face model whose linears hold packed weights."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sparsekit.branch import attach
from sparsekit.errors import CheckpointError, ModelError, in_one_line
from sparsekit.formats.base import listed
from sparsekit.inference.linear import PackedLinear, Product, fused
from sparsekit.inference.packed import PackedWeight, pack, pack_file, why_not_packed
from sparsekit.interchange.adapter import ADAPTER, read_adapter
from sparsekit.models.locate import device_of, locate
from sparsekit.models.shapes import FEW, groups_of
from sparsekit.models.view import ModelView
from sparsekit.quant import QuantizedWeight

Groups = list[list[str]]


@dataclass(slots=True)
class Loaded:
    """A model ready to run, and what there is to say about it.

    Attributes:
        model: Of the transformers class its configuration names.
        path: Its directory.
        dense: Linears inside the blocks that are not packed though they are integers, by the reason.
        notes: One sentence each.
    """

    model: PreTrainedModel
    path: Path
    dense: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model to run it, its quantized linears from their packed integers.

    `model.generate` and everything else of transformers work as they do with the dense model. What runs
    slower than it could, or is left out, is said in a warning, once.

    Args:
        directory: An export of sparsekit in any format, a quantized checkpoint of others, or a dense model.
        device: `auto` is CUDA when there is one.
        dtype: What is computed in; `auto` is the checkpoint's own dtype, on a CPU float32.
        trust_remote_code: Let the checkpoint's own Python code run.
    Returns:
        The transformers model, in eval mode.
    Raises:
        ModelError: No such directory, or no causal LM.
        CheckpointError: A damaged file, or an unknown format.
    """
    loaded = load_model(directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.model


def load_model(
    directory: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """`load`, with what there is to say beside the model."""
    path = locate(str(directory))
    where = device_of(device)
    computed = "float32" if dtype == "auto" and where.type == "cpu" else dtype
    view = ModelView.open(
        path, dtype=computed, device=where, compute_dtype=computed, trust_remote_code=trust_remote_code
    )
    loaded = Loaded(view.module, path)
    with torch.no_grad():
        for index, groups in enumerate(_groups(view)):
            _fill(view, index, groups, loaded)
        if (path / ADAPTER).is_dir():
            _branches(view.module, path)
    view.module.requires_grad_(False)
    if (path / "generation_config.json").is_file():
        view.module.generation_config = _generation_config(path)
    loaded.notes += [*view.warnings, *_notes(loaded)]
    return loaded


def _generation_config(path: Path) -> GenerationConfig:
    """What a directory says about generating.

    Raises:
        ModelError: Its file cannot be read, or its ends of text are no tokens.
    """
    file = path / "generation_config.json"
    try:
        found = GenerationConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # transformers trusts what is in the file
        raise ModelError(f"{file} cannot be read: {in_one_line(error)}") from error
    ends = found.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            raise ModelError(f"{file}: eos_token_id is {ends!r}, expected a token or a list of tokens")
    return found


def products(model: nn.Module) -> list[Product]:
    """The packed weights of a model."""
    return [module for module in model.modules() if isinstance(module, Product)]


def forms_of(model: nn.Module) -> dict[str, int]:
    """How many packed weights a model has of each form, as in {"2:4 + int4": 128}."""
    return dict(Counter(product.form for product in products(model)))


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a loaded model once: packed weights, embeddings, norms, biases and buffers."""
    seen: set[tuple[int, torch.Size]] = set()
    packed = [part for product in products(model) for part in product.tensors()]
    for tensor in [*packed, *model.parameters(), *model.buffers()]:
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen.add(key)
            yield tensor


def bytes_of(model: nn.Module) -> int:
    """Bytes of every tensor of a loaded model."""
    return sum(tensor.nbytes for tensor in tensors_of(model))


def _groups(view: ModelView) -> list[Groups]:
    """For each block, its linears with one input together, in call order; no weight of a block is read.

    Blocks of the same make have the same groups, so one block of each make is run, with weights that are all one
    zero.
    """
    with torch.no_grad():
        _, calls = view.begin(torch.zeros(1, FEW, dtype=torch.long))
    found: dict[tuple[Any, ...], Groups] = {}
    every: list[Groups] = []
    for index, (block, call) in enumerate(zip(view.blocks, calls, strict=True)):
        make = tuple((name.removeprefix(block), str(linear)) for name, linear in view.linears(index).items())
        if make not in found:
            groups = groups_of(view, index, call)
            found[make] = [[name.removeprefix(block) for name in group] for group in groups]
        every.append([[block + tail for tail in group] for group in found[make]])
    return every


def _fill(view: ModelView, index: int, groups: Groups, loaded: Loaded) -> None:
    """Put a block's weights on the device, packed where they can be."""
    linears = view.linears(index)
    for name in view.parameters(index):
        if name.removesuffix(".weight") not in linears:
            view.place(name)
    for group in groups:
        packed: dict[str, PackedWeight] = {}
        for name in group:
            weight = _weight(view, name, loaded)
            if isinstance(weight, PackedWeight):
                packed[name] = weight
            elif weight is None:
                view.place(f"{name}.weight")
            else:
                linears[name].weight = nn.Parameter(weight.to(view.compute_dtype), requires_grad=False)
        install(view.module, packed, view.compute_dtype)


def install(module: nn.Module, packed: dict[str, PackedWeight], dtype: torch.dtype) -> None:
    """Let packed weights stand where linears stood that read one tensor; those of one kind become one product.

    Args:
        module: The model.
        packed: Weights by linear in the order of calls; emptied, so that nothing is held twice.
        dtype: Of the activations.
    """
    kinds: dict[Any, list[str]] = {}
    for name, weight in packed.items():
        kinds.setdefault(weight.kind, []).append(name)
    for names in kinds.values():
        weights = [(packed.pop(name), _bias(module.get_submodule(name))) for name in names]
        for name, linear in zip(names, fused(weights, dtype), strict=True):
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, linear)


def _bias(linear: nn.Module) -> Tensor | None:
    return linear.bias.detach() if isinstance(linear, nn.Linear) and linear.bias is not None else None


def _weight(view: ModelView, name: str, loaded: Loaded) -> PackedWeight | Tensor | None:
    """A linear's weight on the device: packed, or the values of integers that cannot be, or None for plain values."""
    stored = view.integers(name)
    if stored is None:
        return None
    storage, setting, parts = stored
    found = {part: value.to(view.device) for part, value in parts.items()}
    linear = view.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # the view has only those
    try:
        weight = pack_file(found, setting) or storage.unpack(found, setting)
    except CheckpointError as error:
        raise CheckpointError(f"{view.path}: {name}: {error}") from error
    shape = weight.shape if isinstance(weight, PackedWeight) else tuple(weight.codes.shape)
    if shape != tuple(linear.weight.shape):
        wanted = list(linear.weight.shape)
        raise ModelError(f"{view.path}: {name} holds integers {list(shape)}, the model expects {wanted}")
    return weight if isinstance(weight, PackedWeight) else _packed_or_dense(weight, name, loaded)


def _packed_or_dense(weight: QuantizedWeight, name: str, loaded: Loaded) -> PackedWeight | Tensor:
    """Pack integers where they can be, and else remember why not."""
    why = why_not_packed(weight)
    if why is None:
        return pack(weight)
    loaded.dense.setdefault(why, []).append(name)
    return weight.dequantize()


def _branches(module: nn.Module, path: Path) -> None:
    """Let the linears compute the low-rank branches of the export.

    Raises:
        CheckpointError: They do not fit the model.
    """
    for name, branch in read_adapter(path).items():
        try:
            linear = module.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"{path / ADAPTER} does not fit the model: it lacks {name}") from error
        if isinstance(linear, PackedLinear):
            linear.attach(branch)
        elif isinstance(linear, nn.Linear):
            attach(linear, branch)


def _notes(loaded: Loaded) -> Sequence[str]:
    """Which integers run as dense weights and why; which packed weights run without the kernel, where it could."""
    said = [
        f"{len(names)} linears are held dense, not packed ({listed(names)}): {why}"
        for why, names in loaded.dense.items()
    ]
    reasons: dict[str, int] = {}
    for product in products(loaded.model):
        if product.why_reference and product.device.type == "cuda":
            reasons[product.why_reference] = reasons.get(product.why_reference, 0) + 1
    return said + [f"{count} packed weights run without the decode kernel: {why}" for why, count in reasons.items()]
