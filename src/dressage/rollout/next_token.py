"""One more token of every answer in one call of next_token.c, by a model that is built like Llama."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers import PreTrainedModel

from dressage import few_rows
from dressage.batches import Ints
from dressage.models import lora

LANES = 8
"""next_token.c cuts rows into so many numbers, and leaves none over."""
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


_LISTENING = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)
"""Those who listen to all modules there are."""
_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass
class NextToken:
    """The parts of a model, as next_token.c wants them. Where they lie is asked at every token: weights learn."""

    model: Any
    decoder: Any
    sizes: _Sizes

    @classmethod
    def of(cls, model: PreTrainedModel) -> NextToken | None:
        """None where a model has other parts than we know, somebody listens to them, or they are no float32 numbers.

        That the parts work together as ours do is not seen here: whoever asks compares (`best_way`).
        """
        parts: Any = model
        if few_rows.kernel() is None or model.dtype != torch.float32 or model.device.type != "cpu":
            return None
        decoder: Any = getattr(parts, model.base_model_prefix, None)
        known = (
            not any(_LISTENING)
            and all(map(_undisturbed, model.modules()))
            and _children(parts, {model.base_model_prefix, "lm_head"})
            and _children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
            and type(decoder.embed_tokens) is nn.Embedding
            and all(
                _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
                and _children(layer.self_attn, set(_ATTENTION))
                and _children(layer.mlp, {*_MLP, "act_fn"})
                for layer in decoder.layers
            )
        )
        if not known:
            return None
        sizes = _sizes_of(parts.config, decoder, lora.addends_of(parts.lm_head))
        return None if sizes is None else cls(parts, decoder, sizes)

    def __call__(self, tokens: Ints, lengths: Ints, positions: Ints, cache: Sequence[Any]) -> Tensor | None:
        """Logits [B, V] after these tokens [B], which enter the `cache` behind the first `lengths` [B] of each answer.

        None, and nothing has happened, where torch is to do it.
        """
        decoder, sizes, rows = self.decoder, self.sizes, len(tokens)
        if torch.is_grad_enabled() or rows > few_rows.MOST:
            return None
        sizes.capacity = cache[0].keys.shape[-2]
        room = (sizes.kv_heads, sizes.capacity, sizes.dim)
        if any(layer.keys.shape[1:] != room or layer.values.shape[1:] != room for layer in cache):
            return None
        layers, head = (_Layer * len(cache))(), _Linear()
        filled = [_fill(head, self.model.lm_head)]
        rank = 0
        for place, layer, block in zip(layers, decoder.layers, cache, strict=True):
            for owner, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _MLP)):
                for name, ours in names.items():
                    linear = getattr(place, ours)
                    filled.append(_fill(linear, owner._modules[name]))
                    rank = max(rank, linear.rank)
            place.before_attention = layer.input_layernorm.weight.data_ptr()
            place.before_mlp = layer.post_attention_layernorm.weight.data_ptr()
            place.keys, place.values = block.keys.data_ptr(), block.values.data_ptr()
        if not all(filled):
            return None
        states = decoder.embed_tokens(tokens[:, None])
        cosine, sine = (angles.contiguous() for angles in decoder.rotary_emb(states, positions[:, None]))
        if cosine.shape != (rows, 1, sizes.dim) or cosine.dtype != torch.float32:
            return None
        seen = sizes.kv_heads * (sizes.capacity + LANES)
        each = sizes.width + (sizes.heads + 2 * sizes.kv_heads) * sizes.dim + 2 * sizes.inner + rank + seen
        between = states.new_empty(rows * each)
        widest = max(sizes.width, sizes.heads * sizes.dim, sizes.inner)
        beside = states.new_empty(few_rows.filled_up(rows) * (widest + rank))
        logits: Tensor = states.new_empty(rows, sizes.vocabulary)
        built = few_rows.built()
        assert built is not None
        built.next_token(
            layers,
            _COUNT(len(layers)),
            ctypes.byref(sizes),
            _POINTER(decoder.norm.weight.data_ptr()),
            ctypes.byref(head),
            *(_POINTER(block.data_ptr()) for block in (states, cosine, sine, lengths)),
            _COUNT(rows),
            *(_POINTER(block.data_ptr()) for block in (between, beside, logits)),
        )
        return logits


def _fill(place: Any, module: nn.Module) -> bool:
    """What a linear layer computes now; False where that is something else. Its sizes were looked at before."""
    addends = lora.addends_of(module)
    if addends is None:
        return False
    weight, bias, down, up, scale = addends
    place.weight = weight.data_ptr()
    if bias is not None:
        place.bias = bias.data_ptr()
    if down is not None and up is not None:
        place.down, place.up, place.rank, place.scale = down.data_ptr(), up.data_ptr(), len(down), scale
    return True


def _sizes_of(config: Any, decoder: Any, head: lora.Computed | None) -> _Sizes | None:
    """None where anything has another size, type or place than the whole would have it."""
    layers = list(decoder.layers)
    if not layers or head is None or head[2] is not None:
        return None
    first: Any = layers[0].self_attn
    epsilon, scaling = getattr(decoder.norm, "variance_epsilon", None), getattr(first, "scaling", None)
    heads: Any = getattr(config, "num_attention_heads", None)
    kv_heads: Any = getattr(config, "num_key_value_heads", None) or heads
    inner: Any = getattr(config, "intermediate_size", None)
    dim: Any = getattr(first, "head_dim", None)
    width = decoder.embed_tokens.weight.shape[1]
    counts = all(isinstance(size, int) for size in (heads, kv_heads, dim, inner))
    if not (counts and isinstance(epsilon, float) and isinstance(scaling, float)):
        return None
    if heads % kv_heads or any(size % LANES for size in (width, inner, dim)):
        return None
    norms = [decoder.norm, *(n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm))]
    alike = all(
        type(norm) is type(decoder.norm)
        and getattr(norm, "variance_epsilon", None) == epsilon
        and _plain(getattr(norm, "weight", None), width)
        for norm in norms
    ) and all(getattr(layer.self_attn, "scaling", None) == scaling for layer in layers)
    of_heads, of_kv = heads * dim, kv_heads * dim
    shapes = {
        "q_proj": (of_heads, width),
        "k_proj": (of_kv, width),
        "v_proj": (of_kv, width),
        "o_proj": (width, of_heads),
    }
    shapes |= {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    vocabulary = head[0].shape[0]
    fit = _fits(head, vocabulary, width) and all(
        _fits(lora.addends_of((layer.self_attn if name in _ATTENTION else layer.mlp).get_submodule(name)), *shape)
        for layer in layers
        for name, shape in shapes.items()
    )
    return _Sizes(width, inner, heads, kv_heads, dim, 0, vocabulary, epsilon, scaling) if alike and fit else None


def _fits(addends: lora.Computed | None, out: int, width: int) -> bool:
    if addends is None:
        return False
    weight, bias, down, up, _ = addends
    added = down is None or up is None or (_plain(down, len(down), width) and _plain(up, out, len(down)))
    return _plain(weight, out, width) and (bias is None or _plain(bias, out)) and added


def _plain(block: Any, *shape: int) -> bool:
    """Numbers that lie in float32, one after the other, where the processor finds them."""
    return (
        type(block) in (Tensor, nn.Parameter)
        and block.shape == shape
        and block.dtype == torch.float32
        and block.is_cpu
        and block.is_contiguous()
    )


def _children(module: Any, names: set[str]) -> bool:
    return isinstance(module, nn.Module) and {name for name, _ in module.named_children()} == names


def _undisturbed(module: nn.Module) -> bool:
    """Nobody listens to it, and its forward pass is its class's, or ours that computes the same."""
    forward = vars(module).get("forward")
    return not (module._forward_hooks or module._forward_pre_hooks) and (
        forward is None or getattr(forward, "func", None) is few_rows.forward_of_linear
    )
