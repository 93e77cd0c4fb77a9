"""How fast a model writes: tokens a second, one after another, dense and from its packed integers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsekit.inference.decoder import Decoder
from sparsekit.inference.linear import PackedLinear
from sparsekit.inference.load import install, products
from sparsekit.inference.packed import PackedWeight, pack, why_not_packed
from sparsekit.models.chain import Chain
from sparsekit.models.shapes import FEW

STEPS = 64  # of which the time is taken
ROUNDS = 3  # the fastest counts


@contextmanager
def packed_in_place(chain: Chain) -> Iterator[str | None]:
    """Hold the integers of a resident model packed, and no dense copy of them; yields what to call that form.

    None where the last step left nothing that can be packed. The linears are there again afterwards, without
    their weights, as the end of `Chain.forward` wants them.
    """
    view, originals = chain.view, dict[str, nn.Module]()
    try:
        with torch.no_grad():
            hidden, calls = view.begin(torch.zeros(1, FEW, dtype=torch.long))
            for index, call in enumerate(calls):
                groups = view.groups(index, hidden, call)
                _pack_block(chain, index, groups, originals)
        held = products(view.module)
        kinds = " and ".join(dict.fromkeys(product.form for product in held))
        kernel = all(product.limit for product in held)
        yield f"{kinds}, sparsekit {'kernel' if kernel else 'without its kernel'}" if held else None
    finally:
        for name, linear in originals.items():
            parent, _, own = name.rpartition(".")
            setattr(view.module.get_submodule(parent), own, linear)


def _pack_block(chain: Chain, index: int, groups: list[list[str]], originals: dict[str, nn.Module]) -> None:
    view, block = chain.view, chain.block(index)
    for group in groups:
        packed: dict[str, PackedWeight] = {}
        for name in group:
            integers = block.linears[name].quantized
            if integers is not None and why_not_packed(integers) is None:
                packed[name] = pack(integers.to(view.device))
                originals[name] = view.module.get_submodule(name)
        names = list(packed)
        install(view.module, packed, view.compute_dtype)
        for name in names:
            linear, stored = originals[name], view.module.get_submodule(name)
            assert isinstance(linear, nn.Linear) and isinstance(stored, PackedLinear)
            linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
            branch = block.linears[name].branch
            if branch is not None:
                stored.attach(branch)


def tokens_per_second(chain: Chain, batch: int, length: int) -> tuple[float, str]:
    """Tokens that a resident model writes in a second for some prompts at once, and why not as a CUDA graph.

    Args:
        chain: The model, resident.
        batch: Prompts.
        length: Tokens of a prompt; made up.
    """
    module = chain.view.module
    decoder = Decoder(module, length + 1 + ROUNDS * STEPS, batch)
    generator = torch.Generator().manual_seed(0)
    vocabulary = chain.view.config.get_text_config().vocab_size
    decoder.prefill(torch.randint(0, vocabulary, (batch, length), generator=generator))
    decoder.capture()
    decoder.step()
    best = float("inf")
    for _ in range(ROUNDS):
        decoder.read()()
        begun = time.perf_counter()
        for _ in range(STEPS):
            decoder.step()
        decoder.read()()
        best = min(best, time.perf_counter() - begun)
    return batch * STEPS / best, decoder.eager


def figure(form: str, batch: int, dense: Sequence[float], speed: float, work: str) -> dict[str, Any]:
    """A measurement beside the dense model's, of which the fastest counts; `apart` is how far these lie, as a share."""
    return {
        "form": form,
        "work": work,
        "batch": batch,
        "dense": max(dense),
        "apart": max(dense) / min(dense) - 1,
        "tokens_per_second": speed,
        "ratio": speed / max(dense),
    }
