"""Tensors of a Hugging Face model directory, read one at a time from its safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekit.errors import ModelError


class Weights:
    """The tensors of a model under the names its module uses.

    Most checkpoints store exactly these names, or the same with or without the base model's prefix
    (`transformer.h.0...` and `h.0...`), and are streamed. When transformers converts names or
    shapes while loading (fused experts of older checkpoints), the whole model is loaded once on
    the host through transformers, and `note` says so.
    """

    def __init__(self, directory: Path, module: PreTrainedModel, *, trust_remote_code: bool) -> None:
        self.directory = directory
        self.note = ""
        self._files = _index(directory)
        self._names: dict[str, str] = {}
        self._loaded: dict[str, Tensor] | None = None
        wanted = [name for name, _ in module.named_parameters()]
        missing = [name for name in wanted if not self._resolve(name, module.base_model_prefix)]
        if missing:
            self._load_whole(missing, trust_remote_code)

    def _resolve(self, name: str, prefix: str) -> bool:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in self._files:
                self._names[name] = candidate
                return True
        return False

    def _load_whole(self, missing: list[str], trust_remote_code: bool) -> None:
        model, report = AutoModelForCausalLM.from_pretrained(
            self.directory, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
        absent = sorted(report["missing_keys"])
        if absent:
            raise ModelError(f"{self.directory} has no tensor {absent[0]} ({len(absent)} tensors are missing)")
        self._loaded = dict(model.state_dict())
        self.note = (
            f"{len(missing)} tensors are stored under other names or shapes than the model uses ({missing[0]}); "
            f"the whole model was loaded on the host to convert them"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._names if self._loaded is None else name in self._loaded

    def read(self, name: str, shape: Iterable[int]) -> Tensor:
        """One tensor, on the host, in its stored dtype.

        Raises:
            ModelError: It is missing, has another shape than the model expects, or the file is damaged.
        """
        if self._loaded is not None:
            return self._loaded[name]
        path = self._files[self._names[name]]
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: Tensor = file.get_tensor(self._names[name])
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {name} from {path}: {error}") from error
        if list(tensor.shape) != list(shape):
            raise ModelError(f"{path}: {name} has shape {list(tensor.shape)}, the model expects {list(shape)}")
        return tensor

    def dtype(self) -> torch.dtype:
        """The dtype most of the file's first tensors are stored in."""
        name = next(iter(self._files))
        with safe_open(str(self._files[name]), framework="pt") as file:
            found: torch.dtype = file.get_tensor(name).dtype
        return found


def _index(directory: Path) -> dict[str, Path]:
    """Tensor names and the files that hold them."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = [path.name for path in directory.glob("*.bin")]
        found = f"; {others[0]} is a pickle file, which sparsekit does not open" if others else ""
        raise ModelError(f"{directory} has no .safetensors weights{found}")
    index: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                index.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is no whole safetensors file: {error}") from error
    return index
