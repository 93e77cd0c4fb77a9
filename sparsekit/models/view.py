"""One Hugging Face causal LM as sparsekit sees it: a list of blocks, loaded one at a time.

The module is built with its parameters on the meta device. What lies outside the blocks (embeddings,
final norm, head) is loaded at once; a block's weights are there only between `materialise` and
`release`. How blocks are found and run is in `sparsekit.models.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekit.branch import attach, detach
from sparsekit.checkpoint import HOST, BlockState, Stored
from sparsekit.errors import NumericsError
from sparsekit.formats.base import Setting, Storage
from sparsekit.models.arch import Form, Origin, canonicalise
from sparsekit.models.blocks import BlockModel, sites
from sparsekit.models.locate import device_of, dtype_of, locate, offline, skeleton
from sparsekit.models.weights import Weights
from sparsekit.state import LinearState


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One parameter tensor and what sparsekit can do with it.

    Attributes:
        name: Full path of the linear, or of the parameter.
        numel: Entries; a tied tensor is counted once.
        category: `linear`, `kept by rule` (embeddings, head, norms, biases) or `not reachable`.
    """

    name: str
    numel: int
    category: str


class ModelView(BlockModel):
    """A model directory, opened; see `open`."""

    def __init__(
        self,
        path: Path,
        module: PreTrainedModel,
        weights: Weights,
        origins: Mapping[str, Origin],
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool,
        empty: bool = False,
    ) -> None:
        super().__init__(path, module, device)
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.trust_remote_code = trust_remote_code
        self.notes, self.warnings = weights.notes, weights.warnings
        self.quantized = weights.quantized is not None
        self._weights = weights
        self._origins = origins
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._sites = sites(module)
        self._changed: set[str] = set()
        for name in [] if empty else self._outside():
            self._place(name, self._read(name))
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(device))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        compute_dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        trust_remote_code: bool = False,
        allow_network: bool = False,
        empty: bool = False,
    ) -> ModelView:
        """Open a directory with a Hugging Face causal LM.

        Args:
            path: A directory, `builtin:NAME`, or a hub id if `allow_network`.
            dtype: What weights are stored in; `auto` is the checkpoint's own.
            compute_dtype: What forwards compute in; `auto` is float32 on CPU, else `dtype`.
            device: `auto` is CUDA when there is one.
            trust_remote_code: Let the checkpoint's own Python code run.
            allow_network: Let a hub id be downloaded.
            empty: Read headers only and leave every parameter on meta, to look at the structure.
        Raises:
            ModelError: No such directory, no safetensors weights, a missing or misshapen tensor,
                or no repeated blocks with linear layers.
        """
        directory = locate(str(path), allow_network=allow_network)
        with offline(allow_network):
            module = skeleton(directory, trust_remote_code)
            weights = Weights(directory, module, trust_remote_code=trust_remote_code)
        origins = canonicalise(module)
        where = device_of(device)
        stored = weights.dtype() if dtype == "auto" else dtype_of(dtype)
        default = torch.float32 if where.type == "cpu" else stored
        computed = default if compute_dtype == "auto" else dtype_of(compute_dtype)
        return cls(directory, module, weights, origins, stored, computed, where, trust_remote_code, empty)

    def copy(self) -> ModelView:
        """The same model, opened once more; no block of it is loaded."""
        return ModelView.open(
            self.path,
            dtype=self.dtype,
            compute_dtype=self.compute_dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    # what there is

    def parameters(self, index: int) -> list[str]:
        """The parameters of a block by full path."""
        return [name for name in self._shapes if name.startswith(f"{self.blocks[index]}.")]

    def ledger(self) -> list[LedgerRow]:
        """Every parameter tensor and whether a step can reach it."""
        linears = {f"{name}.weight": name for index in range(len(self.blocks)) for name in self.linears(index)}
        rows = []
        for name, shape in self._shapes.items():
            if name in linears:
                rows.append(LedgerRow(linears[name], shape.numel(), "linear"))
            elif self._inside(name) and len(shape) >= 2:
                rows.append(LedgerRow(name, shape.numel(), "not reachable"))
            else:
                rows.append(LedgerRow(name, shape.numel(), "kept by rule"))
        return rows

    def _inside(self, name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in self.blocks)

    def _outside(self) -> list[str]:
        return [name for name in self._shapes if not self._inside(name)]

    # weights in and out

    def dense_block(self, index: int) -> BlockState:
        """A block's tensors as the model's files have them, on the host; integers as integers."""
        return self.stored_block(index).on(HOST)

    def stored_block(self, index: int) -> Stored:
        """`dense_block`, not yet made into states."""
        linears = {f"{name}.weight": name for name in self.linears(index)}
        tensors: dict[str, Tensor] = {}
        integers: dict[str, LinearState] = {}
        for name in self.parameters(index):
            stored = None
            if name in linears:
                origin = self._origins.get(name, Origin(name))
                stored = self._weights.linear(origin.name, linears[name], self._shapes[name])
            if stored is None:
                tensors[name] = self._read(name)
            else:
                integers[name] = stored

        def states(found: Mapping[str, Tensor]) -> BlockState:
            block = BlockState({}, {})
            for name in [name for name in self._shapes if name in found or name in integers]:
                if name in linears:
                    linear = linears[name]
                    block.linears[linear] = integers.get(name) or LinearState(linear, found[name].float())
                else:
                    block.params[name] = found[name]
            return block

        return Stored(tensors, states)

    def integers(self, linear: str) -> tuple[Storage, Setting, dict[str, Tensor]] | None:
        """The tensors of a quantized linear as the model's files have them, on the host; None when it is not one."""
        held, stem = self._weights.quantized, self._stem(linear)
        return None if stem is None or held is None else (held.storage, held.setting, held.parts(stem))

    def form(self, linear: str) -> Form:
        """How the Hugging Face model stores a linear."""
        return self._origins.get(f"{linear}.weight", Origin(linear)).form

    def setting(self, linear: str) -> Setting | None:
        """The setting of a linear that the model's files have as integers, or None; nothing of it is read."""
        held = self._weights.quantized
        return None if held is None or self._stem(linear) is None else held.setting

    def _stem(self, linear: str) -> str | None:
        weight = f"{linear}.weight"
        return self._weights.stem(self._origins.get(weight, Origin(weight)).name)

    def place(self, name: str) -> None:
        """Put one parameter on the device as the model's files have it."""
        self._place(name, self._read(name))

    def rest(self) -> dict[str, Tensor]:
        """The tensors outside the blocks as they stand, tied ones once."""
        return {name: self.module.get_parameter(name).detach() for name in self._outside()}

    def load_rest(self, rest: Mapping[str, Tensor]) -> None:
        """Replace tensors outside the blocks; those not named return to the model's own."""
        for name in self._changed - rest.keys():
            self._place(name, self._read(name))
        for name, value in rest.items():
            self._place(name, value)
        self._changed = set(rest)

    def materialise(self, index: int, block: BlockState) -> None:
        """Put a block's values on the device, rounded to the stored dtype, in the compute dtype."""
        linears = self.linears(index)
        for name, state in block.linears.items():
            self._place(f"{name}.weight", state.weight)
            linear = linears[name]
            if state.branch is None:
                detach(linear)
            else:
                attach(linear, state.branch.stored(self.dtype))
        for name, value in block.params.items():
            self._place(name, value)

    def materialise_all(self, blocks: Iterable[BlockState]) -> None:
        """Put every block on the device."""
        for index, block in enumerate(blocks):
            self.materialise(index, block)

    def release(self, index: int) -> None:
        """Drop a block's values."""
        for linear in self.linears(index).values():
            detach(linear)
        for name, shape in self._shapes.items():
            if name.startswith(f"{self.blocks[index]}."):
                self._set(name, torch.empty(shape, dtype=self.compute_dtype, device="meta"))

    def pretend(self, index: int | None, make: Callable[[torch.Size], Tensor]) -> None:
        """Put made-up values into a block, or outside the blocks for None; a plan reads no weights."""
        for name, shape in self._shapes.items():
            if name.startswith(f"{self.blocks[index]}.") if index is not None else not self._inside(name):
                self._set(name, make(shape))

    def to_hf(self, index: int, block: BlockState) -> dict[str, Tensor]:
        """A block's tensors under the names and shapes of the Hugging Face model, in the stored dtype."""
        tensors = {f"{name}.weight": state.weight for name, state in block.linears.items()} | block.params
        result: dict[str, Tensor] = {}
        slices: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            origin = self._origins.get(name, Origin(name))
            stored = tensor.to(self.dtype)
            if origin.form == "expert":
                slices.setdefault(origin.name, {})[origin.expert] = stored
            else:
                result[origin.name] = origin.take(stored)  # a transposition is its own inverse
        for name, experts in slices.items():
            result[name] = torch.stack([experts[expert] for expert in range(len(experts))])
        return result

    def rest_to_hf(self) -> dict[str, Tensor]:
        """The tensors outside the blocks under Hugging Face names, in the stored dtype."""
        return {name: value.to(self.dtype) for name, value in self.rest().items()}

    def _read(self, name: str) -> Tensor:
        origin = self._origins.get(name, Origin(name))
        experts = sum(other.name == origin.name for other in self._origins.values())
        return origin.take(self._weights.read(origin.name, origin.shape(self._shapes[name], experts)))

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Add to an error about numbers that the model's own files hold an inf or NaN, when they do.

        All files are read for it, and only then: nobody wants to wait for that before every run.
        """
        try:
            yield
        except NumericsError as error:
            found = next(filter(None, map(self._not_finite, self._shapes)), "")
            if not found:
                raise
            raise NumericsError(f"{error}; {self.path}: {found}") from error

    def _not_finite(self, name: str) -> str:
        broken = int((~torch.isfinite(self._read(name).to(self.dtype))).sum())
        kind = str(self.dtype).removeprefix("torch.")
        return f"{name} holds {broken:,} values that are inf or NaN in {kind}" if broken else ""

    def _place(self, name: str, value: Tensor) -> None:
        self._set(name, value.to(self.dtype).to(self.device, self.compute_dtype, copy=True))

    def _set(self, name: str, value: Tensor) -> None:
        parameter = nn.Parameter(value, requires_grad=False)
        for owner, attribute in self._sites[name]:
            setattr(owner, attribute, parameter)
