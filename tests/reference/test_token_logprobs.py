"""Log-probabilities in chunks against the plain log-softmax of all logits, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.tensors import full_kl, taken_later, token_logprobs


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


def model(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = torch.randn(rows, 5), torch.randn(11, 5), torch.randn(11)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, 11, (rows,)), bias.to(dtype)


@given(
    rows=st.integers(0, 9), chunk=st.integers(1, 10), temperature=st.sampled_from([0.5, 1.0, 1.7]), biased=st.booleans()
)
def test_values_and_gradients_are_those_of_all_logits_at_once(
    rows: int, chunk: int, temperature: float, biased: bool
) -> None:
    hidden, weight, targets, bias = model(rows)
    leaves = [hidden, weight, bias] if biased else [hidden, weight]
    for leaf in leaves:
        leaf.requires_grad_()
    used = bias if biased else None
    ours = token_logprobs(hidden, weight, targets, temperature=temperature, bias=used, chunk=chunk, with_entropy=True)
    oracle = plain(hidden, weight, targets, temperature, used)
    mix = torch.randn(2, rows, dtype=torch.float64)
    gradients = torch.autograd.grad((mix[0] * ours[0] + mix[1] * ours[1]).sum(), leaves)
    expected = torch.autograd.grad((mix[0] * oracle[0] + mix[1] * oracle[1]).sum(), leaves)
    assert_close(ours, oracle, rtol=0, atol=1e-12)
    assert_close(gradients, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of", ["logprobs", "entropy", "both"])
def test_a_frozen_weight_gives_the_same_gradient_of_hidden(of: str) -> None:
    hidden, weight, targets, bias = model(7)
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(
        hidden, weight, targets, temperature=0.7, bias=bias, chunk=3, with_entropy=of != "logprobs"
    )
    expected_logprobs, expected_entropy = plain(hidden, weight, targets, 0.7, bias)
    ours = {"logprobs": logprobs, "entropy": entropy, "both": None if entropy is None else logprobs + 3 * entropy}[of]
    oracle = {
        "logprobs": expected_logprobs,
        "entropy": expected_entropy,
        "both": expected_logprobs + 3 * expected_entropy,
    }[of]
    assert ours is not None
    mix = torch.randn(7, dtype=torch.float64)
    assert_close(
        torch.autograd.grad((mix * ours).sum(), hidden),
        torch.autograd.grad((mix * oracle).sum(), hidden),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("postponed", [True, False])
def test_a_weights_gradient_may_be_taken_after_the_layers(postponed: bool) -> None:
    """The weight is an embedding's too, as tied ones are; asked twice, the answer is the same."""
    _, weight, targets, _ = model(7)
    weight.requires_grad_()
    same, later = taken_later(weight) if postponed else (weight, None)
    hidden = weight[targets].sin()
    ours, _ = token_logprobs(hidden, same, targets.flip(0), chunk=3, later=later)
    expected, _ = plain(weight[targets].sin(), weight, targets.flip(0), 1.0, None)
    (gradient,) = torch.autograd.grad(expected.square().sum(), weight)
    for _ in range(2):
        found = torch.autograd.grad(ours.square().sum(), [weight, hidden], retain_graph=True)
        assert_close(found[0], gradient, rtol=0, atol=1e-12)
        torch.autograd.grad(ours.sum(), hidden, retain_graph=True)
    with torch.no_grad():
        assert taken_later(weight) == (weight, None)

    order: list[str] = []
    other = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    same, later = taken_later(weight) if postponed else (weight, None)
    other.register_hook(lambda _: order.append("layers"))
    weight.register_hook(lambda _: order.append("weight"))
    token_logprobs(other.sin(), same, torch.arange(11), later=later)[0].sum().backward()
    assert order == (["layers", "weight"] if postponed else ["weight", "layers"])


def test_gradients_are_finite_differences() -> None:
    hidden, weight, targets, bias = model(4)

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        return token_logprobs(hidden, weight, targets, temperature=0.7, bias=bias, chunk=3, with_entropy=True)

    assert torch.autograd.gradcheck(scored, [leaf.requires_grad_() for leaf in (hidden, weight, bias)])
    assert torch.autograd.gradcheck(lambda h: scored(h, weight.detach(), bias.detach()), [hidden])


def test_in_bf16_only_the_products_are_rounded() -> None:
    """The softmax is in fp32: its error against fp64 is that of logits rounded to 8 bits, and no more."""
    hidden, weight, targets, _ = model(50, torch.bfloat16)
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, with_entropy=True)
    assert entropy is not None
    assert logprobs.dtype == entropy.dtype == torch.float32
    rounded = (hidden.detach() @ weight.T).double()
    logp = torch.log_softmax(rounded, -1)
    assert_close(logprobs.detach().double(), logp[torch.arange(50), targets], rtol=0, atol=1e-5)
    assert_close(entropy.detach().double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(exact, weight.double(), targets, 1.0, None)[0].sum(), exact)
    assert gradient.dtype == torch.bfloat16
    assert_close(gradient.double(), expected, rtol=2e-2, atol=3e-2)


def test_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that either pass makes has more rows of the vocabulary's width than a chunk."""
    rows, vocabulary, chunk = 64, 97, 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else [made]:
                if isinstance(one, Tensor) and one.dim() == 2 and one.shape[1] == vocabulary:
                    largest = max(largest, one.shape[0])
            return made

    for trained in (True, False):
        hidden = torch.randn(rows, 4, requires_grad=True)
        weight = torch.randn(vocabulary, 4, requires_grad=trained)
        with Watch():
            logprobs, entropy = token_logprobs(
                hidden, weight, torch.randint(0, vocabulary, (rows,)), chunk=chunk, with_entropy=True
            )
            assert entropy is not None
            (logprobs + entropy).sum().backward()
    assert largest == chunk


def test_ppo_at_ratio_1_has_reinforces_gradient() -> None:
    """logits [1, 2, 1, 1], action 1, advantage 1: the objective's gradient is the one-hot less the softmax."""
    logits = tensor([[1.0, 2.0, 1.0, 1.0]], requires_grad=True)
    logprobs, _ = token_logprobs(logits, torch.eye(4), tensor([1]))
    ratio = (logprobs - logprobs.detach()).exp()
    (gradient,) = torch.autograd.grad(ratio.sum(), logits)
    assert_close(gradient, tensor([[-0.1749, 0.5246, -0.1749, -0.1749]]), rtol=0, atol=5e-5)


@given(rows=st.integers(1, 9), chunk=st.integers(1, 10), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_full_kl_is_that_of_all_logits_at_once(rows: int, chunk: int, temperature: float) -> None:
    hidden, weight, _, bias = model(rows)
    below, other, _, ref_bias = model(rows)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    ours = full_kl(hidden, below, weight, other, temperature=temperature, bias=bias, ref_bias=ref_bias, chunk=chunk)
    policy, reference = (
        torch.distributions.Categorical(logits=(states @ head.T + offset) / temperature)
        for states, head, offset in ((hidden, weight, bias), (below, other, ref_bias))
    )
    oracle = torch.distributions.kl_divergence(policy, reference)
    mix, leaves = torch.randn(rows, dtype=torch.float64), (hidden, weight, bias)
    assert_close(ours, oracle, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad((mix * ours).sum(), leaves)
    assert_close(gradients, torch.autograd.grad((mix * oracle).sum(), leaves), rtol=0, atol=1e-10)
    assert_close(full_kl(hidden, hidden, weight, weight), torch.zeros(rows, dtype=torch.float64), rtol=0, atol=1e-12)
