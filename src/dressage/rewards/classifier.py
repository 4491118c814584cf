"""Rewards by a text classifier of transformers: how sure it is of one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from dressage.errors import ModelError
from dressage.models.pretrained import DAMAGED, best_device, lineage, require_whole
from dressage.schema import Rollout


@dataclass(frozen=True)
class ClassifierReward:
    """Grades by the log-odds or probability of class `label`; a model of one output is read as the odds of it."""

    model: Any
    tokenizer: Any
    label: int
    pair: bool
    """Reads the prompt's last turn before the answer."""
    probability: bool
    max_tokens: int

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> list[object]:
        """One answer at a time: then nothing is padded, and no model can take an end mark for padding."""
        return [self._grade(*((one.prompt.text, one.text) if self.pair else (one.text,))) for one in rollouts]

    def _grade(self, *texts: str) -> float:
        row = self.tokenizer(*texts, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        if row["input_ids"].shape[1] == 0:
            return float("nan")  # an empty answer, and a tokenizer that adds nothing to it
        odds = log_odds(self.model(**row.to(self.model.device)).logits[0].double(), self.label)
        return float(odds.sigmoid() if self.probability else odds)


def log_odds(logits: Tensor, label: int) -> Tensor:
    """log(p / (1 - p)) of one class under softmax [C]; of a single output, the output."""
    if len(logits) == 1:
        return logits[0]
    others = torch.cat((logits[:label], logits[label + 1 :]))
    return logits[label] - others.logsumexp(0)


def load_classifier(
    name: str, label: str | int, reads: Literal["answer", "both"], *, probability: bool, max_tokens: int
) -> ClassifierReward:
    """A sequence classification model, safetensors only; ModelError if there is none or it lacks the class."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    lineage(name)
    try:
        config = AutoConfig.from_pretrained(name)
        number = class_of(label, config.id2label, name)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        loaded: tuple[Any, dict[str, Any]] = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (*DAMAGED, SafetensorError) as error:
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"{name}: no classifier could be loaded: {said}. Only safetensors are read") from error
    # A head that is not in the file would be drawn by lot, and grade like it.
    model = require_whole(name, *loaded)
    model.requires_grad_(False)
    return ClassifierReward(model.to(best_device()).eval(), tokenizer, number, reads == "both", probability, max_tokens)


def class_of(label: str | int, classes: dict[int, str], name: str) -> int:
    """The number of a class given by name or number."""
    if isinstance(label, int) and label in classes:
        return label
    found = [number for number, known in classes.items() if known == label]
    if len(found) != 1:
        known = ", ".join(f"{number} ({name})" for number, name in sorted(classes.items()))
        raise ModelError(f"{name}: has no class {label!r}; its classes are {known}")
    return found[0]
