"""From what a recipe calls a model to a directory and an empty module."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparsekit.errors import ModelError, in_one_line, nearest

MOST = 8192  # layers, experts or heads
MOST_EXPERTS = 2**17  # of all layers together
MOST_BUFFERS = 2**31  # bytes
COUNT = re.compile(r"(n|num)_(.*_)?(layers?|experts?|heads?)")
READ = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
ASSETS = Path(__file__).parents[1] / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def locate(path: str, *, allow_network: bool = False) -> Path:
    """The directory a model path means.

    Raises:
        ModelError: It does not exist; the message names the nearest sibling that holds a model.
    """
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        names = _models(ASSETS)
        if name not in names:
            there = ", ".join(names) or "none in this installation"
            raise ModelError(f"no built-in model {name!r}; there is {there}.{nearest(name, names)}")
        return ASSETS / name
    directory = Path(os.path.expanduser(path))  # Path.expanduser raises on an unknown ~user
    if directory.is_dir():
        _check_files(directory)
        if not (directory / "config.json").is_file():
            exports = [f"{directory / 'export' / name}" for name in _models(directory / "export")]
            hint = f"; the exports of this run are {', '.join(exports)}" if exports else ""
            raise ModelError(f"{directory} holds no config.json, so it is no Hugging Face model{hint}")
        return Path(os.path.realpath(directory))
    if allow_network and not directory.is_absolute():
        return _download(path)
    if directory.exists():
        raise ModelError(f"model {path} is no directory; name the one that holds its config.json and .safetensors")
    hint = nearest(directory.name, _models(directory.parent))
    raise ModelError(f"model {path} is no directory.{hint} A hub id is fetched for a recipe with allow_network: true")


def _check_files(directory: Path) -> None:
    """Refuse what looks like a file of a model and is a pipe or a device, which nobody could read to its end.

    Raises:
        ModelError: With its name; for a link to nothing, as of a cache that was cleared, with where it points.
    """
    try:
        found = sorted(directory.iterdir())
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error.strerror}") from error
    for path in found:
        if path.suffix in READ and not path.is_file():
            lost = path.is_symlink() and not path.exists()
            raise ModelError(
                f"{path} points to {path.readlink()}, which is not there" if lost else f"{path} is no file"
            )


def _models(parent: Path) -> list[str]:
    """Names of the model directories in a directory, which need not exist; sorted, for messages that stay the same."""
    return sorted(config.parent.name for config in parent.glob("*/config.json"))


def _download(name: str) -> Path:
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot fetch {name} from the hub: {error}") from error
    return Path(found)


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file of a model says.

    Raises:
        ModelError: It is no JSON object.
    """
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is no JSON object")
    return raw


def _check_counts(directory: Path) -> None:
    """Refuse a configuration that is none, or that asks for so many modules that building them would never end.

    Raises:
        ModelError: With the key.
    """
    path = directory / "config.json"
    raw = _object(path)
    if (directory / "generation_config.json").is_file():
        _object(directory / "generation_config.json")
    if not isinstance(raw.get("quantization_config") or {}, dict):
        raise ModelError(f"{path}: quantization_config is no mapping")
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        counts = {key: value for key, value in part.items() if COUNT.fullmatch(key) and isinstance(value, int)}
        for key, value in counts.items():
            if not 0 <= value <= MOST:
                raise ModelError(f"{path}: {key} is {value}, and no model has less than 0 or more than {MOST}")
        layers, experts = (max((n for k, n in counts.items() if word in k), default=1) for word in ("layer", "expert"))
        if layers * experts > MOST_EXPERTS:
            raise ModelError(f"{path}: {layers} layers of {experts} experts are more than {MOST_EXPERTS} in all")


def _check_buffers(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose tables of positions and masks would fill the memory when the model is built.

    Raises:
        ModelError: With their size.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = AutoModelForCausalLM.from_config(config)
    except Exception:  # told of when it is built in earnest; a few classes look at values, and cannot be built without
        return
    size = sum(buffer.nbytes for buffer in module.buffers())
    if size > MOST_BUFFERS:
        raise ModelError(f"config.json asks for {size / 1e9:.1f} GB of tables beside the weights; no model needs that")


@contextmanager
def offline(allow_network: bool) -> Iterator[None]:
    """Keep huggingface_hub from the network unless the recipe allows it: code named in a config is fetched too."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or not allow_network
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def skeleton(directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model with parameters on meta and buffers (rotary tables) in place."""
    _check_counts(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
        if not trust_remote_code:  # code that is trusted may do as it likes
            _check_buffers(config)
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
            warnings.simplefilter("ignore")  # of torch, about initial values that nobody will use
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # a configuration may be wrong in any way, and the model's class finds out
        raise ModelError(f"{directory} holds no causal LM transformers can build: {in_one_line(error)}") from error
    if not isinstance(module, PreTrainedModel):
        raise ModelError(f"{directory} builds a {type(module).__name__}, no transformers model")
    module.tie_weights()  # built empty, tied parameters are still two
    return module.eval()


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The dtype a recipe names."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def device_of(name: str | torch.device) -> torch.device:
    """The device a recipe names; `auto` is CUDA when there is one.

    Raises:
        ModelError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {str(name)!r} is not one of auto, cpu, cuda, cuda:0 and so on")
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ModelError(f"device {device} is asked for and torch sees {there or 'none'}")
    return device
