"""What a run will take, told before it begins: the data are read, no weights are. Every formula stands here.

Memory at its peak, in bytes, for a stage that learns:

    process        what Python and the libraries take by themselves
  + weights        size of the compute type each; under adapters they are frozen and have no gradient
  + learning       16 each: a float32 weight, its gradient and AdamW's two moments
  + activations    what the backward pass keeps of the largest micro-batch: for every padded token and every layer that
                   learns or lies above one that does, KEPT numbers for each input and output of a linear layer
  + logits         LOGITS numbers for each of the vocabulary's entries, for a chunk of CHUNK tokens at a time

Time is floating-point operations divided by the speed of a matrix product measured on the spot, times OVERHEAD. With N
weights in the layers passed, a token costs 2 N forward; backward 2 N in the layers that hold adapters, 4 N with full
weights. Logits are taken for answers alone. Attention between tokens is left out: sequences are short here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from dressage.config import (
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    PpoConfig,
    RankConfig,
    RewardConfig,
    SampleConfig,
    Settings,
    SftConfig,
    TrainingConfig,
)
from dressage.data.order import batch_indices, length_sorted_chunks, steps_per_epoch
from dressage.models.files import role_meta
from dressage.models.lora import Backbone
from dressage.models.pretrained import compute_dtype, model_shape

Records = Literal["demonstrations", "rankings", "prompts"]
Read = Callable[[Records, DataConfig, ModelConfig, int], Any]
"""Reads, splits and encodes records: an object with `train` and `heldout`."""

PROCESS_BYTES = 0.45e9
KEPT = 1.3
LOGITS, CHUNK = 3, 256
OVERHEAD = 1.5
"""Norms, attention, copies and Python beside the products; measured on SmolLM2-135M on two cores."""
SIMULATED_STEPS = 200
"""Steps of which the batches are laid out one by one; longer runs are extrapolated."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its configuration alone."""

    weights: int
    layer_weights: int
    """In one decoder layer: what a token is multiplied with."""
    layer_ends: int
    """Inputs and outputs of a layer's linear layers, added up."""
    depth: int
    head_weights: int
    """Vocabulary times width."""
    vocabulary: int
    cached: int
    """Numbers that a layer keeps of a token while decoding."""
    lora_weights: Mapping[int, int]
    """Rank -> adapter weights of one layer."""


@dataclass(frozen=True)
class Reader:
    """A role, as far as cost goes: how many layers it reads, and which of them learn."""

    shape: Shape
    learns: bool = False
    lora: LoraConfig | None = None
    depth: int | None = None

    @property
    def read(self) -> int:
        """Layers passed through."""
        return min(self.depth or self.shape.depth, self.shape.depth)

    @property
    def learnt(self) -> int:
        """Layers that the backward pass goes through."""
        if not self.learns:
            return 0
        return self.read if self.lora is None or self.lora.layers is None else min(self.lora.layers, self.read)
