"""Linears that hold packed weights and nothing else.

A `Product` is the weight of one linear, or of several that read one tensor (q, k and v; gate and up), and the
paths that multiply with it. A `PackedLinear` stands where the model had an `nn.Linear` and gives out its rows.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekit.branch import Branch, LowRank
from sparsekit.errors import ModelError
from sparsekit.inference.packed import PackedWeight, dequantize, multiply_reference, stacked
from sparsekit.kernels import decode, decode_cpu


class Product(nn.Module):
    """x W^T + b with a packed W.

    Up to `limit` tokens the device's kernel multiplies; beyond, W is dequantized and torch multiplies. The
    dequantized W lives for one product, so that the allocator uses one and the same block for every linear. A buffer
    of our own would be no smaller, and two threads or a CUDA graph could find another's values in it.
    Where no kernel runs, the reference dequantizes and multiplies a few rows at a time.

    Attributes:
        out_features: Rows of W, of all linears together.
        in_features: Columns.
        form: What is held, for people: "2:4 + int4" or "int4".
        limit: Tokens the kernel takes at once, 0 without a kernel.
        why_reference: Why no kernel runs; empty where one does.
        nbytes: Of the packed tensors and the bias.
    """

    values: Tensor
    positions: Tensor | None
    scales: Tensor
    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Hold a weight on the device it is on.

        Args:
            packed: The weight.
            bias: [out] in `dtype`, or None.
            dtype: Of the activations.
        """
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.form = packed.describe()
        self.group_size = packed.group_size
        self.dtype = dtype
        self.register_buffer("bias", bias)
        device = packed.values.device
        self._kernel: Any = decode_cpu if device.type == "cpu" else decode
        self.why_reference: str = self._kernel.why_not(packed, dtype, device) or ""
        self.limit: int = 0 if self.why_reference else self._kernel.MAX_TOKENS
        self._arranged: Any = None if self.why_reference else self._kernel.arrange(packed)
        held = packed if self.why_reference else None
        self._number = next(_NUMBERS)
        _PRODUCTS[self._number] = self
        self.register_buffer("values", None if held is None else held.values)
        self.register_buffer("positions", None if held is None else held.positions)
        self.register_buffer("scales", None if held is None else held.scales)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.tensors()[0].device

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        if self._arranged is None:
            held = self.packed.tensors()
        else:
            parts = (getattr(self._arranged, field.name) for field in fields(self._arranged))
            held = [part for part in parts if isinstance(part, Tensor)]
        return held if self.bias is None else [*held, self.bias]

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(part.nbytes for part in self.tensors())

    @property
    def packed(self) -> PackedWeight:
        """The weight as the reference reads it.

        Raises:
            ModelError: The kernel holds it in its own order.
        """
        if self._arranged is not None:
            raise ModelError("the kernel holds this weight in its own order; `dense` gives its values")
        shape = (self.out_features, self.in_features)
        return PackedWeight(self.values, self.positions, self.scales, self.group_size, shape)

    def dense(self) -> Tensor:
        """The weight [out, in] in the dtype of the activations, made anew."""
        if self._arranged is not None:
            return cast("Tensor", self._kernel.expand(self._arranged, self.dtype))
        return dequantize(self.packed, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            product = cast("Tensor", packed_product(flat, self._number, self.out_features))
        else:
            product = self.multiply(flat)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """Without the bias, [tokens, in] to [tokens, out]."""
        if not len(x):
            return x.new_empty(0, self.out_features)
        if self._arranged is None:
            return multiply_reference(x, self.packed)
        if len(x) <= self.limit:
            return cast("Tensor", self._kernel.multiply(x, self._arranged))
        return x @ self.dense().t()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Product:
        """Let the module move and keep its values: `model.half()` must not round scales.

        Raises:
            ModelError: The kernel's order belongs to one device.
        """
        if self._arranged is not None:
            if fn(torch.empty(0, device=self.device)).device != self.device:
                raise ModelError("packed weights in a kernel's order stay on their device; load the model anew")
            return self
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.values.device)
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        path = f"kernel up to {self.limit:,} tokens" if self.limit else "reference"
        return f"{self.in_features} -> {self.out_features}, {self.form}, groups of {self.group_size}, {path}"


