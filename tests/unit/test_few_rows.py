"""The compiled product of few rows against float64, and where torch's own takes its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import Context

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from dressage import few_rows
from dressage.compiled import library

built = pytest.mark.skipif(few_rows.kernel() is None, reason="few_rows.c was not built, or not for this processor")


@pytest.fixture(autouse=True)
def _sampling() -> Iterator[None]:
    with torch.no_grad(), few_rows.quick(nn.Identity()):
        yield


@pytest.fixture
def of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows: one is not left to torch."""
    monkeypatch.setattr(few_rows, "fewest", lambda: 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, width and outputs of every product that is not torch's."""
    seen: list[tuple[int, ...]] = []

    def noted(*blocks_and_sizes: int) -> None:
        seen.append(blocks_and_sizes[-3:])
        if (multiply := kernel()) is not None:
            multiply(*blocks_and_sizes)

    kernel = few_rows.kernel
    monkeypatch.setattr(few_rows, "kernel", lambda: noted)
    return seen


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


# Widths around parts of 128, outputs around six or twelve at once and a block of 24, rows around registers of 8 or 16;
# the last is large enough for several threads.
@pytest.mark.usefixtures("processor", "of_any_number")
@pytest.mark.parametrize("width", [1, 7, 16, 127, 128, 129, 576])
@pytest.mark.parametrize("outputs", [1, 6, 13, 24, 25, 100])
def test_products_are_those_of_float64(width: int, outputs: int) -> None:
    weight, bias = drawn(outputs, width), drawn(outputs, seed=1)
    for rows in (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128):
        x = drawn(rows, width, seed=2)
        for added in (None, bias):
            exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
            assert_close(few_rows.linear(x, weight, added).double(), exact, rtol=0, atol=2e-6 * width**0.5)


@pytest.mark.usefixtures("processor", "of_any_number")
def test_a_row_is_the_same_to_the_last_bit_whatever_stands_beside_it() -> None:
    weight, x = drawn(1000, 300), drawn(128, 300, seed=1)
    together = few_rows.linear(x, weight)
    for rows in (1, 2, 3, 8, 9, 17, 33, 127):
        assert torch.equal(few_rows.linear(x[:rows], weight), together[:rows])
        assert torch.equal(few_rows.linear(x[-rows:], weight), together[-rows:])


def test_on_either_processor_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One order of adding up, whatever a register holds."""
    kinds = [library(f"few_rows_{kind}") for kind in ("avx2", "avx512")]
    suiting = [kind for kind in kinds if kind is not None and kind.few_rows_suit()]
    if len(suiting) < 2:
        pytest.skip("this processor knows one kind at most")
    weight, x, bias = drawn(1000, 300), drawn(50, 300, seed=1), drawn(1000, seed=2)
    results = []
    try:
        for kind in suiting:
            monkeypatch.setattr(few_rows, "built", lambda kind=kind: kind)
            few_rows.kernel.cache_clear()
            results.append(few_rows.linear(x, weight, bias))
    finally:
        few_rows.kernel.cache_clear()
    assert torch.equal(*results)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(("rows", "width", "outputs"), [(5, 20, 50), (16, 130, 24), (33, 16, 7)])
def test_nothing_is_written_beside_the_result(rows: int, width: int, outputs: int) -> None:
    weight, x = drawn(outputs, width), drawn(rows, width, seed=1)
    multiply = few_rows.kernel()
    assert multiply is not None
    room = torch.full((rows * outputs + 64,), 7.0)
    beside = torch.full((few_rows.filled_up(rows) * width + 64,), 7.0)
    blocks = (x.data_ptr(), weight.data_ptr(), 0, room[32:].data_ptr(), beside[32:].data_ptr())
    multiply(*blocks, rows, width, outputs)
    for written in (room, beside):
        assert (written[:32] == 7.0).all() and (written[-32:] == 7.0).all()
    assert_close(room[32:-32].view(rows, outputs), x @ weight.T, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("processor")
def test_torch_does_the_fewest(calls: list[tuple[int, ...]]) -> None:
    weight = drawn(5, 8)
    for rows in (1, 2, 3):
        few_rows.linear(drawn(rows, 8), weight)
    assert calls == [(rows, 8, 5) for rows in (1, 2, 3) if rows >= few_rows.fewest()]


def test_it_takes_float32_rows_on_the_processor(calls: list[tuple[int, ...]]) -> None:
    few_rows.linear(drawn(3, 2, 8), drawn(5, 8), drawn(5))
    few_rows.linear(drawn(128, 8), drawn(5, 8))
    few_rows.linear(drawn(8, 4).T, drawn(5, 8))  # rows that do not lie one after the other are copied
    assert calls == [(6, 8, 5), (128, 8, 5), (4, 8, 5)]


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (drawn(129, 8), drawn(5, 8), None),
        (drawn(2, 8).double(), drawn(5, 8).double(), None),
        (drawn(2, 8).bfloat16(), drawn(5, 8).bfloat16(), None),
        (drawn(2, 8), drawn(8, 5).T, None),
        (drawn(2, 8), drawn(5, 8), drawn(10)[::2]),
    ],
    ids=["many rows", "float64", "bfloat16", "a weight as GPT-2 keeps it", "a bias with gaps"],
)
def test_torch_does_the_rest(x: Tensor, weight: Tensor, bias: Tensor | None, calls: list[tuple[int, ...]]) -> None:
    assert torch.equal(few_rows.linear(x, weight, bias), F.linear(x, weight, bias))
    assert calls == []


def test_gradients_are_torchs(calls: list[tuple[int, ...]]) -> None:
    weight = drawn(5, 8).requires_grad_()
    with torch.enable_grad():
        few_rows.linear(drawn(2, 8), weight).sum().backward()
    assert calls == [] and weight.grad is not None


def test_layers_are_quick_only_within(calls: list[tuple[int, ...]]) -> None:
    class Other(nn.Linear):
        """Might compute anything."""

    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Other(6, 4), nn.Linear(4, 3, bias=False))
    x = drawn(3, 8)
    usual = model(x)
    with pytest.raises(ZeroDivisionError), few_rows.quick(model):
        model(x)
        with few_rows.quick(model):
            model(x)
        model(x)
        raise ZeroDivisionError
    assert calls == 3 * [(3, 8, 6), (3, 4, 3)]
    assert torch.equal(model(x), usual) and len(calls) == 6


def test_elsewhere_all_is_torchs(calls: list[tuple[int, ...]]) -> None:
    """In a context of its own, as another thread has, nobody is sampling."""
    x, weight = drawn(3, 8), drawn(5, 8)
    assert torch.equal(Context().run(few_rows.linear, x, weight), F.linear(x, weight))
    assert calls == []


@built
def test_layers_compute_what_they_did() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    x = drawn(3, 8)
    usual = model(x)
    with few_rows.quick(model):
        assert_close(model(x), usual, rtol=0, atol=1e-6)


def test_without_it_all_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no compiler was found."""
    x, weight = drawn(3, 8), drawn(5, 8)
    monkeypatch.setattr(few_rows, "built", lambda: None)
    few_rows.kernel.cache_clear()
    try:
        assert few_rows.kernel() is None
        assert torch.equal(few_rows.linear(x, weight), F.linear(x, weight))
    finally:
        few_rows.kernel.cache_clear()
