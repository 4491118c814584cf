"""Checks of who reads and writes: the same text has one log-probability and one score, whoever asks and however."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dressage import assemble
from dressage.data.collate import collate_demonstrations, collate_rankings
from dressage.data.prepare import EncodedRanking
from dressage.data.template import Encoded
from dressage.doctor.check import Check, Finding, at_most, does_not_apply, found
from dressage.doctor.subject import Subject, unchanged, without_head
from dressage.experience.build import tensors_of
from dressage.models.files import HEAD, Normalisation, load_head, load_role, save_role, save_tensors, saved_model
from dressage.models.scoring import score_tokens
from dressage.rewards.learned import score_rows
from dressage.rollout.engine import evaluating
from dressage.tensors import pad_right
from dressage.training.batch_sources import logprobs_of
from dressage.training.reference import score_answers

SCORE_LIMIT = 1e-6
"""By how much a score may change on the way to disk and back, for each unit of its size."""
OTHER_TEMPERATURE = 0.7
FEW_TOKENS = 4


def padding_changes_nothing(subject: Subject) -> Finding:
    """9: padded on the left or on the right, a text has the log-probabilities and the score it has alone."""
    worst = 0.0
    for tokens, mask, wanted in _padded(subject.rows, subject.template.pad_token):
        logprobs = subject.logprobs(subject.policy, tokens, mask, wanted)
        for i, row in enumerate(subject.rows):
            own = torch.tensor(row.loss_mask)
            worst = _worst(worst, logprobs[i][wanted[i]] - subject.alone[i][own])
    for tokens, mask, _ in _padded(subject.judged, subject.judged_padding):
        columns = torch.arange(tokens.shape[1]).expand_as(tokens)
        last = columns.masked_fill(~mask, -1).amax(-1)
        worst = _worst(worst, subject.scores(tokens, mask, last) - subject.scores_alone)
    return at_most(worst, subject.tolerance, "padded left, padded right and alone")


def batch_size_changes_nothing(subject: Subject) -> Finding:
    """10: together or one by one, texts have the same log-probabilities and scores, and prompts the same answers."""
    answers = score_answers(without_head(subject.policy), subject.rows)
    lengths = torch.tensor([sum(row.loss_mask) for row in subject.rows])
    alone = torch.stack([logprobs.sum() for logprobs in subject.alone])
    worst = _worst(0.0, (answers - alone) / lengths)
    worst = _worst(worst, score_rows(subject.judge, [row.tokens for row in subject.judged]) - subject.scores_alone)
    one_by_one = subject.sample(subject.ppo.rollout.temperature, tokens=FEW_TOKENS, max_batch=1)
    pairs = zip(subject.rollouts, one_by_one, strict=True)
    same = sum(one.completion.tokens[:FEW_TOKENS] == other.completion.tokens for one, other in pairs)
    told = at_most(worst, subject.tolerance, "together and one by one")
    # In bfloat16 rounding may tip the scales between two tokens; huggingface seeds a batch, not an answer.
    drawn_alike = subject.tolerance < 1e-2 and subject.ppo.rollout.engine == "native"
    evidence = f"{told.evidence}; {same} of {len(one_by_one)} answers are the same"
    if told.level == "ok" and same < len(one_by_one) and drawn_alike:
        return Finding("fault", evidence)
    return replace(told, evidence=evidence)


def training_reads_as_scoring_does(subject: Subject) -> Finding:
    """11: a text has the same log-probabilities while learning as without: no dropout is left on."""
    backbone = subject.backbone
    tokens, mask, wanted = _padded(subject.rows, subject.template.pad_token)[0]
    still = subject.logprobs(subject.policy, tokens, mask, wanted)
    with torch.no_grad(), torch.random.fork_rng(), backbone.dropout():
        batch = [field.to(backbone.device) for field in (tokens, mask, wanted)]
        learning = score_tokens(subject.policy, *batch).logprobs.float().cpu()
    worst = _worst(0.0, learning - still)
    if worst and subject.lora.dropout:
        return found(False, f"log-probabilities move by {worst:.1e}: lora.dropout={subject.lora.dropout}", "warn")
    return found(worst == 0, f"log-probabilities move by {worst:.1e} while learning")


def engine_and_trainer_agree(subject: Subject) -> Finding:
    """12: the trainer recomputes what the sampler said of its own tokens."""
    samples = subject.samples
    own = logprobs_of(subject.policy, samples, subject.ppo.rollout.temperature)
    worst = _worst(0.0, (own - samples.engine_logprobs)[samples.response_mask])
    return at_most(worst, subject.tolerance, "engine and trainer")


def one_temperature(subject: Subject) -> Finding:
    """13: at a temperature that is not 1, sampler, scoring and learner all divide by it."""
    asked = subject.ppo.rollout.temperature
    asked = OTHER_TEMPERATURE if asked == 1 else asked
    samples = tensors_of(subject.sample(asked, tokens=FEW_TOKENS), subject.template.pad_token)
    answer = samples.response_mask
    own, at_one = (logprobs_of(subject.policy, samples, temperature)[answer] for temperature in (asked, 1.0))
    worst = _worst(0.0, own - samples.engine_logprobs[answer])
    other = _worst(0.0, at_one - samples.engine_logprobs[answer])
    config = subject.ppo.model_copy(
        update={"rollout": subject.ppo.rollout.model_copy(update={"temperature": asked}), "lora": subject.lora}
    )
    learner = assemble.build_learner(subject.row, subject.policy, config, 1).temperature
    evidence = (
        f"sampled at {asked:g}, learnt at {learner:g}: log-probabilities differ by {worst:.1e} (by {other:.1e} at 1)"
    )
    return found(worst <= subject.tolerance < other and learner == asked, evidence)


def whole_distribution(subject: Subject) -> Finding:
    """14: what is trained is what is sampled: no top-k, no top-p."""
    if subject.online is None:
        return does_not_apply("nothing learns from its own answers")
    rollout = subject.online.rollout
    evidence = f"top_p={rollout.top_p:g}, top_k={rollout.top_k}"
    return found(rollout.top_p == 1 and rollout.top_k == 0, evidence, "warn")


def adapter_speaks(subject: Subject) -> Finding:
    """17: off, an adapter leaves the base as it was, to the bit; on, it says something else once trained."""
    tokens, mask, wanted = _padded(subject.rows, subject.template.pad_token)[0]
    said = [subject.logprobs(role, tokens, mask, wanted) for role in (subject.policy, subject.reference)]
    on = _worst(0.0, said[0] - said[1])
    with unchanged(subject.policy), torch.no_grad():
        for parameter in without_head(subject.policy).parameters().values():
            parameter.zero_()
        zeroed = _worst(0.0, subject.logprobs(subject.policy, tokens, mask, wanted) - said[1])
    evidence = f"on, log-probabilities move by {on:.1e}; with weights of 0 by {zeroed:.1e}"
    if subject.below is None:
        return found(on > 0 and zeroed == 0, evidence)
    own = _worst(0.0, subject.logprobs(subject.below[0], tokens, mask, wanted) - subject.logprobs(
        subject.below[1], tokens, mask, wanted))  # fmt: skip
    return found(on > 0 and zeroed == 0 and own > 0, f"{evidence}; {subject.model.name} moves its base by {own:.1e}")


def reference_is_where_it_began(subject: Subject) -> Finding:
    """18: a policy that goes on from an adapter is held to that adapter's model, not to the base below it."""
    if subject.below is None:
        return does_not_apply("the policy begins at the base itself")
    tokens, mask, wanted = _padded(subject.rows, subject.template.pad_token)[0]
    reference, start, base = (
        subject.logprobs(role, tokens, mask, wanted) for role in (subject.reference, *subject.below)
    )
    near, far = (float((reference - other)[wanted].abs().mean()) for other in (start, base))
    # Merging rounds: in bfloat16 the reference may be a little off, but not on the way to the base.
    well = near <= subject.tolerance and far > 0 and near < 0.25 * far
    return found(well, f"the reference is {near:.1e} nats a token from the start, {far:.1e} from the base below")


