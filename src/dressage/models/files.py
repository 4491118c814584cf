"""Roles on disk: adapters in the peft format, heads beside them, safetensors only; loading changes no number."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dressage.config import LoraConfig
from dressage.errors import CheckpointError, ModelError
from dressage.models.backbone import Backbone, peft_config
from dressage.models.pretrained import (
    ADAPTER_FILE,
    ROLE_FILE,
    lineage,
    load_base,
    model_shape,
    named_base,
    reads_both_ways,
)
from dressage.models.roles import Role, ScalarHead
from dressage.settings import ModelConfig, Pooling, Positive, Settings

WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"


@dataclass(frozen=True)
class Normalisation:
    """What was folded into a reward head: score = gain * raw + bias."""

    gain: float = 1.0
    bias: float = 0.0


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: written beside its place, then renamed over it.

    CheckpointError if it could not be written.
    """
    partial, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    remove(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        # Not only in the disk's cache: after a power cut the name would be there, and the bytes would not.
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
    except (OSError, SafetensorError) as error:
        remove(partial)
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target}: could not be written ({why}); what was there before stays") from error
    except BaseException:
        remove(partial)
        raise
    remove(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _to_disk(target.parent)
    remove(old)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """A file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Safetensors on the disk, not only in its cache. An OSError if the disk is full."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; CheckpointError if absent or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; the folder is not a whole checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); use an earlier checkpoint") from error


def save_role(
    folder: Path,
    role: Role,
    kind: str,
    model: ModelConfig,
    *,
    normalisation: Normalisation | None = None,
    tokenizer: Any = None,
) -> None:
    """A role as a folder: adapter (or whole model), head, and role.json with what a later load needs."""
    with new_folder(folder) as partial:
        if role.adapter is None:
            role.backbone.model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        else:
            save_tensors(role.backbone.adapter_state(role.adapter), partial / WEIGHTS)
            # A base that lies on this disk is named from the adapter's folder, so that a run can be moved whole.
            base = os.path.relpath(model.name, folder) if Path(model.name).is_dir() else model.name
            _write_json(partial / ADAPTER_FILE, peft_config(role.backbone, role.adapter, base))
        if role.head is not None:
            save_tensors(role.head.state_dict(), partial / HEAD)
        meta: dict[str, Any] = {"format": 1, "kind": kind, "depth": role.depth, "model": model.model_dump()}
        if kind == "reward":
            meta["pooling"] = role.pooling
        if role.adapter is not None:
            meta["lora"] = role.backbone.configs[role.adapter][0].model_dump()
        if normalisation is not None:
            meta["normalisation"] = {"gain": normalisation.gain, "bias": normalisation.bias}
        _write_json(partial / ROLE_FILE, meta)


def load_backbone(config: ModelConfig, *, to_read: bool = False) -> Backbone:
    """The model a name stands for: its base with every adapter of its lineage merged in.

    Raises: ModelError if it is an encoder, unless it is only `to_read`, as reward models do.
    """
    if not to_read and reads_both_ways(model_shape(config)):
        raise ModelError(f"{config.name}: an encoder reads and cannot write; only a reward model can stand on it")
    backbone = Backbone(load_base(config))
    for number, folder in enumerate(lineage(config.name).adapters):
        add_saved_adapter(backbone, folder, f"merged-{number}")
        backbone.merge(f"merged-{number}")
    backbone.model.requires_grad_(False)
    return backbone


def add_saved_adapter(backbone: Backbone, folder: Path, name: str, *, depth: int | None = None) -> None:
    """An adapter folder (ours, or one that peft saved) as an adapter of this backbone."""
    own = role_meta(folder) if (folder / ROLE_FILE).is_file() else {}
    config = LoraConfig(**own["lora"]) if own.get("lora") else _lora_of_peft(folder / ADAPTER_FILE)
    depth = own.get("depth", depth)
    if depth is not None and depth > backbone.depth:
        raise CheckpointError(f"{folder / ROLE_FILE}: depth={depth}: the model under it has {backbone.depth} layers")
    backbone.add_adapter(name, config, depth=depth)
    backbone.load_adapter_state(name, _finite(folder / WEIGHTS), str(folder))


def _lora_of_peft(path: Path) -> LoraConfig:
    """Settings of an adapter that peft saved; CheckpointError if it computes something else than ours would."""
    saved = _read_json(path)
    if saved.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path}: peft_type={saved['peft_type']}: only LORA adapters are read")
    for other in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if saved.get(other):
            raise CheckpointError(f"{path}: {other}={saved[other]}: is not read; merge the adapter with peft first")
    try:
        return LoraConfig(rank=saved["r"], alpha=saved["lora_alpha"], dropout=0.0)
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{path}: r and lora_alpha must be numbers; save the adapter again") from error


def _finite(path: Path) -> dict[str, Tensor]:
    """Tensors of a file; CheckpointError if one holds NaN or infinity."""
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite (NaN or infinity); use an earlier checkpoint")
    return tensors


def load_role(folder: Path, backbone: Backbone, name: str) -> Role:
    """A saved role as adapter `name` on this backbone, with its head and depth."""
    meta = role_meta(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{folder}: holds whole weights, not an adapter; load it as a model")
    add_saved_adapter(backbone, folder, name)
    return Role(backbone, name, _head_of(folder, meta, backbone), meta["depth"], pooling_of(meta))


def _head_of(folder: Path, meta: Mapping[str, Any], backbone: Backbone) -> ScalarHead | None:
    head = load_head(folder, backbone)
    if head is None and meta["kind"] == "reward":
        raise CheckpointError(f"{folder / HEAD}: is missing; a reward model cannot score without it")
    return head


def pooling_of(meta: Mapping[str, Any]) -> Pooling:
    """How a saved reward model reads; roles saved before there was a choice read at the last token."""
    pooling: Pooling = meta.get("pooling", "last")
    return pooling


def load_head(folder: Path, backbone: Backbone) -> ScalarHead | None:
    """The head beside a role, if it has one; CheckpointError if it is no scalar head of this width."""
    if not (folder / HEAD).is_file():
        return None
    state = _finite(folder / HEAD)
    head = ScalarHead(backbone.width)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / HEAD}: is no scalar head of width {backbone.width}") from error
    return head.to(backbone.device)


def load_reward_model(
    folder: Path, backbone: Backbone | None = None, backbone_config: ModelConfig | None = None, name: str = "reward"
) -> Role:
    """A reward model: on the given backbone if it was trained on that very one, else with its own weights."""
    meta = reward_meta(folder)
    model = saved_model(folder)
    if not (folder / ADAPTER_FILE).is_file():
        own = load_backbone(model, to_read=True)
        return Role(own, None, _head_of(folder, meta, own), meta["depth"], pooling_of(meta))
    if backbone is not None and backbone_config is not None and same_base(model, backbone_config):
        return load_role(folder, backbone, name)
    return load_role(folder, load_backbone(model, to_read=True), "reward")


def reward_meta(folder: Path) -> dict[str, Any]:
    """role.json of a reward model; ModelError if the folder holds none."""
    if not (folder / ROLE_FILE).is_file():
        raise ModelError(f"{folder}: no reward model here (no {ROLE_FILE}); train one with `dressage reward`")
    meta = role_meta(folder)
    if meta["kind"] != "reward":
        raise ModelError(f"{folder}: is a {meta['kind']}, not a reward model")
    return meta


def same_base(one: ModelConfig, other: ModelConfig) -> bool:
    """Do two settings stand for the same weights?"""
    left, right = lineage(one.name), lineage(other.name)
    folders = [[path.resolve() for path in side.adapters] for side in (left, right)]
    return left.base == right.base and folders[0] == folders[1] and one.dtype == other.dtype


def saved_model(folder: Path) -> ModelConfig:
    """The model under a saved role: what to load before its adapter, or the folder itself if it holds whole weights."""
    name = named_base(folder) if (folder / ADAPTER_FILE).is_file() else str(folder)
    return written_model(folder).model_copy(update={"name": name})


def written_model(folder: Path) -> ModelConfig:
    """The model's settings as role.json has them."""
    return ModelConfig(**role_meta(folder)["model"])


class RoleFile(Settings):
    """What role.json holds."""

    format: Literal[1]
    kind: Literal["policy", "value", "reward"]
    depth: Positive | None
    model: ModelConfig
    pooling: Pooling = "last"
    lora: LoraConfig | None = None
    normalisation: Mapping[str, float] | None = None


def role_meta(folder: Path) -> dict[str, Any]:
    """role.json of a saved role; CheckpointError if it is damaged."""
    meta = _read_json(folder / ROLE_FILE)
    try:
        RoleFile.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{folder / ROLE_FILE}: is damaged ({place}: {first['msg']}); save it again") from error
    return meta


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes: equal exactly when every bit is."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; the folder is not a whole checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); save it again") from error
    return value
