"""Few rows times a matrix, as decoding multiplies every weight for every token: by few_rows.c where it was built."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dressage.compiled import library

MOST = 128
"""Rows; with more of them, BLAS is as quick."""
FEWEST = {"few_rows_avx512": 3, "few_rows_avx2": 1}
"""By kind of processor, the best first: rows with fewer of which BLAS is quicker (decision 0013)."""
_quick = ContextVar("quick", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b [..., out] of x [..., in] and W [out, in], within `quick` as torch's own to rounding in float32.

    torch's own elsewhere, and where a gradient is recorded, of more than MOST or less than FEWEST rows, of other types,
    devices or layouts.
    """
    multiply = kernel() if _quick.get() else None
    if (
        multiply is None
        or weight.dtype != torch.float32
        or x.dtype != torch.float32
        or not fewest() <= x.numel() / weight.shape[1] <= MOST
        or torch.is_grad_enabled()
        or not (weight.is_cpu and x.is_cpu and weight.is_contiguous())
        or (bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()))
    ):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out, width = weight.shape
    rows = x.numel() // width
    y, beside = x.new_empty(*x.shape[:-1], out), x.new_empty(filled_up(rows) * width)
    blocks = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), beside.data_ptr())
    multiply(*blocks, rows, width, out)
    return y


def filled_up(rows: int) -> int:
    """To whole registers, of whichever kind."""
    return -(-rows // 16) * 16


@contextmanager
def quick(model: nn.Module) -> Iterator[None]:
    """Within, few rows are multiplied by the kernel: in `linear`, and in torch's own layers of this model.

    For sampling alone: whoever scores, with a gradient or without, gets the same numbers from torch, to the last bit.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in layers:
        layer.forward = partial(forward_of_linear, layer)  # type: ignore[method-assign]
    within = _quick.set(True)
    try:
        yield
    finally:
        _quick.reset(within)
        for layer in layers:
            del layer.forward


def forward_of_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Of torch's own layer, within `quick`."""
    return linear(x, layer.weight, layer.bias)


@cache
def built() -> ctypes.CDLL | None:
    """few_rows.c and next_token.c for this processor; None where they were not built, or it is none for them."""
    # Their threads are those of torch, which has loaded OpenMP before them.
    for name in FEWEST:
        found = library(name)
        if found is not None and found.few_rows_suit():
            return found
    return None


@cache
def fewest() -> int:
    """Rows that `kernel` takes at least."""
    return next((rows for name, rows in FEWEST.items() if library(name) is built()), 1)


@cache
def kernel() -> Callable[..., None] | None:
    """few_rows.c's function; None as `built`."""
    if (found := built()) is None:
        return None
    multiply: Callable[..., None] = found.few_rows
    found.few_rows.restype = None
    found.few_rows.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3
    return multiply
