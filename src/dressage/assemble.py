"""Settings to objects: here and in assemble_rewards.py names become classes, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dressage.algorithms.catalog import Algorithm, preference_algorithm
from dressage.config import (
    DataConfig,
    DpoConfig,
    LoraConfig,
    OptimizerConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TrainingConfig,
)
from dressage.data.merge import merged
from dressage.data.order import steps_per_epoch
from dressage.data.prepare import (
    Prepared,
    prepare_demonstrations,
    prepare_prompts,
    prepare_rankings,
    prepare_ratings,
    split,
)
from dressage.data.sources import Loaded, read_demonstrations, read_prompts, read_rankings, read_ratings
from dressage.data.template import READER, ChatTemplate
from dressage.errors import ConfigError, DataError, ModelError
from dressage.material import path as material_path
from dressage.models.backbone import Backbone
from dressage.models.files import (
    load_backbone,
    load_head,
    load_role,
    pooling_of,
    reward_meta,
    same_base,
    saved_model,
    written_model,
)
from dressage.models.pretrained import ROLE_FILE, load_tokenizer, model_shape, quiet_transformers, reads_both_ways
from dressage.models.roles import Role, ScalarHead
from dressage.monitor.writers import Monitor
from dressage.rollout.engine import Engine
from dressage.rollout.native import NativeEngine
from dressage.settings import ModelConfig
from dressage.training.cost import Reader, frozen_weights, shape_of, within
from dressage.training.optimizer import Optimizer, learning_rate
from dressage.training.update import Learner

Records = Literal["demonstrations", "rankings", "ratings", "prompts"]
MATERIAL = "material:"


@dataclass(frozen=True)
class Rows:
    """Encoded rows to learn from and to measure on, and a line about each source."""

    train: Sequence[Any]
    heldout: Sequence[Any]
    notes: tuple[str, ...]
    train_records: Sequence[Any]
    heldout_records: Sequence[Any]


def build_template(model: ModelConfig) -> ChatTemplate:
    """The chat template of a model, as its settings want it."""
    tokenizer, source, shape = load_tokenizer(model), model.chat_template, model_shape(model)
    words, known = max(tokenizer.get_vocab().values(), default=0) + 1, shape.get_text_config().vocab_size
    if words > known:
        raise ModelError(f"{model.name}: the tokenizer has {words} tokens, the model {known}: they are of two")
    if source is None and not tokenizer.chat_template and reads_both_ways(shape):
        source = READER
    try:
        return ChatTemplate.of(tokenizer, system=model.system, thinking=model.thinking, template=source)
    except ModelError as error:
        raise ModelError(f"{model.name}: {error}") from error


def build_rows(kind: Records, data: DataConfig, template: ChatTemplate, seed: int) -> Rows:
    """Records of the sources, split without leakage and encoded. DataError if nothing is left to learn from."""
    notes: list[str] = []
    train = _records(kind, data.sources, data, notes)
    heldout = _records(kind, data.heldout, data, notes)
    if not heldout and data.heldout_fraction > 0:
        train, heldout = split(train, fraction=data.heldout_fraction, seed=seed)
    rows = {}
    for name, records in {"train": train, "held-out": heldout}.items():
        prepared = _prepare(kind, records, data, template)
        notes.append(f"{name}: {prepared.summary()}")
        rows[name] = prepared
    if not rows["train"].rows:
        raise DataError(f"{', '.join(data.sources)}: no row is left to learn from; {'; '.join(notes)}")
    train_rows = rows["train"].rows
    if kind == "rankings" and not any(len(set(row.ranks)) > 1 or len(set(row.grades)) > 1 for row in train_rows):
        raise DataError(f"{', '.join(data.sources)}: every ranking is a tie: nothing is preferred, nothing to learn")
    kept = {
        name: [records[i] for i in rows[name].indices]
        for name, records in {"train": train, "held-out": heldout}.items()
    }
    return Rows(rows["train"].rows, rows["held-out"].rows, tuple(notes), kept["train"], kept["held-out"])


def _records(kind: Records, sources: Sequence[str], data: DataConfig, notes: list[str]) -> tuple[Any, ...]:
    readers: dict[Records, Callable[..., Loaded[Any]]] = {
        "demonstrations": read_demonstrations,
        "rankings": partial(read_rankings, repeated=data.merge is not None),
        "ratings": read_ratings,
        "prompts": read_prompts,
    }
    if data.merge is not None and kind != "rankings":
        raise ConfigError(f"data.merge={data.merge}: only rankings can be merged, and these are {kind}")
    read = readers[kind]
    records: list[Any] = []
    for source in sources:
        loaded = read(located(source), on_bad_row=data.on_bad_row, limit=data.limit)
        notes.append(f"{source}: {loaded.summary()}")
        records += loaded.records
    if data.merge is not None and records:
        of_prompts = merged(records, data.merge)
        notes.append(f"merged: {len(records)} rankings of {len(of_prompts)} prompts")
        return of_prompts
    return tuple(records)


def located(source: str) -> str:
    """ "material:NAME" as the path of what Dressage ships; anything else as it is."""
    return str(material_path(source.removeprefix(MATERIAL))) if source.startswith(MATERIAL) else source


def _prepare(kind: Records, records: Sequence[Any], data: DataConfig, template: ChatTemplate) -> Prepared[Any]:
    limits = {"max_tokens": data.max_tokens, "on_too_long": data.on_too_long}
    match kind:
        case "demonstrations":
            return prepare_demonstrations(records, template, **limits)  # type: ignore[arg-type]
        case "rankings":
            return prepare_rankings(records, template, **limits)  # type: ignore[arg-type]
        case "ratings":
            return prepare_ratings(records, template, **limits)  # type: ignore[arg-type]
        case "prompts":
            return prepare_prompts(records, template, **limits)  # type: ignore[arg-type]


def learning_model(config: SftConfig | RewardConfig | DpoConfig | PpoConfig) -> ModelConfig:
    """The model as it is loaded to learn: where all weights do, they are float32 (steps get lost in bfloat16)."""
    return _learning(config.model, config.lora)


def _learning(model: ModelConfig, lora: LoraConfig | None, section: str = "") -> ModelConfig:
    if lora is not None:
        return model
    if model.dtype == "bfloat16":
        raise ConfigError(
            f"{section}lora=null with {section}model.dtype=bfloat16: whole weights learn in float32; set"
            f" {section}model.dtype=float32"
        )
    return model.model_copy(update={"dtype": "float32"})


def build_role(
    backbone: Backbone,
    name: str,
    lora: LoraConfig | None,
    *,
    seed: int,
    head: ScalarHead | None = None,
    depth: int | None = None,
) -> Role:
    """A role that learns: an adapter on the shared base, or the backbone's own weights."""
    if depth is not None and depth > backbone.depth:
        raise ConfigError(f"depth={depth}: the model has {backbone.depth} layers")
    if lora is not None:
        backbone.add_adapter(name, lora, depth=depth, seed=seed)
    else:
        backbone.model.requires_grad_(True)
    return Role(backbone, name if lora else None, head.to(backbone.device) if head else None, depth)