_NUMBERS = itertools.count()
_PRODUCTS: weakref.WeakValueDictionary[int, Product] = weakref.WeakValueDictionary()


@torch.library.custom_op("sparsekit::packed_product", mutates_args=())
def packed_product(x: Tensor, number: int, out_features: int) -> Tensor:
    """`Product.multiply` for torch.compile, which looks into neither kernels nor packed weights."""
    return _PRODUCTS[number].multiply(x)


@packed_product.register_fake
def _shape(x: Tensor, number: int, out_features: int) -> Tensor:
    return x.new_empty(len(x), out_features)


class Shared:
    """What the first of some linears with one input leaves for the others.

    The first computes the product for all of them and keeps it beside its input. Another takes its rows of it
    if it is called with that very tensor, unchanged; otherwise it multiplies for itself. So nothing depends on
    the order of calls or on who else uses the model at the same time: a lost product only costs a second one.
    The last one clears it. There is no work on the host that a CUDA graph would have to repeat.
    """

    def __init__(self, product: Product, members: int) -> None:
        self.product = product
        self.last = members - 1
        self.left: tuple[Tensor, int, Tensor] | None = None

    def result(self, x: Tensor, member: int) -> Tensor:
        """The whole product with an input, computed or left by the first member."""
        left = self.left  # read once: another thread may put its own here
        if member == self.last:
            self.left = None
        if member and left is not None and left[0] is x and left[1] == _version(x):
            return left[2]
        product = cast("Tensor", self.product(x))
        if member == 0:
            self.left = (x, _version(x), product)
        return product


def _version(x: Tensor) -> int:
    """Counts changes in place; tensors of inference mode and of a compiler do not count theirs."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class PackedLinear(nn.Module):
    """A linear of a model: its rows of a product.

    Attributes:
        in_features: Inputs.
        out_features: Its own outputs.
    """

    def __init__(self, product: Product, first: int, out_features: int, shared: Shared | None, member: int) -> None:
        """Stand for rows `first` to `first + out_features` of a product.

        Args:
            product: The weight; held as a submodule by member 0 only.
            first: Row.
            out_features: Number of rows.
            shared: With the other linears of the product, or None if there are none.
            member: Its place in the order of calls.
        """
        super().__init__()
        self.in_features, self.out_features = product.in_features, out_features
        self.dtype, self.device = product.dtype, product.device
        self.first, self.member, self.shared = first, member, shared
        self.branch: LowRank | None = None
        if member == 0:
            self.product = product

    def attach(self, branch: Branch) -> None:
        """Compute W x + S (X x) from now on."""
        self.branch = LowRank(branch, self.dtype, self.device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.shared is None:
            own = cast("Tensor", self.product(x))
        else:
            own = self.shared.result(x, self.member)[..., self.first : self.first + self.out_features]
        return own if self.branch is None else own + self.branch(x)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return "" if self.shared is None else f"{self.out_features} outputs from row {self.first} of a shared product"


def fused(weights: list[tuple[PackedWeight, Tensor | None]], dtype: torch.dtype) -> list[PackedLinear]:
    """Linears with one input as one product.

    Args:
        weights: Of each linear, in the order they are called: the weight and the bias. All of one kind.
        dtype: Of the activations.
    """
    rows = [packed.shape[0] for packed, _ in weights]
    bias = None
    if any(given is not None for _, given in weights):
        parts = [packed.scales.new_zeros(packed.shape[0]) if given is None else given for packed, given in weights]
        bias = torch.cat([part.to(dtype) for part in parts])
    product = Product(stacked([packed for packed, _ in weights]), bias, dtype)
    shared = Shared(product, len(weights)) if len(weights) > 1 else None
    firsts = [sum(rows[:index]) for index in range(len(rows))]
    return [
        PackedLinear(product, first, out, shared, member)
        for member, (first, out) in enumerate(zip(firsts, rows, strict=True))
    ]
