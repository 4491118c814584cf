"""AdamW over a role's parameters, and the learning rate of a step as a pure function: nothing to save but moments."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dressage.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, peak: float | None = None) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then constant, or falling to 0 after the last step."""
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * max(0.0, 1 - done)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Optimizer:
    """AdamW on named parameters; one learning rate a group, given anew at every step."""

    def __init__(self, groups: Mapping[str, Mapping[str, nn.Parameter]], config: OptimizerConfig) -> None:
        self.config = config
        self.named = {f"{group}/{name}": p for group, named in groups.items() for name, p in named.items()}
        self.groups = list(groups)
        self.adamw = torch.optim.AdamW(
            [{"params": list(named.values())} for named in groups.values()],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,  # nothing of the size of the weights beside them
        )

    def step(self, rates: Mapping[str, float]) -> float:
        """Clips the gradient of each group to the configured norm, applies it, clears it.

        Returns the norm over all groups before clipping. A group whose rate is absent rests, moments and all.
        """
        norms = []
        for name, group in zip(self.groups, self.adamw.param_groups, strict=True):
            if name not in rates:
                for parameter in group["params"]:
                    parameter.grad = None
                continue
            group["lr"] = rates[name]
            norms.append(torch.nn.utils.clip_grad_norm_(group["params"], self.config.max_gradient_norm))
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(torch.stack(norms).norm()) if norms else 0.0

    def weights(self) -> dict[str, Tensor]:
        """What learns, by "group/name"."""
        return {name: p.detach() for name, p in self.named.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's memory, by "name:field"."""
        return {
            f"{name}:{field}": value
            for name, parameter in self.named.items()
            for field, value in self.adamw.state.get(parameter, {}).items()
        }

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Weights and moments as they were saved; a weight of which no moments were has none."""
        self.adamw.state.clear()
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(weights[name])
                own = {key.rpartition(":")[2]: v for key, v in moments.items() if key.rpartition(":")[0] == name}
                if own:
                    self.adamw.state[parameter] = {
                        field: value.clone().to(parameter.device) for field, value in own.items()
                    }