def build_reward_role(config: RewardConfig) -> Role:
    """A reward model that learns: begun anew, or from one that is there already."""
    model = learning_model(config)
    if config.settings.get("lm_coef") and reads_both_ways(model_shape(model)):
        raise ConfigError(f"settings.lm_coef imitates answers, and model.name={model.name} is an encoder; set it to 0")
    if config.start is None:
        backbone = load_backbone(model, to_read=True)
        head = ScalarHead.for_reward(backbone.width, config.seed)
        role = build_role(backbone, "reward", config.lora, seed=config.seed, head=head, depth=config.depth)
    else:
        role = _begun(config, Path(config.start), model)
    role = replace(role, pooling=config.pooling)
    assert role.head is not None
    # Pairs do not see a bias; grades do.
    role.head.bias.requires_grad_(config.loss == "regression")
    return role


def _begun(config: RewardConfig, folder: Path, model: ModelConfig) -> Role:
    meta = reward_meta(folder)
    whole = "lora" not in meta
    was = ModelConfig(**meta["model"]) if whole else saved_model(folder)
    if not same_base(was, config.model):
        raise ConfigError(
            f"start={config.start}: stands on {was.name} in {was.dtype}, and model.name={config.model.name} in"
            f" {config.model.dtype}; set the same model"
        )
    saved = {
        "lora": None if whole else LoraConfig(**meta["lora"]),
        "depth": meta["depth"],
        "pooling": pooling_of(meta),
    }
    for name, value in saved.items():
        if getattr(config, name) != value:
            raise ConfigError(f"start={config.start}: was trained with {name}={value!r}; set {name} to the same")
    if not whole:
        return load_role(folder, load_backbone(model, to_read=True), "reward")
    backbone = load_backbone(model.model_copy(update={"name": str(folder)}), to_read=True)
    return build_role(backbone, "reward", None, seed=config.seed, head=load_head(folder, backbone), depth=config.depth)


