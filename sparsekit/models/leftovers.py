"""Tensors of a checkpoint that no parameter of the model is read from: told of, or refused.

Some are computed again and nobody misses them. Most say that something is left out on purpose, a head for
speculative decoding or the last blocks. A few say that the weights are those of another architecture than
config.json describes, and that the model computes something else than its authors meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekit.errors import ModelError

COMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias)$")  # buffers that older releases stored and newer ones compute
SCALE = re.compile(r"(?<=\.)weight_(scale|scale_inv|zero_point)$")  # of a quantized weight
NUMBER = re.compile(r"\.\d+\.")  # of a block
SHOWN = 3


class Leftovers:
    """What a model leaves in its files."""

    def __init__(
        self, module: PreTrainedModel, names: Sequence[str], read: Collection[str], stored: Callable[[str], Tensor]
    ) -> None:
        """Look at some tensors.

        Args:
            module: The model, empty.
            names: Of the tensors no parameter is read from, as they are stored.
            read: Names of the plain tensors that are read.
            stored: Reads a tensor by the name it is stored under.
        """
        self._prefix = f"{module.base_model_prefix}."
        self._buffers = {name for name, _ in module.named_buffers()}
        self._no_bias = {
            f"{name}.bias" for name, m in module.named_modules() if isinstance(m, nn.Linear) and m.bias is None
        }
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._names, self._read, self._stored = names, read, stored

    def check(self, where: str) -> None:
        """Refuse tensors that the model would compute with if config.json were the one of these weights.

        Args:
            where: The directory, for the message.
        Raises:
            ModelError: A second tensor of a tied pair has other values, a linear that has no bias has
                one that is not 0, or a weight has a scale that nobody multiplies it with.
        """
        for name in self._names:
            twin, found = self._twin(name), ""
            if twin is not None and not torch.equal(self._stored(name), self._stored(twin)):
                found = f"ties {name} to {twin}, and the files hold both with other values"
            elif self._bias(name) and bool(self._stored(name).any()):
                found = f"gives {name.removesuffix('.bias')} no bias, and the files hold one that is not 0"
            elif (weight := SCALE.sub("weight", name)) != name and weight in self._read:
                found = f"does not say that {weight} is quantized, and the files hold {name}"
            if found:
                raise ModelError(f"{where}: config.json {found}: it is not the configuration of these weights")

    def _own(self, name: str) -> Sequence[str]:
        """What a stored tensor may be called in the model."""
        return (name, name.removeprefix(self._prefix), self._prefix + name)

    def _twin(self, name: str) -> str | None:
        """The tensor that is read in place of this one, as both are one parameter."""
        this = next((self._parameters[own] for own in self._own(name) if own in self._parameters), None)
        if this is None:
            return None
        names = [other for other, parameter in self._parameters.items() if parameter is this]
        return next((stored for other in names for stored in self._own(other) if stored in self._read), None)

    def _bias(self, name: str) -> bool:
        """Whether it is the bias of a linear that has none in the model."""
        return not self._no_bias.isdisjoint(self._own(name))

    def told(self, used: Collection[str], files: Sequence[str]) -> list[str]:
        """A sentence about the tensors, and one about files that are not read at all.

        Args:
            used: Names of all tensors that are read, of linears that are integers their stems.
            files: Names of the safetensors files that are not read.
        """
        like = {NUMBER.sub(".N.", name) for name in used}
        left = [name for name in self._names if not self._needless(name)]
        beyond = sum(NUMBER.sub(".N.", name) in like for name in left)
        more = f"; {beyond} of them belong to blocks that config.json does not count" if beyond else ""
        said = [line + more for line in unused(left)]
        return said + ([f"{', '.join(files[:SHOWN])}{_more(files)} beside the weights: not read"] if files else [])

    def _needless(self, name: str) -> bool:
        """Whether the model computes the same without it: it is made again, or `check` found that it adds nothing."""
        made = COMPUTED.search(name) is not None or not self._buffers.isdisjoint(self._own(name))
        return made or self._bias(name) or self._twin(name) is not None


def unused(names: Sequence[str]) -> list[str]:
    """A sentence about tensors of the files that the model has no use for; none without any."""
    if not names:
        return []
    one = "a tensor of the files is" if len(names) == 1 else f"{len(names)} tensors of the files are"
    return [f"{one} not used by the model, and left out of exports: {', '.join(names[:SHOWN])}{_more(names)}"]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
