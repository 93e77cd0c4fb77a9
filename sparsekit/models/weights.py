"""Tensors of a Hugging Face model directory, read one at a time from its safetensors files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekit.errors import ModelError
from sparsekit.interchange.adapter import ADAPTER
from sparsekit.interchange.imports import QuantizedFiles, is_quantized
from sparsekit.interchange.since import changes
from sparsekit.models.leftovers import Leftovers, unused
from sparsekit.shards import tensor_places
from sparsekit.state import LinearState


class Weights:
    """The tensors of a model under the names its module uses.

    Most checkpoints store exactly these names, or the same with or without the base model's prefix
    (`transformer.h.0...` and `h.0...`), and are streamed. When transformers converts names or
    shapes while loading (fused experts of older checkpoints), the whole model is loaded once on
    the host through transformers.

    The linears of a quantized checkpoint are integers: `linear` gives them, `read` what they stand for.

    Attributes:
        warnings: What whoever runs the model should know: files changed since the export, tensors that
            nobody reads, a model that was loaded whole. One sentence each.
        notes: The same, and what the weights are.
    """

    def __init__(self, directory: Path, module: PreTrainedModel, *, trust_remote_code: bool) -> None:
        self.directory = directory
        self.warnings = changes(directory)
        self.quantized = QuantizedFiles(directory) if is_quantized(directory) else None
        self._files = _index(directory) if self.quantized is None else self.quantized.plain()
        self._names: dict[str, str] = {}
        self._stems: dict[str, str] = {}
        self._loaded: dict[str, Tensor] | None = None
        wanted = [name for name, _ in module.named_parameters()]
        missing = [name for name in wanted if not self._resolve(name, module.base_model_prefix)]
        if missing and self.quantized is not None:
            raise ModelError(f"{directory} has no tensor {missing[0]} ({len(missing)} tensors are missing)")
        if missing:
            self._load_whole(missing, trust_remote_code)
        else:
            self.warnings += self._left_over(module)
        self.notes = [*self._about(), *self.warnings]

    def _about(self) -> Iterator[str]:
        """What the weights are, where they are not plain values and nothing else."""
        if self.quantized is not None:
            told = self.quantized
            yield (
                f"the model is quantized: {len(self._stems)} linears in {told.storage.title} format, "
                f"{told.setting.bits} bits, written by {told.quantizer}"
            )
        if (self.directory / ADAPTER).is_dir():
            place = self.directory / ADAPTER
            yield f"{place} holds low-rank branches that are not read: without them it is another model"

    def _left_over(self, module: PreTrainedModel) -> list[str]:
        """A sentence about the tensors that no parameter is read from, and one about whole files of them.

        Raises:
            ModelError: They say that the model computes something else than config.json does.
        """
        used = {*self._names.values(), *self._stems.values()}
        held = {**self._files, **dict.fromkeys(self.quantized or (), self.directory)}
        left = Leftovers(module, [name for name in held if name not in used], self._names.values(), self._stored)
        left.check(str(self.directory))
        read = {path.name for path in self._files.values()}
        if self.quantized is not None:
            read |= self.quantized.read
        every = [path.name for path in sorted(self.directory.glob("*.safetensors"))]
        return left.told(used, [name for name in every if name not in read])

    def _stored(self, name: str) -> Tensor:
        """A tensor under the name it is stored by."""
        with safe_open(str(self._files[name]), framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        return value

    def _resolve(self, name: str, prefix: str) -> bool:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            stem = candidate.removesuffix(".weight")
            if self.quantized is not None and stem != candidate and stem in self.quantized:
                self._stems[name] = stem
                return True
            if candidate in self._files:
                self._names[name] = candidate
                return True
        return False

    def _load_whole(self, missing: list[str], trust_remote_code: bool) -> None:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.directory,
                dtype="auto",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().partition("\n")[0]
            told = f"has no tensor {missing[0]} ({len(missing)} tensors are missing)"
            raise ModelError(f"{self.directory} {told}, and Transformers cannot convert it: {first}") from error
        absent = sorted(report["missing_keys"])
        if absent:
            raise ModelError(f"{self.directory} has no tensor {absent[0]} ({len(absent)} tensors are missing)")
        self._loaded = dict(model.state_dict())
        self.warnings.append(
            f"{len(missing)} tensors are stored under other names or shapes than the model uses ({missing[0]}); "
            f"the whole model was loaded on the host to convert them"
        )
        self.warnings += unused(sorted(report["unexpected_keys"]))

    def __contains__(self, name: str) -> bool:
        return name in self._names or name in self._stems if self._loaded is None else name in self._loaded

    def linear(self, name: str, linear: str, shape: Sequence[int]) -> LinearState | None:
        """The integers of a weight as a state, or None when it is stored as values.

        Args:
            name: Of the weight in the Hugging Face model.
            linear: What the state is to be called.
            shape: [out, in] of the linear.
        Raises:
            ModelError: The model expects another shape.
            CheckpointError: The tensors are damaged or do not fit together.
        """
        if self.quantized is None or name not in self._stems:
            return None
        state = self.quantized[self._stems[name]]
        if list(state.source.shape) != list(shape):
            found = list(state.source.shape)
            raise ModelError(f"{self.directory}: {name} holds integers {found}, the model expects {list(shape)}")
        return replace(state, name=linear)

    def stem(self, name: str) -> str | None:
        """What a weight of the Hugging Face model is called in `quantized`, or None when it is stored as values."""
        return self._stems.get(name)

    def read(self, name: str, shape: Iterable[int]) -> Tensor:
        """One tensor, on the host, in its stored dtype.

        Raises:
            ModelError: It is missing, has another shape than the model expects, or the file is damaged.
        """
        if self._loaded is not None:
            return self._loaded[name]
        state = self.linear(name, name, list(shape))
        if state is not None:
            return state.weight
        path = self._files[self._names[name]]
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: Tensor = file.get_tensor(self._names[name])
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {name} from {path}: {error}") from error
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: {name} is stored as {tensor.dtype}, and weights are floating-point numbers")
        if list(tensor.shape) != list(shape):
            raise ModelError(f"{path}: {name} has shape {list(tensor.shape)}, the model expects {list(shape)}")
        return tensor

    def dtype(self) -> torch.dtype:
        """The dtype most of the file's first tensors are stored in."""
        for name, path in self._files.items():
            with safe_open(str(path), framework="pt") as file:
                found: torch.dtype = file.get_tensor(name).dtype
            if found.is_floating_point:
                return found
        raise ModelError(f"{self.directory} holds no floating-point tensor")


def _index(directory: Path) -> dict[str, Path]:
    """Tensor names and the files that hold them."""
    if not any(directory.glob("*.safetensors")):
        others = [path.name for path in directory.glob("*.bin")]
        found = f"; {others[0]} is a pickle file, which sparsekit does not open" if others else ""
        raise ModelError(f"{directory} has no .safetensors weights{found}")
    return tensor_places(directory, ModelError)
