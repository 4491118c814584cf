"""Roles: policy, reference, value, reward. Each is own weights, or an adapter and a head on one shared base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dressage.models.backbone import Backbone
from dressage.models.reading import read, read_padded, reads_trees, tree_of
from dressage.settings import Pooling


class ScalarHead(nn.Module):
    """A number for a hidden state: weight . h + bias, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))

    @classmethod
    def for_reward(cls, width: int, seed: int) -> ScalarHead:
        """Normal with deviation 1/sqrt(d + 1), no bias to learn: pairs do not see it (Stiennon et al. 2020)."""
        head = cls(width)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, (width + 1) ** -0.5, generator=generator)
        head.bias.requires_grad_(False)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...]."""
        return hidden.float() @ self.weight + self.bias

    def normalise(self, gain: float, bias: float) -> None:
        """From now on scores are gain * score + bias."""
        with torch.no_grad():
            self.weight.mul_(gain)
            self.bias.mul_(gain).add_(bias)


@dataclass(frozen=True)
class Role:
    """Somebody who reads tokens: which weights, which adapter, which head, after how many layers."""

    backbone: Backbone
    adapter: str | None = None  # None: the backbone's own weights
    head: ScalarHead | None = None
    depth: int | None = None  # None: all layers and the final norm
    pooling: Pooling = "last"  # where a reward model's score is read

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this role learns, by name."""
        body = (
            {name: p for name, p in self.backbone.model.named_parameters() if p.requires_grad}
            if self.adapter is None
            else dict(self.backbone.adapter_state(self.adapter))
        )
        head = {} if self.head is None else {f"head.{n}": p for n, p in self.head.named_parameters() if p.requires_grad}
        return body | head

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within, the backbone's model is this role."""
        with self.backbone.using(self.adapter):
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """As `speaking`, at the speed of a model without adapters where memory for it is spent (see `merged`)."""
        with self.speaking(), self.backbone.merged(self.adapter):
            yield

    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, T, H]; padding may stand on either side, and gets any.

        What several texts begin with is computed once, and padding not at all, where the architecture allows it.
        """
        with self.speaking():
            if reads_trees(self.backbone):
                tree = tree_of(tokens, attention_mask)
                states = F.embedding(tree.place, read(self.backbone, tree, self.adapter, self.depth))
            else:
                states = read_padded(self.backbone, tokens, attention_mask, self.depth)
        if self.depth is None or self.depth == self.backbone.depth:
            return states
        # Inner states are not normed: bring them to the scale a head expects.
        return F.layer_norm(states, states.shape[-1:])