def head_survives(subject: Subject) -> Finding:
    """19: a reward model that was saved and loaded gives the same scores."""
    judge, folder = subject.judge, subject.scratch / "reward"
    before = score_rows(judge, [row.tokens for row in subject.judged])
    if judge.adapter is None:
        # Whole weights are not written for a look: the head alone makes the trip.
        assert judge.head is not None
        folder.mkdir(exist_ok=True)
        save_tensors(judge.head.state_dict(), folder / HEAD)
        again = replace(judge, head=load_head(folder, judge.backbone))
        after = score_rows(again, [row.tokens for row in subject.judged])
    else:
        save_role(folder, judge, "reward", subject.model, normalisation=Normalisation())
        again = load_role(folder, judge.backbone, "doctor-again")
        after = score_rows(again, [row.tokens for row in subject.judged])
        judge.backbone.drop_adapter("doctor-again")
    limit = SCORE_LIMIT * max(1.0, float(before.abs().amax()))
    return at_most(_worst(0.0, after - before), limit, "scores before saving and after loading")


def head_is_scalar(subject: Subject) -> Finding:
    """20: a reward model gives each answer one finite number, and not all the same."""
    scores, judge = subject.scores_alone, subject.judge
    if judge.head is None or scores.shape != (len(subject.judged),) or not scores.isfinite().all():
        return Finding("fault", f"{len(subject.judged)} answers have scores of shape {tuple(scores.shape)}: {scores}")
    spread = float(scores.std())
    return found(spread > 0, f"{len(scores)} answers, one number each, deviation {spread:.2g}", "warn")


