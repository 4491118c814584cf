"""What the reference says of a data set's answers: asked once, before anything is learnt, and kept with the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dressage.algorithms.preference import summed_over_answers
from dressage.batches import PerSequence
from dressage.data.order import length_sorted_chunks
from dressage.data.prepare import EncodedRanking, EncodedRating
from dressage.data.template import Encoded
from dressage.errors import CheckpointError
from dressage.models.files import load_tensors, save_tensors
from dressage.models.roles import Role
from dressage.models.scoring import score_tokens
from dressage.tensors import pad_right
from dressage.training.batch_sources import SCORING_TOKENS

Row = TypeVar("Row", EncodedRanking, EncodedRating)
Progress = Callable[[int], object]
"""Told how many answers were read since it was last told."""


def with_reference(rows: Sequence[Row], reference: Role, folder: Path, progress: Progress) -> list[Row]:
    """Rows with the reference's log-probability of each of their answers.

    They are kept under `folder`, so that a run that goes on learns from the very same numbers.
    """
    answers = [answer for row in rows for answer in row.answers]
    path = folder / "checkpoints" / "reference.safetensors"
    logprobs = _kept(path, answers)
    if logprobs is None:
        logprobs = score_answers(reference, answers, progress)
        _keep(path, answers, logprobs)
    said = iter(logprobs.tolist())
    return [replace(row, ref_answer_logprobs=tuple(next(said) for _ in row.answers)) for row in rows]


@torch.no_grad()
def score_answers(role: Role, answers: Sequence[Encoded], progress: Progress = lambda read: None) -> PerSequence:
    """Log-probability [N] of each whole answer; how they are batched changes nothing."""
    found, device = torch.zeros(len(answers)), role.backbone.device
    for chunk in length_sorted_chunks([len(answer.tokens) for answer in answers], SCORING_TOKENS):
        tokens = pad_right([answers[i].tokens for i in chunk], 0).to(device)
        real = pad_right([[True] * len(answers[i].tokens) for i in chunk], False).to(device)
        wanted = pad_right([answers[i].loss_mask for i in chunk], False).to(device)
        found[chunk] = summed_over_answers(score_tokens(role, tokens, real, wanted).logprobs, wanted).cpu()
        progress(len(chunk))
    return found


def _kept(path: Path, answers: Sequence[Encoded]) -> PerSequence | None:
    """What was kept, if it is of these answers and whole."""
    try:
        kept = load_tensors(path)
    except CheckpointError:
        return None
    whole = kept.keys() == {"logprobs", "digest"} and torch.equal(kept["digest"], _digest(answers, kept["logprobs"]))
    return kept["logprobs"] if whole else None


def _keep(path: Path, answers: Sequence[Encoded], logprobs: PerSequence) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"logprobs": logprobs, "digest": _digest(answers, logprobs)}, partial)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written ({error.strerror or error})") from error


def _digest(answers: Sequence[Encoded], logprobs: PerSequence) -> Tensor:
    """SHA-256 of the answers and what is said of them, as a tensor of bytes."""
    digest = hashlib.sha256(logprobs.numpy().tobytes())
    for answer in answers:
        digest.update(repr((answer.tokens, answer.loss_mask)).encode())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
