"""A causal LM as a list of blocks, which are run one at a time; blocks are found by structure, not by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsekit.errors import ModelError
from sparsekit.models.groups import Producer, find_producers, shared_inputs
from sparsekit.models.streams import stream_doors


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with besides its hidden states: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Stop(Exception):
    """Ends a skeleton pass once the last block has been called."""


class BlockModel:
    """A module, the paths of its blocks, and forwards that stop between them.

    Attributes:
        path: Directory of the model, for messages.
        module: The module; nothing here asks where its weights are.
        config: Its configuration.
        device: Where tokens go.
        blocks: Paths of the blocks, in order.
    """

    def __init__(self, path: Path, module: PreTrainedModel, device: torch.device) -> None:
        self.path = path
        self.module = module
        self.config: PreTrainedConfig = module.config
        self.device = device
        self.blocks = _find_blocks(module)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a block by full path, in module order."""
        block = self.blocks[index]
        modules = self.module.get_submodule(block).named_modules(prefix=block)
        return {name: module for name, module in modules if isinstance(module, nn.Linear)}

    # forwards

    def begin(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Embed tokens, int [batch, seq_len]: the hidden states [batch, seq_len, width] that enter
        block 0, and what each block is called with besides. No block weight is touched.
        """  # noqa: D205
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            hidden.append(x)
            calls.append(Call(args, kwargs))
            if len(calls) == len(self.blocks):
                raise _Stop
            return x

        with self._replaced(lambda index: record):
            try:
                self._forward(tokens)
            except _Stop:
                return hidden[0], calls
        raise ModelError(f"{self.path}: a forward called {len(calls)} of {len(self.blocks)} blocks")

    def run_block(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Run a resident block: [batch, seq_len, width] to the same shape."""
        output = self.module.get_submodule(self.blocks[index])(hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: logits [batch, seq_len, vocabulary]."""
        last = len(self.blocks) - 1

        def passing(index: int) -> Callable[..., Tensor]:
            return lambda x, *args, **kwargs: hidden if index == last else x

        with self._replaced(passing):
            result: Tensor = self._forward(tokens).logits
        return result

    def _forward(self, tokens: Tensor) -> Any:
        return self.module(input_ids=tokens.long().to(self.device), use_cache=False)

    @contextmanager
    def _replaced(self, forward: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
        """Run the model with other block forwards."""
        blocks = [self.module.get_submodule(name) for name in self.blocks]
        for index, block in enumerate(blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    # structure

    def groups(self, index: int, hidden: Tensor, call: Call) -> list[list[str]]:
        """Linears of a resident block that share an input tensor, in call order."""
        return shared_inputs(self.linears(index), lambda: self.run_block(index, hidden, call))

    def doors(self, index: int, hidden: Tensor, call: Call) -> dict[str, nn.Module]:
        """For each linear of a resident block that adds to its stream, the module the stream enters before."""
        block = self.module.get_submodule(self.blocks[index])
        return stream_doors(block, self.linears(index), lambda: self.run_block(index, hidden, call))

    def producers(self, index: int, groups: list[list[str]], hidden: Tensor, call: Call) -> list[Producer | str]:
        """For each group of a resident block, who can absorb an input scale, or why nobody can."""
        block = self.blocks[index]
        modules = dict(self.module.get_submodule(block).named_modules(prefix=block))
        config = self.config.get_text_config()
        heads = config.num_attention_heads
        keys = config.to_dict().get("num_key_value_heads") or heads
        width = config.to_dict().get("head_dim") or config.hidden_size // heads
        run = lambda: self.run_block(index, hidden, call)  # noqa: E731
        return find_producers(modules, self.linears(index), groups, run, (heads, keys, width))


def _find_blocks(module: nn.Module) -> list[str]:
    """Paths of the repeated blocks: the members of the list that holds the most linear weights."""
    best: list[str] = []
    size = 0
    for path, candidate in module.named_modules():
        if not isinstance(candidate, nn.ModuleList) or len({type(member) for member in candidate}) != 1:
            continue
        held = sum(m.weight.numel() for m in candidate.modules() if isinstance(m, nn.Linear))
        if held > size and not isinstance(candidate[0], nn.Linear):
            best, size = [f"{path}.{index}" for index in range(len(candidate))], held
    if not best:
        raise ModelError(f"{type(module).__name__} has no list of repeated blocks with linear layers")
    return best


def sites(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter is held; a tied one in several places."""
    by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            by_identity.setdefault(id(parameter), []).append((owner, attribute))
    return {name: by_identity[id(parameter)] for name, parameter in module.named_parameters()}