def build_engine(
    kind: Literal["native", "huggingface"], role: Role, template: ChatTemplate, max_batch: int, *, spare: bool = False
) -> Engine:
    """A sampler of this role's answers; `spare`: memory rather than time."""
    active = role.speaking if spare else role.sampling
    stops = {"stop_tokens": template.stop_tokens, "pad_token": template.pad_token, "active": active}
    match kind:
        case "native":
            from dressage.rollout.native import NativeEngine

            return NativeEngine(role.backbone.model, max_batch=max_batch, **stops)  # type: ignore[arg-type]
        case "huggingface":
            from dressage.rollout.huggingface import HuggingFaceEngine

            return HuggingFaceEngine(role.backbone.model, max_batch=max_batch, **stops)  # type: ignore[arg-type]


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Steps of an offline stage."""
    return config.steps or config.epochs * steps_per_epoch(rows, config.batch_size)


def build_learner(
    row: Algorithm,
    policy: Role,
    config: SftConfig | RewardConfig | DpoConfig | PpoConfig,
    updates: int,
    *,
    value: Role | None = None,
    reference: Role | None = None,
    others: Iterable[Role] = (),
) -> Learner:
    """Who learns, with an optimizer over what each role learns; `updates` optimizer steps in all.

    `others` are in memory too, and count where training.memory_gb is set; ConfigError if that is too little.
    """
    groups: dict[str, Mapping[str, Any]] = {"policy": policy.parameters()}
    if value is not None:
        groups["value"] = value.parameters()
    optimizer: OptimizerConfig = config.optimizer
    critic = config.value if isinstance(config, PpoConfig) else None
    rounds = max(1, (config.training.steps or 1)) if critic else 1
    warmup = 0 if critic is None else critic.warmup_steps * math.ceil(updates / rounds)

    def rates(update: int) -> dict[str, float]:
        own = learning_rate(optimizer, update, updates)
        if critic is None or value is None:
            return {"policy": own}
        critics = learning_rate(optimizer, update, updates, critic.learning_rate)
        return {"value": critics} if update < warmup else {"policy": own, "value": critics}

    return Learner(
        algorithm=row,
        policy=policy,
        value=value,
        reference=reference,
        optimizer=Optimizer(groups, optimizer),
        rates=rates,
        micro_batch_tokens=_within_memory(config, policy, value, others),
        temperature=config.rollout.temperature if isinstance(config, PpoConfig) else 1.0,
        max_length=config.rollout.max_new_tokens if isinstance(config, PpoConfig) else 1,
    )


def check_memory(config: SftConfig | RewardConfig | DpoConfig | PpoConfig) -> None:
    """ConfigError where training.memory_gb has no room even for what learns alone, before anything is loaded."""
    if config.training.memory_gb is not None:
        learner = Reader(shape_of(config.model), config.lora, getattr(config, "depth", None))
        within(config.training, learner.shape, frozen_weights(learner.shape, 1, (), [learner]), [learner])


def _within_memory(
    config: SftConfig | RewardConfig | DpoConfig | PpoConfig, policy: Role, value: Role | None, others: Iterable[Role]
) -> int:
    """Tokens of a micro-batch."""
    if config.training.memory_gb is None:
        return config.training.micro_batch_tokens
    models = [config.model]
    if isinstance(config, PpoConfig) and value is not None:
        models.append(config.value.model or config.model)
    roles = [policy, *([value] if value else [])]
    learners = [
        Reader(shape_of(model), role.backbone.configs[role.adapter][0] if role.adapter else None, role.depth)
        for model, role in zip(models, roles, strict=True)
    ]
    loaded = {id(role.backbone): role.backbone.model for role in (*roles, *others)}
    weights = sum(parameter.numel() for model in loaded.values() for parameter in model.parameters())
    learning = sum(parameter.numel() for role in roles for parameter in role.parameters().values())
    return within(config.training, learners[0].shape, weights - learning, learners).micro_batch_tokens


def build_preference_algorithm(config: DpoConfig) -> Algorithm:
    """The row of the catalog with this run's settings."""
    return preference_algorithm(config.algorithm).with_settings(config.settings)


