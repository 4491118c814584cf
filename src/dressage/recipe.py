"""Recipes to settings: YAML, `extends` and overrides in, values out; nothing is repaired silently."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from dressage.config import STAGE_KINDS, PipelineConfig
from dressage.errors import ConfigError
from dressage.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)

LINES = 2
"""Faults that are told at once."""
SCALARS = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}
"""Members of a union of plain values, as pydantic names them in the place of an error."""
SAID = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of settings",
    "model_attributes_type": "must be a section of settings",
    "mapping_type": "must be a section of settings",
    "dict_type": "must be a section of settings",
    "tuple_type": "must be a list, as [{input}]",
    "list_type": "must be a list, as [{input}]",
    "too_short": "must have at least {min_length}",
    "invalid_key": "names of settings are texts",
}
"""What pydantic finds, in the words of a recipe."""


def parse(kind: type[AnySettings], raw: Mapping[str, Any], where: str) -> AnySettings:
    """Settings of this kind, or a ConfigError that names the place, the fault and the nearest known key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(kind, item, where) for item in _joined(error.errors())[:LINES]]
        raise ConfigError("\n".join(lines)) from error


def _joined(errors: Sequence[Any]) -> list[Any]:
    """One fault for a value that is none of a union's, and where it stands without what pydantic adds."""
    found: dict[tuple[Any, ...], Any] = {}
    for item in errors:
        loc = tuple(part for part in item["loc"] if part != "[key]")
        if loc and loc[-1] in SCALARS and item["type"].split("_")[0] in ("string", *SCALARS):
            one = found.setdefault(loc[:-1], {**item, "loc": loc[:-1], "type": "union", "of": []})
            one["of"].append(SCALARS[loc[-1]])
        else:
            found.setdefault(loc, {**item, "loc": loc})
    return list(found.values())


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
    if item["type"] == "union":
        message = f"must be {' or '.join(item['of'])}"
    elif item["type"] in SAID:
        message = SAID[item["type"]].format(input=_short(item["input"]), **item.get("ctx", {}))
    got = "" if item["type"] == "value_error" else f" (got {_short(repr(item['input']))})"
    return f"{where}: {place}: {message}{got}" if place else f"{where}: {message}{got}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    if not is_file(path):
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{_short(name)}: no such recipe or file; "
            + (f"did you mean {near[0]}?" if near else "see `dressage recipes` for the shipped ones")
        )
    try:
        raw = _load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({_why(error)})") from error
    if not isinstance(raw, dict):
        found = {list: "a list", str: "a text", type(None): "empty"}.get(type(raw), f"the value {_short(raw)}")
        raise ConfigError(f"{path}: a recipe is a mapping of settings, this is {found}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends takes one recipe's name or file (got {_short(base)})")
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself")
    beside = path.parent / base
    return merge(read_yaml(str(beside) if is_file(beside) else base, (*above, path.resolve())), raw)


MOST_VALUES = 10_000
"""In a recipe, with what its aliases stand for: a few lines of them can stand for more than any memory holds."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which makes no objects, without what would hide a slip or swell."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.values = 0
        self.sizes: dict[int, int] = {}
        """Values in each node that is whole."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Counts what aliases stand for; refuses one that stands for what it is in."""
        alias, where, before = self.check_event(yaml.AliasEvent), self.peek_event().start_mark, self.values  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if alias and id(node) not in self.sizes:
            raise yaml.composer.ComposerError(None, None, "an alias that stands for what it is in", where)
        self.values += self.sizes[id(node)] if alias else 1
        self.sizes[id(node)] = self.values - before
        if self.values > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES:,} values, with its aliases", where)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses a key that stands there twice: the first would be lost without a word."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _why(error: Exception) -> str:
    """What a YAML reader says, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start + 1}"
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def is_file(path: Path) -> bool:
    """Is there such a file? A name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


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
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{_short(assignment)}: an override is written section.setting=value")
        try:
            value: Any = _load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{_short(assignment)}: the value is not valid YAML ({_why(error)})") from error
        if isinstance(value, str):
            value = _number(value)
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _number(text: str) -> Any:
    """1e-4 is a number to people, if not to YAML 1.1."""
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else text


def load_stage(kind: str, recipe: str | None, assignments: Sequence[str] = ()) -> Settings:
    """One stage's settings from a recipe and overrides."""
    raw = override(read_yaml(recipe) if recipe else {}, assignments)
    if "stages" in raw:
        raise ConfigError(f"{recipe}: is a pipeline of stages; use `dressage run {recipe}`")
    if raw.setdefault("kind", kind) != kind:
        other = kind_of(raw["kind"], recipe or "command line")
        raise ConfigError(f"{recipe or 'command line'}: is a {other} recipe; use `dressage {other}`")
    return parse(STAGE_KINDS[kind], raw, recipe or "command line")


def kind_of(kind: Any, where: str) -> str:
    """The kind of a stage; ConfigError if there is none such."""
    if not isinstance(kind, str) or kind not in STAGE_KINDS:
        raise ConfigError(f"{where}: kind: {_short(repr(kind))} is none of {', '.join(STAGE_KINDS)}")
    return kind


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
        kind = kind_of(settings.get("kind", name), where)
        model = config.model.model_dump(exclude_unset=True)
        defaults = {"kind": kind, "seed": config.seed} | ({"model": model} if kind != "rank" else {})
        located = _locate(merge(defaults, settings), Path(config.folder), list(stages), where)
        stages[name] = parse(STAGE_KINDS[kind], located, where)
    if not stages:
        raise ConfigError(f"{recipe}: stages: there is none; give at least one")
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
        if ".." in Path(rest).parts or Path(rest).is_absolute():
            raise ConfigError(f"{where}: {value} leads out of the stage's folder; name a file in it")
        return str(folder / name / rest)
    return value
