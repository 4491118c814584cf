"""Distance from the reference: estimates from sampled tokens, and rules for the coefficient that prices it.

All three estimate KL(policy || reference) in nats from tokens sampled by the policy. Each is positive where the policy
finds the sampled token likelier than the reference does.
"""

from __future__ import annotations

from dressage.batches import PerToken


def k1(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """log policy - log reference: unbiased, of either sign. The one for rewards and for sums over an answer."""
    return logprobs - ref_logprobs


def k2(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """Half the squared log-ratio: biased, but on tokens of the present policy its gradient is the KL's own."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: PerToken, ref_logprobs: PerToken) -> PerToken:
    """ratio - 1 - log(ratio) with ratio = reference / policy: unbiased, never negative (Schulman 2020)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def proportional(coef: float, kl: float, target: float, horizon: float, n: int) -> float:
    """The coefficient after n more answers whose KL was `kl`, steered to `target` (Ziegler et al. 2019, sec. 2.2).

    `kl` and `target` are in the same unit: nats an answer. `horizon` is in answers.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * n / horizon)


def band(coef: float, kl: float, low: float, high: float, factor: float) -> float:
    """The coefficient times `factor` if `kl` is above `high`, divided by it if below `low`, else as it was."""
    if kl > high:
        return coef * factor
    return coef / factor if kl < low else coef