def tokenizers_are_declared(subject: Subject) -> Finding:
    """21: a reward model that writes conversations otherwise than the policy reads answers written anew."""
    if subject.reward_folder is None:
        return does_not_apply("there is no reward model yet")
    own, judges = subject.template, assemble.build_template(saved_model(subject.reward_folder))
    differs = [
        what
        for what, same in {
            "tokenizer": own.tokenizer.get_vocab() == judges.tokenizer.get_vocab(),
            "template": own.source == judges.source,
            "system turn": own.system == judges.system,
            "thinking": own.thinking == judges.thinking,
        }.items()
        if not same
    ]
    anew = subject.learned.template is not None
    evidence = f"another {' and '.join(differs)}" if differs else "the same tokenizer, template and system turn"
    return found(not differs or anew, evidence + (", written anew" if anew else ", read as they are"))


def score_is_at_the_end(subject: Subject) -> Finding:
    """22: a padded answer's score is that of its own last token (or the mean of its own), read without any padding."""
    rows, judge = subject.judged, subject.judge
    assert judge.head is not None
    read = []
    with evaluating(judge.backbone.model):
        for row in rows:
            tokens = torch.tensor([row.tokens], device=judge.backbone.device)
            told = judge.head(judge.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool))[0])
            read.append((told.mean(0) if judge.pooling == "mean" else told[-1]).cpu())
    oracle = torch.stack(read)
    batch = collate_rankings([EncodedRanking(tuple(rows), tuple(range(len(rows))))], subject.judged_padding)
    worst = _worst(0.0, subject.scores(batch.tokens, batch.attention_mask, batch.last) - oracle)
    worst = _worst(worst, score_rows(judge, [row.tokens for row in rows]) - oracle)
    return at_most(worst, subject.tolerance, "scores in a padded batch and of the text alone")


def _padded(rows: list[Encoded], pad_token: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, attention mask and wanted tokens: as the collator pads, on the right, and by hand on the left."""
    batch = collate_demonstrations(rows, pad_token)
    backwards = [pad_right([row[::-1] for row in fields], value).flip(-1) for fields, value in (
        ([row.tokens for row in rows], int(pad_token)),
        ([(True,) * len(row.tokens) for row in rows], False),
        ([row.loss_mask for row in rows], False),
    )]  # fmt: skip
    return [(batch.tokens, batch.attention_mask, batch.loss_mask), (backwards[0], backwards[1], backwards[2])]


def _worst(before: float, difference: Tensor) -> float:
    """The largest so far; NaN stays NaN."""
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return largest if largest != largest else max(before, largest)


CHECKS = (
    Check(9, "padding changes nothing", padding_changes_nothing, "another model: this one does not read its mask"),
    Check(10, "batch size changes nothing", batch_size_changes_nothing, "rollout.max_batch, model.dtype=float32"),
    Check(11, "no dropout", training_reads_as_scoring_does, "lora.dropout=0"),
    Check(12, "engine and trainer agree", engine_and_trainer_agree, "rollout.engine=native, model.dtype=float32"),
    Check(13, "one temperature", one_temperature, "rollout.temperature=1"),
    Check(14, "the whole distribution", whole_distribution, "rollout.top_p=1, rollout.top_k=0", True),
    Check(17, "adapters switch", adapter_speaks, "model.name: the adapter's folder, whole"),
    Check(18, "the reference is the start", reference_is_where_it_began, "model.name: what the run begins from"),
    Check(19, "the reward head is saved", head_survives, "train the reward model again"),
    Check(20, "the reward is a number", head_is_scalar, "reward_model: another folder"),
    Check(
        21,
        "tokenizers are declared",
        tokenizers_are_declared,
        "model.system, model.chat_template: as in the reward model's run",
    ),
    Check(22, "the score is at the end", score_is_at_the_end, "models/scoring.py: read at the collator's index"),
)
