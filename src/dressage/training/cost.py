"""What a role costs in memory and operations, from its model's configuration alone.

Memory at its peak, in bytes, for a stage that learns:

    process        what Python and the libraries take by themselves
  + weights        size of the compute type each; under adapters they are frozen and have no gradient
  + learning       16 each: a float32 weight, its gradient and AdamW's two moments
  + activations    what the backward pass keeps of the largest micro-batch: for every padded token and every layer that
                   learns or lies above one that does, KEPT numbers for each output of a linear layer, and for each
                   input that models/frugal.py cannot make again;
                   a critic with weights of its own learns after the policy, so only the larger of the two counts
  + logits         LOGITS numbers for each entry of the vocabulary, for CHUNK tokens at a time

While sampling, keys and values of every answer decoded at once take the place of activations, and in float32 a copy of
the weights that the policy's adapter is merged into; not so under training.memory_gb.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dressage.config import LoraConfig, TrainingConfig
from dressage.errors import ConfigError
from dressage.models.backbone import Backbone, linear_shapes
from dressage.models.frugal import is_gated
from dressage.models.pretrained import compute_dtype, model_class, model_shape
from dressage.monitor.memory import has_arena
from dressage.settings import ModelConfig

PROCESS_BYTES = 0.48e9
KEPT = {True: 1.25, False: 3.0}
"""By whether torch's tensors lie in arena.c; what the C library keeps in between is too scattered to be used again.
Measured by benchmarks/kept.py."""
LOGITS, CHUNK = 3, 128
LEAST = 64
"""Tokens of the smallest micro-batch that a budget of memory is cut into, and of its steps."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its configuration alone."""

    weights: int
    layer_weights: int
    """In the matrices of one decoder layer: what a token is multiplied with."""
    layer_ends: int
    """Inputs and outputs of a layer's matrices, added up: also its adapter's weights for each rank."""
    layer_kept: int
    """Those of them that the backward pass does not make again: outputs, and what models/frugal.py does not know."""
    depth: int
    width: int
    vocabulary: int
    cached: int
    """Keys and values of a token in one layer."""
    bytes_each: int

    @property
    def head(self) -> float:
        """Operations for one token's logits."""
        return 2.0 * self.width * self.vocabulary


@dataclass(frozen=True)
class Reader:
    """A role, as far as cost goes: how many layers it reads, and which of them learn."""

    shape: Shape
    lora: LoraConfig | None = None
    depth: int | None = None

    @property
    def read(self) -> int:
        """Layers that a token passes."""
        return min(self.depth or self.shape.depth, self.shape.depth)

    @property
    def learnt(self) -> int:
        """Layers that learn, the uppermost of those read."""
        return self.read if self.lora is None or self.lora.layers is None else min(self.lora.layers, self.read)

    @property
    def learning(self) -> int:
        """Weights that learn."""
        return self.shape.weights if self.lora is None else self.learnt * self.shape.layer_ends * self.lora.rank

    @property
    def forward(self) -> float:
        """Operations a token."""
        return 2.0 * self.read * self.shape.layer_weights

    @property
    def training(self) -> float:
        """Operations a token, forward and backward."""
        return self.forward + (4.0 if self.lora is None else 2.0) * self.learnt * self.shape.layer_weights

    @property
    def kept_bytes(self) -> float:
        """Of a padded token, for the backward pass."""
        return KEPT[has_arena()] * self.learnt * self.shape.layer_kept * self.shape.bytes_each


def memory_of(shape: Shape, frozen: int, learning: int, working: float) -> float:
    """Bytes at the peak, `working` of them for activations, or for keys and values while sampling."""
    logits = LOGITS * CHUNK * shape.vocabulary * 4
    return PROCESS_BYTES + frozen * shape.bytes_each + 16 * learning + working + logits


def within(training: TrainingConfig, shape: Shape, frozen: int, learners: Sequence[Reader]) -> TrainingConfig:
    """With as many tokens a micro-batch as training.memory_gb has room for, if it is set.

    ConfigError where not even LEAST fit. `frozen`: weights in memory that do not learn.
    """
    if training.memory_gb is None:
        return training
    fixed = memory_of(shape, frozen, sum(one.learning for one in learners), 0.0)
    each = max(one.kept_bytes for one in learners)
    tokens = int((training.memory_gb * 1e9 - fixed) / each) // LEAST * LEAST
    if tokens < LEAST:
        raise ConfigError(
            f"training.memory_gb={training.memory_gb}: weights and what learns alone take {fixed / 1e9:.1f} GB; set"
            f" it to {(fixed + LEAST * each) / 1e9 + 0.05:.1f} or more, or lora.layers, lora.rank to less"
        )
    return training.model_copy(update={"micro_batch_tokens": tokens})


def frozen_weights(shape: Shape, copies: int, others: Sequence[Shape], learners: Sequence[Reader]) -> int:
    """Weights in memory that do not learn: those that do are among the 16 bytes each."""
    loaded = copies * shape.weights + sum(other.weights for other in others)
    return loaded - sum(learner.learning for learner in learners if learner.lora is None)


@cache
def shape_of(model: ModelConfig) -> Shape:
    """The sizes of a model, built of nothing but its configuration; no memory is taken for weights."""
    config = model_shape(model)
    kind, options = model_class(config)
    with torch.device("meta"):
        built = kind.from_config(config, trust_remote_code=model.trust_remote_code, **options)
    backbone, text = Backbone(built), config.get_text_config()
    first: Any = backbone.layers[0]
    matrices = [weight.shape for weight in first.parameters() if weight.dim() == 2]
    ends = sum(rows + columns for rows, columns in matrices)
    # What norms and attention hand on has the model's width.
    made_again = sum(inputs for _, inputs in linear_shapes(first) if inputs == backbone.width)
    made_again += sum(layer.down_proj.in_features for layer in first.modules() if is_gated(layer))
    per_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        weights=sum(weight.numel() for weight in built.parameters()),
        layer_weights=sum(rows * columns for rows, columns in matrices),
        layer_ends=ends,
        layer_kept=ends - made_again,
        depth=backbone.depth,
        width=backbone.width,
        vocabulary=text.vocab_size,
        cached=2 * per_head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        bytes_each=compute_dtype(model.dtype).itemsize,
    )


@cache
def product_speed(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations a second in matrix products of a small model's size, on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.ones(256, 576, dtype=dtype, device=device), torch.ones(576, 1536, dtype=dtype, device=device)
    ends = time.perf_counter() + seconds
    fastest = seconds
    while (began := time.perf_counter()) < ends:
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        # The fastest: the first sets up threads and kernels, others are disturbed.
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * 256 * 576 * 1536 / fastest