def build_value(
    row: Algorithm, config: PpoConfig, backbone: Backbone, learned: Mapping[str, Role], own: ChatTemplate
) -> tuple[Role, ModelConfig] | None:
    """The critic as a role of its own, and the model it stands on. None: a head on the policy's trunk, or nothing.

    `learned` are the reward models by their folders: the critic may begin as the first.
    """
    value = config.value
    if "value" not in row.roles or value.start == "zero":
        return None
    if value.start == "reward":
        folder, reward_model = next((Path(name), role) for name, role in learned.items())
        return _value_of_reward(folder, config, backbone, reward_model, own)
    model = config.model
    if value.model is not None:
        model = _learning(value.model, value.lora, "value.")
        if not _same_words(model, own):
            raise ConfigError(
                f"value.model.name={model.name} has another tokenizer than model.name={config.model.name}: the critic"
                " reads the policy's own tokens; take a model of the same family"
            )
        backbone = load_backbone(model)
    head = ScalarHead(backbone.width)
    return build_role(backbone, "value", value.lora, seed=config.seed, head=head), model


def _value_of_reward(
    folder: Path, config: PpoConfig, backbone: Backbone, reward_model: Role, own: ChatTemplate
) -> tuple[Role, ModelConfig]:
    model = saved_model(folder)
    if reward_model.backbone is backbone:
        model = config.model
    elif reads_both_ways(model_shape(model)) or not _same_words(model, own):
        raise ConfigError(
            f'value.start="reward": {folder} is an encoder, or has another tokenizer than'
            f' model.name={config.model.name}; set value.start="zero" or "base"'
        )
    backbone, head = reward_model.backbone, load_head(folder, reward_model.backbone)
    assert head is not None
    head.requires_grad_(True)
    if reward_model.adapter is None:
        # The reward model itself must stay as it is.
        backbone = load_backbone(_learning(model, None))
        return build_role(backbone, "value", None, seed=config.seed, head=head, depth=reward_model.depth), model
    lora = backbone.configs[reward_model.adapter][0]
    role = build_role(backbone, "value", lora, seed=config.seed, head=head, depth=reward_model.depth)
    state = {key: p.detach() for key, p in backbone.adapter_state(reward_model.adapter).items()}
    backbone.load_adapter_state("value", state, str(folder))
    return role, model


def _same_words(model: ModelConfig, own: ChatTemplate) -> bool:
    return bool(load_tokenizer(model).get_vocab() == own.tokenizer.get_vocab())


@dataclass(frozen=True)
class Speaker:
    """A model that can be talked to."""

    config: ModelConfig
    template: ChatTemplate
    backbone: Backbone
    engine: NativeEngine


def build_speaker(model: str) -> Speaker:
    """A folder with a model or an adapter, a hub name, or "packaged"."""
    quiet_transformers()
    # A role was trained with a template and a system turn: it is asked in the same way.
    known = (Path(model) / ROLE_FILE).is_file()
    config = written_model(Path(model)).model_copy(update={"name": model}) if known else ModelConfig(name=model)
    template = build_template(config)
    backbone = load_backbone(config)
    engine = NativeEngine(backbone.model, stop_tokens=template.stop_tokens, pad_token=template.pad_token)
    return Speaker(config, template, backbone, engine)


def build_reference(config: PpoConfig, backbone: Backbone) -> Role:
    """The model the policy must stay near: adapters off, or a frozen copy where all weights learn."""
    return Role(backbone) if config.lora is not None else Role(load_backbone(learning_model(config)))


def open_monitor(folder: Path, kind: str, steps: int, console: Console | None) -> Callable[[int, float], Monitor]:
    """Opens a stage's log at the step it begins or goes on from."""

    def opened(start: int, before: float) -> Monitor:
        return Monitor(folder, stage=kind, total_steps=steps, console=console, start_step=start, seconds_before=before)

    return opened
