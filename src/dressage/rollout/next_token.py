"""One more token of every answer in one call of next_token.c, by a model that is built like Llama."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dressage import few_rows
from dressage.batches import Ints
from dressage.compiled import library
from dressage.models import lora

LANES = 8
"""Numbers that the processor takes at once: next_token.c cuts rows into so many, and leaves none over."""
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("weight", "bias", "down", "up")),
        ("rank", _COUNT),
        ("scale", ctypes.c_float),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _POINTER) for name in ("before_attention", "before_mlp", "keys", "values")),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("width", "inner", "heads", "kv_heads", "dim", "capacity", "vocabulary")),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
    ]


_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass
class NextToken:
    """The parts of a model, as next_token.c wants them. Where they lie is asked at every token: weights learn."""

    model: Any
    sizes: _Sizes
    layers: list[tuple[dict[str, nn.Module], Any, Any]]
    """Of each its linear layers by our names, and the norms before attention and before the gated part."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> NextToken | None:
        """None where a model has other parts than we know, somebody listens to them, or they are no float32 numbers.

        That the parts work together as ours do is not seen here: whoever asks compares (`best_way`).
        """
        parts: Any = model
        if few_rows.kernel() is None or model.dtype != torch.float32 or model.device.type != "cpu":
            return None
        if not all(map(_undisturbed, model.modules())):
            return None
        decoder: Any = getattr(parts, model.base_model_prefix, None)
        known = (
            _children(parts, {model.base_model_prefix, "lm_head"})
            and _children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
            and type(decoder.embed_tokens) is nn.Embedding
        )
        if not known:
            return None
        layers = []
        for layer in decoder.layers:
            known = (
                _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
                and _children(layer.self_attn, set(_ATTENTION))
                and _children(layer.mlp, {*_MLP, "act_fn"})
            )
            if not known:
                return None
            linears = {ours: layer.self_attn.get_submodule(name) for name, ours in _ATTENTION.items()}
            linears |= {ours: layer.mlp.get_submodule(name) for name, ours in _MLP.items()}
            layers.append((linears, layer.input_layernorm, layer.post_attention_layernorm))
        sizes = _sizes_of(parts, decoder)
        found = None if sizes is None else cls(parts, sizes, layers)
        return found if found is not None and found._laid_out(None) is not None else None

    def __call__(self, tokens: Ints, lengths: Ints, cache: Sequence[Any]) -> Tensor | None:
        """Logits [B, V] after these tokens [B], which enter the `cache` behind the first `lengths` [B] of each answer.

        None, and nothing has happened, where torch is to do it.
        """
        if torch.is_grad_enabled() or len(tokens) > few_rows.MOST:
            return None
        laid_out = self._laid_out(cache)
        if laid_out is None:
            return None
        layers, head = laid_out
        decoder, sizes, rows = getattr(self.model, self.model.base_model_prefix), self.sizes, len(tokens)
        states = decoder.embed_tokens(tokens[:, None])
        cosine, sine = (angles.contiguous() for angles in decoder.rotary_emb(states, lengths[:, None]))
        if cosine.shape != (rows, 1, sizes.dim) or cosine.dtype != torch.float32:
            return None
        sizes.capacity = cache[0].keys.shape[-2]
        rank = max(linear.rank for layer in layers for linear in _linears(layer))
        seen = sizes.kv_heads * (sizes.capacity + LANES)
        each = sizes.width + (sizes.heads + 2 * sizes.kv_heads) * sizes.dim + 2 * sizes.inner + rank + seen
        room = states.new_empty(rows * each)
        logits: Tensor = states.new_empty(rows, sizes.vocabulary)
        built = library("few_rows")
        assert built is not None
        built.next_token(
            layers,
            _COUNT(len(layers)),
            ctypes.byref(sizes),
            _POINTER(decoder.norm.weight.data_ptr()),
            ctypes.byref(head),
            *(_POINTER(block.data_ptr()) for block in (states, cosine, sine, lengths)),
            _COUNT(rows),
            _POINTER(room.data_ptr()),
            _POINTER(logits.data_ptr()),
        )
        return logits

    def _laid_out(self, cache: Sequence[Any] | None) -> tuple[ctypes.Array[_Layer], _Linear] | None:
        """Where everything lies just now."""
        layers, head = (_Layer * len(self.layers))(), _Linear()
        if not _fill(head, self.model.lm_head):
            return None
        for number, (layer, (linears, before_attention, before_mlp)) in enumerate(
            zip(layers, self.layers, strict=True)
        ):
            if not all(_fill(getattr(layer, name), linear) for name, linear in linears.items()):
                return None
            layer.before_attention = before_attention.weight.data_ptr()
            layer.before_mlp = before_mlp.weight.data_ptr()
            if cache is not None:
                layer.keys, layer.values = cache[number].keys.data_ptr(), cache[number].values.data_ptr()
        return layers, head


def _linears(layer: _Layer) -> Iterator[Any]:
    return (getattr(layer, name) for name in (*_ATTENTION.values(), *_MLP.values()))


def _fill(place: Any, module: nn.Module) -> bool:
    """What a linear layer computes now; False where that is something else."""
    addends = lora.addends_of(module)
    if addends is None:
        return False
    weight, bias, down, up, scale = addends
    for block in (weight, bias, down, up):
        if block is not None and (block.dtype != torch.float32 or not block.is_contiguous()):
            return False
    place.weight = weight.data_ptr()
    place.bias = None if bias is None else bias.data_ptr()
    if down is not None and up is not None:
        place.down, place.up, place.rank, place.scale = down.data_ptr(), up.data_ptr(), len(down), scale
    return True


def _sizes_of(model: Any, decoder: Any) -> _Sizes | None:
    config, first = model.config, decoder.layers[0]
    norms = [
        decoder.norm,
        *(n for layer in decoder.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    alike = {(type(norm), getattr(norm, "variance_epsilon", None), norm.weight.dtype) for norm in norms}
    scaling = {getattr(layer.self_attn, "scaling", None) for layer in decoder.layers}
    if len(alike) > 1 or len(scaling) > 1 or None in scaling or norms[0].weight.dtype != torch.float32:
        return None
    epsilon = getattr(norms[0], "variance_epsilon", None)
    shapes = [tuple(getattr(first.self_attn, name).weight.shape) for name in _ATTENTION]
    (of_heads, width), (of_kv, _), *_ = shapes
    inner, (vocabulary, _) = first.mlp.gate_proj.weight.shape[0], model.lm_head.weight.shape
    heads, kv_heads = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
    dim = of_heads // heads
    whole = (of_heads, of_kv) == (heads * dim, kv_heads * dim) and heads % kv_heads == 0
    if epsilon is None or not whole or any(size % LANES for size in (width, inner, dim)):
        return None
    return _Sizes(width, inner, heads, kv_heads, dim, 0, vocabulary, epsilon, scaling.pop())


def _children(module: Any, names: set[str]) -> bool:
    return isinstance(module, nn.Module) and {name for name, _ in module.named_children()} == names


def _undisturbed(module: nn.Module) -> bool:
    """Nobody listens to it, and its forward pass is its class's, or one of ours that computes the same."""
    forward = vars(module).get("forward")
    return not (module._forward_hooks or module._forward_pre_hooks) and (
        forward is None or getattr(forward, "func", None) in (few_rows.forward_of_linear, lora.forward_of_gated)
    )
