"""One token after another from a transformers model: static cache, and on CUDA the whole step as one graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from sparsekit.models.norms import Norm, replaced, single_kernel_norms

WARM = 2  # steps before a capture: the first may compile kernels and allocate workspaces, the last must not wait


class Decoder:
    """The steps of a generation, for prompts of one length.

    Everything a step reads and writes stays where it is: token, position, cache, logits. A step looks up no value
    on the host, and its shapes never change, so CUDA can record it once and repeat it. The most likely token is
    chosen in the step; `choose` may put another in its place.

    Attributes:
        token: int64 [batch, 1], what the next step reads.
        logits: float32 [batch, vocabulary] after the last token.
        eager: Why steps do not run as a CUDA graph; empty where they do, and before `capture`.
        unfused: Why the step is not compiled although it should be; empty otherwise.
    """

    def __init__(self, model: PreTrainedModel, context: int, batch: int = 1, *, fuse: bool = False) -> None:
        """Set buffers aside.

        Args:
            model: In eval mode.
            context: Tokens that prompt and answer may have together.
            batch: Prompts at once.
            fuse: Let torch.compile make one kernel of the small operations between the linears. That takes about
                a minute for a large model, at the first step.
        """
        self.model = model
        self._call: Callable[..., Any] = torch.compile(model.forward, dynamic=False, fullgraph=True) if fuse else model
        self.device = model.device
        self.eager = self.unfused = ""
        self._norms = [] if fuse else self._single_norms()
        parameters = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # the name before transformers 5.2x
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._length = torch.zeros(1, dtype=torch.long, device=self.device)  # tokens that the cache holds
        self._position = self._length.expand(batch, 1)
        self._cache = static_cache(model, context, self._length)
        self._plain = all(type(layer) is StepLayer for layer in self._cache.layers)
        self._mask = torch.ones(batch, context, dtype=torch.long, device=self.device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.logits = torch.empty(batch, model.get_output_embeddings().weight.shape[0], device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> None:
        """Read prompts, int64 [batch, length]; may be called again for others.

        They are read as transformers does it, with a cache that grows, and their keys and values are copied: a
        static cache would make each of them look at all the places still empty.
        """
        tokens = tokens.to(self.device)
        length = tokens.shape[1]
        if self._plain:
            growing = DynamicCache()
            logits = self._forward(tokens, growing)
            for layer, found in zip(self._cache.layers, growing.layers, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(found.keys, found.values)
                layer.keys[:, :, :length].copy_(found.keys)
                layer.values[:, :, :length].copy_(found.values)
                found.keys = found.values = None  # two caches at once, but only of one layer
        else:
            self._cache.reset()
            logits = self._forward(tokens, self._cache)
        self._settle(logits)
        self._length.fill_(length)

    def _single_norms(self) -> list[Norm]:
        return single_kernel_norms(self.model) if self.device.type == "cuda" else []

    def _forward(self, tokens: Tensor, cache: DynamicCache | StaticCache, mask: Tensor | None = None) -> Tensor:
        """Logits of the last token, [batch, vocabulary]."""
        places, call = (None, self.model) if mask is None else (self._position, self._call)
        held = {self._cache_name: cache, **self._last_only}
        output = call(
            input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=True, return_dict=True, **held
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _settle(self, logits: Tensor) -> None:
        self.logits.copy_(logits)
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    @torch.no_grad()
    def _step(self) -> None:
        with replaced(self._norms):
            self._settle(self._forward(self.token, self._cache, self._mask))
        self._length.add_(1)

    def capture(self) -> None:
        """Record the step as a CUDA graph, once; where that is not possible `eager` says why.

        The steps of the warm-up write behind the prompt, where the next real ones write over them.
        """
        if self._graph is not None or self.eager:
            return
        if self._call is not self.model:
            self.unfused = self._tried(self._warm) if self._plain else "layers of its cache count on the host"
            if self.unfused:
                self._call, self._norms = self.model, self._single_norms()
        if self.device.type != "cuda":
            self.eager = "CUDA graphs need CUDA"
        elif not self._plain:
            kinds = ", ".join({type(layer).__name__ for layer in self._cache.layers} - {StepLayer.__name__})
            self.eager = f"layers of its cache count on the host ({kinds})"
        elif why := self._tried(self._record):
            self.eager = f"the step cannot be recorded: {why}"

    def _tried(self, work: Callable[[], None]) -> str:
        """Run steps and undo what they did; why they failed, or nothing."""
        token, logits, length = self.token.clone(), self.logits.clone(), self._length.clone()
        why = ""
        try:
            work()
        except RuntimeError as error:  # of CUDA while it records, of torch.compile and of what it calls
            why = str(error).strip().partition("\n")[0]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._rewind(token, length)
        self.logits.copy_(logits)
        return why

    def _warm(self) -> None:
        token, length = self.token.clone(), self._length.clone()
        for left in reversed(range(WARM)):
            with _unasking(self.device.type == "cuda" and left == 0):
                self._step()
            self._rewind(token, length)

    def _record(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(stream)
        try:
            with torch.cuda.stream(side):
                self._warm()
            stream.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self._graph = graph
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind

    def _rewind(self, token: Tensor, length: Tensor) -> None:
        """Forget what steps after the prompt wrote: what lies behind the length is not looked at."""
        self.token.copy_(token)
        self._length.copy_(length)

    def step(self) -> None:
        """Read `token`; `logits` and `token` are then those after it."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    @torch.no_grad()
    def choose(self, temperature: float, generator: torch.Generator) -> None:
        """Draw the next token in place of the most likely one; a given seed gives the same tokens every time.

        The probabilities are divided by exponential variates and the largest quotient wins, which draws from them
        and, unlike `torch.multinomial`, asks for nothing on the host.
        """
        chances = torch.softmax(self.logits / temperature, -1)
        waits = torch.empty_like(chances).exponential_(generator=generator)
        self.token.copy_((chances / waits).argmax(-1, keepdim=True))

    def read(self) -> Callable[[], list[int]]:
        """The tokens of the batch as they are now, waited for only when the result is called."""
        if self.device.type != "cuda":
            there: list[int] = self.token[:, 0].tolist()
            return lambda: there
        host = torch.empty(len(self.token), dtype=torch.long, pin_memory=True)
        host.copy_(self.token[:, 0], non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        def wait() -> list[int]:
            event.synchronize()
            tokens: list[int] = host.tolist()
            return tokens

        return wait


@contextmanager
def _unasking(wanted: bool) -> Iterator[None]:
    """Make an error of whatever waits for the device: a step that does cannot be recorded, and trying breaks things."""
    if not wanted:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class StepLayer(StaticLayer):  # type: ignore[misc]  # transformers is not checked
    """Keys and values of a layer, of full length, for steps of one token.

    All layers hold as many tokens, so one counter serves them all; the decoder advances it behind a step. Were each
    layer to count for itself, as `StaticLayer` does, three more kernels would be launched in each.
    """

    def __init__(self, context: int, length: Tensor) -> None:
        """For `context` tokens, of which `length`, int64 [1], are there."""
        super().__init__(max_cache_len=context)
        self.place = length
        self.cumulative_length = length[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values behind those that are there; gives all."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


def static_cache(model: PreTrainedModel, context: int, length: Tensor) -> StaticCache:
    """A static cache of full length for every layer that attends.

    Layers with a sliding window get one too: transformers' own for them counts tokens on the host, which a CUDA
    graph cannot repeat. Their mask hides what is beyond the window; the price is memory.
    """
    cache = StaticCache(config=model.config, max_cache_len=context)
    cache.layers = [
        StepLayer(context, length) if type(layer) in (StaticLayer, StaticSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache
