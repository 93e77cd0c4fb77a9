"""A format of one's own: two functions, and everything around them that a format needs.

    @sk.export_format("bytes", unpack=unpack, parts={"codes": "codes", "scale": "scales"})
    def pack(weight: sk.QuantizedWeight, mask: Tensor | None) -> dict[str, Tensor]: ...

The header, the file names and the digests are those of sparsekit-24: only sparsekit reads the result,
when the plugin that knows the two functions is loaded. A layout that another engine reads is a `Storage`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import OutOfMemoryError, Tensor

from sparsekit.errors import CheckpointError, PluginError, SparsekitError
from sparsekit.formats.base import Setting, grid_header
from sparsekit.formats.reading import versioned
from sparsekit.interchange.engines import EngineNote
from sparsekit.interchange.sizes import ExportBytes
from sparsekit.pluginfile import named_failures
from sparsekit.quant import QuantizedWeight
from sparsekit.state import LinearState

Pack = Callable[[QuantizedWeight, Tensor | None], dict[str, Tensor]]
Unpack = Callable[[Mapping[str, Tensor], Setting], QuantizedWeight]
Refuses = Callable[[QuantizedWeight], str | None]

VERSION = 1
BITS = tuple(range(2, 9))
COUNTED = ("codes", "positions", "scales", "zeros", "groups")  # of ExportBytes


@dataclass(slots=True)
class Own:
    """Storage by two functions of a plugin; see `sparsekit.formats.export_format` for them.

    Attributes:
        title: Of the format; `method` and `stem` are the same.
    """

    title: str
    method: str
    stem: str
    parts: Mapping[str, str]
    packs: Pack
    unpacks: Unpack
    refuses: Refuses | None
    bits: tuple[int, ...] = BITS
    checksums: bool = True

    def __post_init__(self) -> None:
        known = {field.name for field in fields(ExportBytes)} & set(COUNTED)
        wrong = [f"{part}: {role}" for part, role in self.parts.items() if role not in known]
        if wrong or not self.parts:
            raise PluginError(f"parts of {self.title} must say which of {', '.join(COUNTED)} each tensor is: {wrong}")

    def layouts(self, symmetric: bool) -> tuple[str, ...]:
        """The version of the header."""
        return (f"v{VERSION}",)

    def obstacle(self, state: LinearState, layout: str) -> str | None:
        """What the plugin says."""
        assert state.quantized is not None  # only asked about quantized linears
        if self.refuses is None:
            return None
        with named_failures(f"refuses of {self.title}", self.refuses):
            return self.refuses(state.quantized)

    def pack(self, weight: QuantizedWeight, layout: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the plugin makes, held against `parts`."""
        with named_failures(f"pack of {self.title}", self.packs):
            tensors = self.packs(weight, mask)
        if not isinstance(tensors, Mapping):
            raise PluginError(f"pack of {self.title} returned {_told(tensors)}, expected tensors by suffix")
        if unknown := [name for name in tensors if name not in self.parts]:
            raise PluginError(f"pack of {self.title} returned {unknown[0]!r}, and parts has {', '.join(self.parts)}")
        if (first := next(iter(self.parts))) not in tensors:
            raise PluginError(f"pack of {self.title} returned no {first!r}, which marks a quantized linear")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise PluginError(f"pack of {self.title} returned {_told(tensor)} as {name!r}, expected a tensor")
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def unpack(self, found: Mapping[str, Tensor], setting: Setting) -> QuantizedWeight:
        """What the plugin reads; whatever it stumbles over is an error of the file."""
        try:
            weight = self.unpacks(found, setting)
        except KeyError as error:
            raise CheckpointError(f"lacks the tensor {error.args[0]}; there is {', '.join(found)}") from error
        except (SparsekitError, OutOfMemoryError):
            raise
        except Exception as error:  # a file may be wrong in any way, and the plugin may be
            raise CheckpointError(f"unpack of {self.title} failed: {type(error).__name__}: {error}") from error
        if not isinstance(weight, QuantizedWeight):
            raise CheckpointError(f"unpack of {self.title} returned {_told(weight)}, expected a QuantizedWeight")
        return weight

    def mask(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """Not told; it lies beside the export."""
        return None

    def config(self, setting: Setting, left_dense: Sequence[str]) -> dict[str, Any]:
        """The header: what this is, its version, and the grid."""
        return {
            "quant_method": self.method,
            "version": VERSION,
            "bits": setting.bits,
            **grid_header(setting),
        }

    def companions(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def setting(self, config: Mapping[str, Any]) -> Setting:
        """Of this version of sparsekit."""
        return versioned(config, VERSION, BITS)

    def notes(self, setting: Setting, sparse: bool) -> Iterator[str]:
        """Who reads it."""
        yield f"only sparsekit reads this format, with {inspect.getfile(self.packs)} loaded"


def _told(value: object) -> str:
    """What somebody returned, short enough for a message."""
    return "None" if value is None else f"a {type(value).__name__}"


def engines(setting: Setting | None) -> list[EngineNote]:
    """Who reads a format of a plugin."""
    return [
        EngineNote("sparsekit with the plugin", "loads", "The run read every integer back and compared it."),
        EngineNote("all others", "refuses", "They know neither the quant_method nor the names of the files."),
    ]
