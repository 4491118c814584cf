"""Checks of what is learnt from: tokens, masks, ends and limits. No weights are needed."""

from __future__ import annotations

from collections import Counter

from dressage.data.collate import collate_demonstrations, collate_rankings
from dressage.data.prepare import EncodedRanking
from dressage.data.template import Encoded
from dressage.doctor.check import Check, Finding, does_not_apply, found
from dressage.doctor.subject import Subject, as_demonstration, prepared
from dressage.errors import DataError
from dressage.experience.build import tensors_of
from dressage.schema import Completion, Prompt, Rollout

SHOULD_STAY = 0.9
"""Share of records that is read without a warning."""


def end_has_a_label(subject: Subject) -> Finding:
    """1: the loss falls on the end mark of every answer that came to an end."""
    whole = [row for *_, ended, row in subject.spoken if ended]
    if not whole:
        return does_not_apply("every answer was cut")
    batch = collate_demonstrations(whole, subject.template.pad_token)
    labelled = sum(
        row.tokens[-1] in subject.template.stop_tokens and bool(batch.loss_mask[i, len(row.tokens) - 1])
        for i, row in enumerate(whole)
    )
    return found(labelled == len(whole), f"{labelled} of {len(whole)} answers end in a labelled {_mark(subject)}")


def padding_has_none(subject: Subject) -> Finding:
    """2: the loss falls on no padding."""
    rows = [row for *_, row in subject.spoken]
    # If all were of one length there would be no padding to look at.
    rows += [Encoded(rows[0].tokens[:-1], rows[0].loss_mask[:-1])]
    batch = collate_demonstrations(rows, subject.template.pad_token)
    ranked = collate_rankings([EncodedRanking(tuple(rows), (0,) * len(rows))], subject.template.pad_token)
    labelled = sum(
        int(mask[i, len(row.tokens) :].sum())
        for mask in (batch.loss_mask, ranked.response_mask, batch.attention_mask)
        for i, row in enumerate(rows)
    )
    padding = batch.tokens.numel() - sum(len(row.tokens) for row in rows)
    return found(labelled == 0, f"{labelled} of {padding} padded positions count")


def round_trip(subject: Subject) -> Finding:
    """3: answers are read back as they were written, and what is trained begins as what is sampled."""
    template, back, begun, close = subject.template, 0, 0, 0
    for prompt, answer, *_ in subject.spoken:
        asked = template.encode_prompt(prompt).tokens
        tokens = template.encode_demonstration(as_demonstration(prompt, answer)).tokens
        begun += tokens[: len(asked)] == asked
        read = template.decode(tokens[len(asked) :])
        back += read == answer
        close += read.split() == answer.split()
    total = len(subject.spoken)
    evidence = f"{back} of {total} answers come back as written; {begun} begin as they are sampled"
    # Some tokenizers lose white space for good: no word is lost by that.
    return found(back == begun == total, evidence, "warn" if close == begun == total else "fault")


def one_beginning(subject: Subject) -> Finding:
    """4: the mark of beginning stands once, if the tokenizer has one and is used to it."""
    tokenizer = subject.template.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return does_not_apply("the tokenizer has no mark of beginning")
    expected = tokenizer("").input_ids[:1] == [bos] or "bos_token" in subject.template.source
    leading: Counter[int] = Counter()
    for prompt, *_ in subject.spoken:
        tokens = subject.template.encode_prompt(prompt).tokens
        leading[next((i for i, token in enumerate(tokens) if token != bos), len(tokens))] += 1
    told = ", ".join(f"{count} prompts begin with {number}" for number, count in sorted(leading.items()))
    well = max(leading) <= 1 and (min(leading) == 1 or not expected)
    return found(well, f"{told} x {tokenizer.bos_token!r}")


def one_end(subject: Subject) -> Finding:
    """5: a finished answer has one end mark and a cut one none; nobody's words hold another."""
    template, wrong, written = subject.template, 0, 0
    for prompt, answer, *_ in subject.spoken:
        start = len(template.encode_prompt(prompt).tokens)
        for ended in (True, False):
            tokens = template.encode_answer(prompt, answer, ended).tokens[start:]
            wrong += sum(token in template.stop_tokens for token in tokens) != int(ended)
        written += any(name in answer for name in template.tokenizer.all_special_tokens)
    evidence = f"{wrong} of {2 * len(subject.spoken)} answers have not the end marks they should"
    if written:
        # Spelled out, not a mark: but a model may learn to write it.
        evidence += f"; {written} have a special token's name among their words"
    return Finding("fault" if wrong else "warn" if written else "ok", evidence)


