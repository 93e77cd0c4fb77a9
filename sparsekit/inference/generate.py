"""From a prompt to a stream of tokens."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekit.errors import DataError, NumericsError, RecipeError, SparsekitError, in_one_line
from sparsekit.inference.decoder import Decoder
from sparsekit.inference.load import bytes_of

PATIENCE = 10.0  # seconds for a chat template
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # as configurations call it


@dataclass(slots=True)
class Stats:
    """How a generation went.

    Attributes:
        prompt: Tokens of the prompt.
        tokens: Tokens generated.
        first: Seconds to the first token.
        recording: Seconds it took to record the CUDA graph, which is in no other figure.
        decoding: Seconds from the first to the last token.
        eager: Why there is no CUDA graph; empty with one.
        unfused: Why the step is not compiled although that was asked for; empty otherwise.
        model_bytes: Of the model's tensors.
        peak: Most bytes allocated on the device, None on a CPU.
        ended: `end of text`, `length` or `context`.
    """

    prompt: int = 0
    tokens: int = 0
    first: float = 0.0
    recording: float = 0.0
    decoding: float = 0.0
    eager: str = ""
    unfused: str = ""
    model_bytes: int = 0
    peak: int | None = None
    ended: str = ""

    @property
    def per_second(self) -> float | None:
        """Tokens a second after the first, None with fewer than two."""
        return (self.tokens - 1) / self.decoding if self.tokens > 1 and self.decoding > 0 else None


def prompt_tokens(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """A prompt as int64 [1, length].

    Args:
        tokenizer: Of the model.
        prompt: What the user wrote.
        chat: Put it as a user's turn into the tokenizer's chat template.
    Raises:
        RecipeError: The prompt is empty or no text, or there is no chat template.
        DataError: The chat template fails.
    """
    if not prompt.strip():
        raise RecipeError("the prompt is empty: --prompt needs some text to go on from")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what Python makes of bytes that are no UTF-8
        raise RecipeError("the prompt is no UTF-8 text")
    if not chat:
        ids = tokenizer(prompt).input_ids
    elif tokenizer.chat_template is None:
        raise RecipeError("--chat needs a tokenizer with a chat template, and this one has none; leave --chat out")
    else:
        turn = [{"role": "user", "content": prompt}]
        text = _in_template(tokenizer, turn)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise RecipeError(f"the tokenizer makes no token of the prompt {prompt[:40]!r}")
    return torch.tensor([ids])


def _in_template(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """The turns in the chat template of a tokenizer: a program of the model's, which Jinja runs in a sandbox.

    Raises:
        DataError: It fails, or goes on for longer than `PATIENCE`.
    """
    before, end = sys.gettrace(), time.monotonic() + PATIENCE

    def watch(*_: Any) -> Any:
        if time.monotonic() > end:
            raise DataError(f"the tokenizer's chat template takes more than {PATIENCE:g} seconds; leave --chat out")
        return watch

    sys.settrace(watch)  # no other way ends a loop that yields nothing
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except SparsekitError:
        raise
    except Exception as error:  # a template may fail in any way
        told = f"{type(error).__name__}: {in_one_line(error)}"
        raise DataError(f"the tokenizer's chat template fails: {told}; leave --chat out") from error
    finally:
        sys.settrace(before)
    return str(text)


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens a model was made for, None where its configuration does not say."""
    told = model.config.get_text_config().to_dict()
    return next((int(told[key]) for key in CONTEXT if told.get(key)), None)


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text."""
    told = model.generation_config.eos_token_id
    return frozenset([] if told is None else [told] if isinstance(told, int) else told)


def check_settings(max_tokens: int, temperature: float, seed: int) -> None:
    """Refuse settings that make no sense with any model.

    Raises:
        RecipeError: With the option.
    """
    if max_tokens < 1:
        raise RecipeError(f"--max-tokens is {max_tokens}; at least 1 is needed")
    if not 0 <= temperature < float("inf"):
        raise RecipeError(f"--temperature is {temperature}; 0 takes the most likely token, above 0 draws")
    if not 0 <= seed < 2**63:
        raise RecipeError(f"--seed is {seed}; 0 to {2**63 - 1} are seeds")


def check_request(model: PreTrainedModel, tokens: Tensor, max_tokens: int) -> int:
    """How many tokens may be generated.

    Raises:
        RecipeError: The prompt leaves no room in the context.
        DataError: The tokenizer knows tokens that the model does not.
    """
    known, largest = model.get_input_embeddings().weight.shape[0], int(tokens.max())
    if largest >= known:
        raise DataError(f"the prompt has token {largest} and the model knows {known}: not its tokenizer")
    context, length = context_of(model), tokens.shape[1]
    if context is not None and length >= context:
        raise RecipeError(f"the prompt has {length} tokens and the model's context is {context}: shorten it")
    return max_tokens if context is None else min(max_tokens, context - length)


def stream(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    fuse: bool = False,
    stats: Stats | None = None,
) -> Iterator[int]:
    """Generate tokens and yield each as soon as it is known; the last one may be an end of text.

    Args:
        model: As `sparsekit.load` gives it; any causal LM of transformers will do.
        tokens: int64 [1, length], the prompt.
        max_tokens: At most so many; the context may end earlier.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        seed: For drawing.
        fuse: See `Decoder`.
        stats: Filled in as it goes.
    Raises:
        RecipeError: A setting makes no sense, or the prompt leaves no room in the context.
        NumericsError: The model computes NaN.
    """
    check_settings(max_tokens, temperature, seed)
    room = check_request(model, tokens, max_tokens)
    told = Stats() if stats is None else stats
    generator = torch.Generator(model.device).manual_seed(seed)
    told.prompt, told.model_bytes = tokens.shape[1], bytes_of(model)
    decoder = Decoder(model, tokens.shape[1] + room, fuse=fuse)
    return _stream(decoder, tokens, room, "length" if room == max_tokens else "context", temperature, generator, told)


def _stream(
    decoder: Decoder,
    tokens: Tensor,
    room: int,
    limit: str,
    temperature: float,
    generator: torch.Generator,
    told: Stats,
) -> Iterator[int]:
    if decoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(decoder.device)
    begun = time.perf_counter()
    decoder.prefill(tokens)
    if bool(decoder.logits.isnan().any()):
        raise NumericsError("the model computes NaN after the prompt; `sparsekit inspect` tells whether it holds any")
    if temperature:
        decoder.choose(temperature, generator)
    (token,) = decoder.read()()
    told.first = time.perf_counter() - begun
    ends, told.tokens = end_tokens(decoder.model), 1
    yield token
    if token not in ends:
        for token in _rest(decoder, room - 1, temperature, generator, told):
            yield token
            if token in ends:
                break
    told.ended = "end of text" if token in ends else limit


def _rest(decoder: Decoder, count: int, temperature: float, generator: torch.Generator, told: Stats) -> Iterator[int]:
    """The tokens after the first. On CUDA the next step is under way before a token is read."""
    begun = time.perf_counter()
    if count:
        decoder.capture()
    told.eager, told.unfused = decoder.eager, decoder.unfused
    told.recording = time.perf_counter() - begun
    ahead = 1 if decoder.device.type == "cuda" else 0
    waiting: deque[Callable[[], list[int]]] = deque()
    begun = time.perf_counter()
    for step in range(count + ahead):
        if step < count:
            decoder.step()
            if temperature:
                decoder.choose(temperature, generator)
            waiting.append(decoder.read())
        if len(waiting) > ahead or step >= count:
            (token,) = waiting.popleft()()
            told.tokens += 1
            told.decoding = time.perf_counter() - begun
            if decoder.device.type == "cuda":
                told.peak = torch.cuda.max_memory_allocated(decoder.device)
            yield token
