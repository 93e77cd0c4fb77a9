"""Quantized checkpoints back into states: our own, and those of GPTQModel, AutoAWQ and llm-compressor.

A directory that sparsekit wrote is held against the digests in its `sparsekit.json` first. Whatever
does not fit is an error that names the file or the layer; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekit.checkpoint import unpack_mask
from sparsekit.errors import CheckpointError
from sparsekit.files import read_tensors
from sparsekit.formats import storage_of
from sparsekit.interchange.hfdir import MARKER, read_config
from sparsekit.interchange.since import GRID, check_grid, check_tensors, marker_of
from sparsekit.shards import tensor_places
from sparsekit.state import LinearState

MASKS = Path("sparsekit") / "masks.safetensors"  # in a folder: loaders read every *.safetensors beside the model


class QuantizedFiles(Mapping[str, LinearState]):
    """The quantized linears of a directory by their stored name; each is read when it is asked for.

    Attributes:
        directory: Where.
        storage: The format.
        setting: What its configuration says.
        quantizer: Who wrote it, as far as the files tell.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu", *, checked: bool = True) -> None:
        """Open a directory.

        Args:
            directory: With a config.json that has a `quantization_config`.
            device: Where integers are unpacked and the states are.
            checked: Hold the files of tensors against their digests; else the caller does.

        Raises:
            CheckpointError: An unknown format or version, a damaged or missing file.
        """
        self.directory = directory
        self._device = device
        marker = marker_of(directory)
        check_grid(directory, marker)
        about = read_config(directory).get(GRID)
        if not isinstance(about, dict):
            raise CheckpointError(f"{directory / 'config.json'} has no quantization_config: not quantized")
        try:
            self.storage = storage_of(about.get("quant_method"))
            self.setting = self.storage.setting(about)
        except CheckpointError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
        if not marker and self.storage.checksums:
            raise CheckpointError(f"{directory / MARKER} is missing: without its digests this format is not read")
        if checked:
            check_tensors(directory, marker)
        self._files = _index(directory, self.storage.stem if self.storage.checksums else "")
        first = next(iter(self.storage.parts))
        self._stems = {name.removesuffix(f".{first}"): None for name in self._files if name.endswith(f".{first}")}
        if not self._stems:
            raise CheckpointError(f"{directory} says quantized with {self.storage.title} and has no tensor *.{first}")
        self._masks = _masks(directory, marker)
        self.quantizer = "sparsekit" if marker else _writer(about)

    @property
    def read(self) -> set[str]:
        """Names of the files that hold its tensors."""
        return {path.name for path in self._files.values()}

    def __len__(self) -> int:
        return len(self._stems)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stems)

    def __getitem__(self, name: str) -> LinearState:
        """Read one linear.

        Raises:
            KeyError: There is no such linear.
            CheckpointError: Its tensors are incomplete or do not fit the configuration.
        """
        found = {part: value.to(self._device) for part, value in self.parts(name).items()}
        try:
            quantized = self.storage.unpack(found, self.setting)
            told = self.storage.mask(found)
            if name in self._masks:
                bits, shape = self._masks[name]
                if tuple(shape) != tuple(quantized.codes.shape):
                    raise CheckpointError(f"its mask is {shape}, the weight {list(quantized.codes.shape)}")
                told = unpack_mask(bits.to(self._device), shape)
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory}: {name}: {error}") from error
        weight = quantized.dequantize()
        if told is not None and bool((weight[~told] != 0).any()):
            raise CheckpointError(f"{self.directory}: {name}: weights that its mask calls pruned are not zero")
        return LinearState(name, weight, told, quantized)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of one linear as they are stored, by suffix.

        Raises:
            KeyError: There is no such linear.
            CheckpointError: A file is damaged.
        """
        if name not in self._stems:
            raise KeyError(name)
        return {part: self.tensor(f"{name}.{part}") for part in self.storage.parts if f"{name}.{part}" in self._files}

    def plain(self) -> dict[str, Path]:
        """The tensors that are no part of a quantized linear, and the files that hold them."""
        suffixes = {f"{stem}.{part}" for stem in self._stems for part in self.storage.parts}
        return {name: path for name, path in self._files.items() if name not in suffixes}

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            CheckpointError: Its file is damaged.
        """
        path = self._files[name]
        try:
            with safe_open(str(path), framework="pt") as file:
                value: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name} from {path}: {error}") from error
        return value


def load_quantized(directory: str | Path) -> QuantizedFiles:
    """Open a quantized checkpoint: GPTQ (versions 1 and 2), AWQ GEMM, pack-quantized, or one of sparsekit's own.

    Args:
        directory: As written by `sparsekit run`, GPTQModel, AutoAWQ or llm-compressor.
    Returns:
        A mapping from the names of its quantized linears to `LinearState`, read one at a time.
    Raises:
        CheckpointError: An unknown format or version, a damaged or missing file.
    """
    return QuantizedFiles(Path(directory))


def is_quantized(directory: Path) -> bool:
    """Whether a model directory's config.json names a quantization."""
    return bool(read_config(directory).get(GRID))


def _index(directory: Path, stem: str) -> dict[str, Path]:
    """Tensor names and their files, every shard that an index names included.

    Raises:
        CheckpointError: A file is missing or cut short.
    """
    places = tensor_places(directory, CheckpointError, stem)
    if not places:
        raise CheckpointError(f"{directory} has no {stem}*.safetensors weights")
    return places


def _masks(directory: Path, marker: Mapping[str, Any]) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Packed masks and shapes by linear, from the mask file that sparsekit writes."""
    if "masks" not in marker:
        return {}
    path = directory / MASKS
    tensors, metadata = read_tensors(path)
    try:
        shapes = json.loads(metadata["shapes"])
        return {name: (bits, tuple(shapes[name])) for name, bits in tensors.items()}
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} lacks the shape of a mask: {error}") from error


def _writer(about: Mapping[str, Any]) -> str:
    """Who wrote a checkpoint, for notes."""
    meta = about.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    told = quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer
    return str(told or "software that does not name itself")