def masks_know_lengths(subject: Subject) -> Finding:
    """6: a token with the padding's id that stands inside a text counts like any other."""
    pad = subject.template.pad_token
    other = 0 if pad != 0 else 1
    short = Encoded((other, pad, other, pad), (False, False, True, True))
    long = Encoded((pad,) * 6, (False,) * 3 + (True,) * 3)
    batch = collate_demonstrations([short, long], pad)
    ranked = collate_rankings([EncodedRanking((short, long), (0, 1))], pad)
    rollouts = [
        Rollout(Prompt((), row.tokens[:2]), Completion(row.tokens[2:], (0.0,) * (len(row.tokens) - 2), "length"), "", 0)
        for row in (short, long)
    ]
    sampled = tensors_of(rollouts, pad)
    real = [[True] * 4 + [False] * 2, [True] * 6]
    answers = [[False, False, True, True, False, False], [False] * 3 + [True] * 3]
    wrong = 0
    for mask in (batch.attention_mask, ranked.attention_mask, sampled.attention_mask):
        wrong += int((mask != mask.new_tensor(real)).sum())
    wrong += int((batch.loss_mask != batch.loss_mask.new_tensor(answers)).sum())
    wrong += int((ranked.last != ranked.last.new_tensor([3, 5])).sum())
    return found(wrong == 0, f"{wrong} positions are masked by their token's id")


def truncation_is_counted(subject: Subject) -> Finding:
    """7: of every record it is known whether it was taken, cut, or left out, and why."""
    if not subject.texts:
        return does_not_apply("no data")
    lost = sum(text.read - len(text.rows) - len(text.left_out) for text in subject.texts)
    read = sum(text.read for text in subject.texts)
    left_out, cut = (
        sum((Counter(text.left_out) for text in subject.texts), Counter()),
        sum(t.cut for t in subject.texts),
    )
    reasons = "".join(f", {count} left out: {reason}" for reason, count in left_out.most_common())
    evidence = f"{read - left_out.total() - lost} of {read} records taken, {cut} of them cut{reasons}"
    if lost:
        return Finding("fault", f"{evidence}; {lost} gone without a reason")
    return found(left_out.total() + cut <= (1 - SHOULD_STAY) * read, evidence, "warn")


def nothing_is_cut_unasked(subject: Subject) -> Finding:
    """8: an answer that is too long is left out or an error, unless data.on_too_long=cut; a cut one has no end mark."""
    record = as_demonstration(*subject.spoken[0][:2])
    limit = len(subject.template.encode_demonstration(record).tokens) - 1
    data = subject.texts[0].data if subject.texts else subject.ppo.prompts
    made = {}
    for way in ("error", "drop", "cut"):
        try:
            asked = data.model_copy(update={"max_tokens": limit, "on_too_long": way})
            made[way] = prepared("demonstrations", [record], asked, subject.template).rows
        except DataError:
            made[way] = ()
    end = bool(made["cut"]) and made["cut"][0].tokens[-1] in subject.template.stop_tokens
    unasked = len(made["error"]) + len(made["drop"])
    cut = sum(text.cut for text in subject.texts)
    evidence = f"{unasked} answers cut unasked, {int(end)} cut ones with an end mark"
    if unasked or end:
        return Finding("fault", evidence)
    return found(not cut, evidence + (f"; data.on_too_long=cut cuts {cut}" if cut else ""), "warn")


def _mark(subject: Subject) -> str:
    return repr(subject.template.end_mark)


CHECKS = (
    Check(1, "the end mark has a label", end_has_a_label, "model.chat_template: answers end in the end mark", True),
    Check(2, "padding has no label", padding_has_none, "data/collate.py: masks by length", True),
    Check(3, "the template round trip", round_trip, "model.chat_template, or another tokenizer"),
    Check(4, "one mark of beginning", one_beginning, "take bos_token out of model.chat_template", True),
    Check(5, "one end mark", one_end, "take the end mark out of the data and of model.chat_template's answers", True),
    Check(6, "masks do not come from ids", masks_know_lengths, "data/collate.py: masks by length", True),
    Check(7, "what is too long is counted", truncation_is_counted, "raise data.max_tokens, or shorten the records"),
    Check(8, "no answer is cut unasked", nothing_is_cut_unasked, 'data.on_too_long="drop", or raise data.max_tokens'),
)
