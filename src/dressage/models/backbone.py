"""One frozen language model and the low-rank adapters that share it: which one speaks is a switch, none is the base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dressage.config import LoraConfig
from dressage.errors import CheckpointError
from dressage.models.frugal import Parts, frugal_parts
from dressage.models.lora import LoraLinear

if TYPE_CHECKING:
    from dressage.models.reading import Trunk


class Backbone:
    """One frozen language model and the adapters that share it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.base_model
        self.layers: nn.ModuleList = _layers(self.decoder, model.config.get_text_config().num_hidden_layers)
        self.linears: dict[str, LoraLinear] = {}
        self.configs: dict[str, tuple[LoraConfig, list[str]]] = {}
        self.first_layer: dict[str, int] = {}
        self.trunk: Trunk | None = None
        """What its lowest layers made of texts, while that is worth remembering."""
        self.reads_trees: bool | None = None
        """Whether it can be given a batch as a tree; None: nobody has asked."""

    @cached_property
    def frugal_parts(self) -> Parts:
        """What in its layers keeps less while it learns."""
        with self.using(None):
            return frugal_parts(self.layers)

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def first_position(self) -> int:
        """The number of a text's first token: roberta's table of positions begins with one for padding."""
        table = getattr(getattr(self.decoder, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return torch.device(next(self.model.parameters()).device)

    def add_adapter(self, name: str, config: LoraConfig, *, depth: int | None = None, seed: int = 0) -> None:
        """A new adapter on the linear layers of the first `depth` decoder layers; it changes nothing yet (up is 0)."""
        self.freeze_base()
        generator = torch.Generator().manual_seed(seed)
        reached = self.depth if depth is None else depth
        first = 0 if config.layers is None else max(0, reached - config.layers)
        targets = [path for path, index in self._targets() if first <= index < reached]
        for path in targets:
            linear = self._wrapped(path)
            out_features, in_features = _shape(linear.base, linear.transposed)
            down = torch.empty(config.rank, in_features).uniform_(-1, 1, generator=generator) / math.sqrt(in_features)
            linear.down[name] = nn.Parameter(down.to(self.device))
            linear.up[name] = nn.Parameter(torch.zeros(out_features, config.rank, device=self.device))
            linear.scale[name] = config.alpha / config.rank
            linear.dropout[name] = config.dropout
        self.configs[name] = (config, targets)
        self.first_layer[name] = first

    def freeze_base(self) -> None:
        """Adapters keep learning, everything else does not."""
        adapters = {id(p) for linear in self.linears.values() for p in linear.parameters()}
        for linear in self.linears.values():
            adapters -= {id(p) for p in linear.base.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in adapters:
                parameter.requires_grad_(False)

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""
        for path in self.configs.pop(name)[1]:
            linear = self.linears[path]
            del linear.down[name], linear.up[name], linear.scale[name], linear.dropout[name]

    def adapter_state(self, name: str) -> dict[str, nn.Parameter]:
        """Its parameters under the names of the peft file format."""
        state: dict[str, nn.Parameter] = {}
        for path in self.configs[name][1]:
            state[f"base_model.model.{path}.lora_A.weight"] = self.linears[path].down[name]
            state[f"base_model.model.{path}.lora_B.weight"] = self.linears[path].up[name]
        return state

    def load_adapter_state(self, name: str, state: Mapping[str, Tensor], where: str) -> None:
        """Overwrite an adapter's parameters; CheckpointError if the names or shapes are not exactly its own."""
        own = self.adapter_state(name)
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[0]
            raise CheckpointError(f"{where}: adapter does not fit the model: {odd} is on one side only")
        with torch.no_grad():
            for key, parameter in own.items():
                if parameter.shape != state[key].shape:
                    raise CheckpointError(f"{where}: {key} is {tuple(state[key].shape)}, not {tuple(parameter.shape)}")
                parameter.copy_(state[key])

    def merge(self, name: str) -> None:
        """Add an adapter into the base's weights and forget it."""
        with torch.no_grad():
            for path in self.configs[name][1]:
                linear = self.linears[path]
                weight, delta = linear.weight, linear.delta(name)
                weight.copy_((weight.float() + (delta.T if linear.transposed else delta)).to(weight.dtype))
        self.drop_adapter(name)
        self._unwrap()

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within, this adapter speaks; None: the base alone."""
        before = {path: linear.active for path, linear in self.linears.items()}
        for linear in self.linears.values():
            linear.active = name
        try:
            yield
        finally:
            for path, linear in self.linears.items():
                linear.active = before[path]

    @contextmanager
    def merged(self, name: str | None) -> Iterator[None]:
        """Within, this adapter, when it speaks, is part of its layers' weights: quicker, for a copy of them in memory.

        Equal to rounding in float32. A narrower type would round the adapter away: there, nothing is merged.
        """
        paths = [] if name is None else self.configs[name][1]
        linears = [linear for path in paths if (linear := self.linears[path]).weight.dtype == torch.float32]
        with torch.no_grad():
            for linear in linears:
                assert name is not None
                linear.merged = (name, linear.frozen_weight() + linear.delta(name))
        try:
            yield
        finally:
            for linear in linears:
                linear.merged = None

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """Within, adapters drop out as configured. The base never does: it stays in eval mode."""
        for linear in self.linears.values():
            linear.training = True
        try:
            yield
        finally:
            for linear in self.linears.values():
                linear.training = False

    def _targets(self) -> Iterator[tuple[str, int]]:
        """Paths of the linear layers inside the decoder layers, with the layer's number."""
        number = {id(layer): index for index, layer in enumerate(self.layers)}
        for layer_path, layer in self.model.named_modules():
            if id(layer) not in number:
                continue
            for path, module in layer.named_modules():
                full = f"{layer_path}.{path}"
                if full in self.linears or (_is_linear(module) and not path.endswith(".base")):
                    yield full, number[id(layer)]

    def _wrapped(self, path: str) -> LoraLinear:
        if path not in self.linears:
            parent, _, leaf = path.rpartition(".")
            base = self.model.get_submodule(path)
            self.linears[path] = LoraLinear(base, transposed=not isinstance(base, nn.Linear))
            setattr(self.model.get_submodule(parent), leaf, self.linears[path])
        return self.linears[path]

    def _unwrap(self) -> None:
        """Take away the wrappers that no adapter uses, so that a merged model is a plain one."""
        for path, linear in list(self.linears.items()):
            if not linear.down:
                parent, _, leaf = path.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, linear.base)
                del self.linears[path]


def peft_config(backbone: Backbone, name: str, base: str) -> dict[str, Any]:
    """adapter_config.json as the peft library reads it."""
    config, targets = backbone.configs[name]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if backbone.model.can_generate() else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": any(backbone.linears[path].transposed for path in targets),
        "inference_mode": True,
        # A pattern of the whole path: peft then wraps these layers and no others.
        "target_modules": "|".join(re.escape(path) for path in targets)
        if _partial(backbone, targets)
        else _leaves(targets),
    }


def _partial(backbone: Backbone, targets: list[str]) -> bool:
    return len(targets) < sum(1 for _ in backbone._targets())


def _leaves(targets: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in targets})


def _layers(decoder: nn.Module, count: int) -> nn.ModuleList:
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(decoder).__name__} has no list of {count} layers")


def linear_shapes(layer: nn.Module) -> list[tuple[int, int]]:
    """Outputs and inputs of every linear layer in there."""
    return [_shape(linear, not isinstance(linear, nn.Linear)) for linear in layer.modules() if _is_linear(linear)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(base: nn.Module, transposed: bool) -> tuple[int, int]:
    rows, columns = base.weight.shape  # type: ignore[misc]
    return (int(columns), int(rows)) if transposed else (int(rows), int(columns))
