"""Recipes to settings: YAML, `extends` and overrides in, values out; nothing is repaired silently."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from dressage.config import STAGE_KINDS, PipelineConfig, Settings
from dressage.errors import ConfigError

AnySettings = TypeVar("AnySettings", bound=Settings)


def parse(kind: type[AnySettings], raw: Mapping[str, Any], where: str) -> AnySettings:
    """Settings of this kind, or a ConfigError that names the place, the fault and the nearest known key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(kind, item, where) for item in error.errors()[:3]]
        raise ConfigError("\n".join(lines)) from error


def _explain(kind: type[Settings], item: Any, where: str) -> str:
    inside, names = _walk(kind, item["loc"][:-1] if item["type"] == "extra_forbidden" else item["loc"])
    place = ".".join(names)
    if item["type"] == "extra_forbidden":
        place = ".".join([*names, str(item["loc"][-1])])
        known = sorted(inside.model_fields) if isinstance(inside, type) and issubclass(inside, Settings) else []
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: {place}: unknown setting; {advice}"
    if item["type"] == "missing":
        return f"{where}: {place}: must be set"
    if item["type"].startswith("union_tag"):
        kinds, tag = item["ctx"].get("expected_tags") or _tags(inside), item["ctx"].get("tag")
        fault = "must be set: one" if tag is None else f"{tag!r} is none"
        return f"{where}: {place}.type: {fault} of {kinds.replace(chr(39), '')}"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{where}: {place}: {message}{got}" if place else f"{where}: {message}{got}"


def _walk(kind: type[Settings], path: Sequence[Any]) -> tuple[Any, list[str]]:
    """The type found along an error's path, and the path as a recipe writes it: without the kinds of tagged unions."""
    inside: Any = kind
    names: list[str] = []
    for part in map(str, path):
        options = _members(inside)
        tagged = [option for option in options if _tags(option) == part]
        if tagged and len(options) > 1:
            inside = tagged[0]
            continue
        names.append(part)
        field = options[0].model_fields.get(part) if len(options) == 1 else None
        of_field = None if field is None else field.annotation
        inside = get_args(inside)[1] if get_origin(inside) is Mapping else of_field
    return _members(inside)[0] if len(_members(inside)) == 1 else inside, names


def _members(inside: Any) -> list[type[Settings]]:
    """The settings that a type stands for: one, none, or each of a union."""
    if isinstance(inside, type) and issubclass(inside, Settings):
        return [inside]
    if get_origin(inside) is Mapping:
        return []
    return [found for one in get_args(inside) for found in _members(one)]


def _tags(inside: Any) -> str:
    """By which the members of a tagged union are told apart."""
    fields = [member.model_fields.get("type") for member in _members(inside)]
    return ", ".join(str(tag) for field in fields if field for tag in get_args(field.annotation))


def recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(files("dressage") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_yaml(name: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe by shipped name or by path, with what it `extends` underneath it."""
    known = recipes()
    path = known.get(name, Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{name}: no such recipe or file; "
            + (f"did you mean {near[0]}?" if near else "see `dressage recipes` for the shipped ones")
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of settings, this is {type(raw).__name__}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself")
    beside = path.parent / str(base)
    return merge(read_yaml(str(beside) if beside.is_file() else str(base), (*above, path.resolve())), raw)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section; lists and values are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def override(raw: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Settings with "a.b=c" laid over them; c is read as YAML."""
    result = dict(raw)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment}: an override is written section.setting=value")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{assignment}: the value is not valid YAML") from error
        if isinstance(value, str):
            value = _number(value)
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _number(text: str) -> Any:
    """1e-4 is a number to people, if not to YAML 1.1."""
    try:
        return float(text)
    except ValueError:
        return text


def load_stage(kind: str, recipe: str | None, assignments: Sequence[str] = ()) -> Settings:
    """One stage's settings from a recipe and overrides."""
    raw = override(read_yaml(recipe) if recipe else {}, assignments)
    if "stages" in raw:
        raise ConfigError(f"{recipe}: is a pipeline of stages; use `dressage run {recipe}`")
    if raw.setdefault("kind", kind) != kind:
        raise ConfigError(f"{recipe}: is a {raw['kind']} recipe; use `dressage {raw['kind']}` or `dressage run`")
    return parse(STAGE_KINDS[kind], raw, recipe or "command line")


def load_pipeline(recipe: str, assignments: Sequence[str] = ()) -> tuple[PipelineConfig, dict[str, Settings]]:
    """A pipeline and the settings of its stages, "stage:" names turned into paths under its folder."""
    raw = override(read_yaml(recipe), assignments)
    if "stages" not in raw:
        raise ConfigError(f"{recipe}: has no stages; to run one stage use `dressage {raw.get('kind', 'sft')} {recipe}`")
    config = parse(PipelineConfig, raw, recipe)
    stages: dict[str, Settings] = {}
    for name, settings in config.stages.items():
        if settings is None:
            continue
        where = f"{recipe}: stages.{name}"
        kind = settings.get("kind", name)
        if kind not in STAGE_KINDS:
            raise ConfigError(f"{where}.kind: {kind!r} is none of {', '.join(STAGE_KINDS)}")
        model = config.model.model_dump(exclude_unset=True)
        defaults = {"kind": kind, "seed": config.seed} | ({"model": model} if kind != "rank" else {})
        located = _locate(merge(defaults, settings), Path(config.folder), list(stages), where)
        stages[name] = parse(STAGE_KINDS[kind], located, where)
    return config, stages


def _locate(value: Any, folder: Path, earlier: Sequence[str], where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _locate(item, folder, earlier, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_locate(item, folder, earlier, where) for item in value]
    if isinstance(value, str) and value.startswith("stage:"):
        name, _, rest = value.removeprefix("stage:").partition("/")
        if name not in earlier:
            raise ConfigError(f"{where}: {value} names no earlier stage; there are {', '.join(earlier) or 'none'}")
        return str(folder / name / rest)
    return value
