"""Which kinds of files are known, and by which columns: one table, `FORMATS`."""

from __future__ import annotations

from dataclasses import dataclass

from dressage.data.parsers import (
    SOLVERS,
    Demonstrations,
    Prompts,
    Rankings,
    Ratings,
    answered,
    ask,
    autoj_label,
    column,
    compared,
    completed,
    first_turn,
    graded_completions,
    judged,
    majority,
    message_tree,
    one,
    own_prompt,
    own_ranking,
    preferred,
    prompts_of,
    ranked,
    rated,
    seed_task_prompts,
    seed_tasks,
    shared_dialogue,
    solutions,
    split_apart,
    talk,
    talk_prompt,
    worth_imitating,
)


@dataclass(frozen=True)
class Format:
    """One kind of file: the columns that all its rows have, and what can be read from a row."""

    name: str
    columns: frozenset[str]
    prompts: Prompts
    demonstrations: Demonstrations | None = None
    rankings: Rankings | None = None
    own_ratings: Ratings | None = None

    @property
    def ratings(self) -> Ratings | None:
        """Answers judged one by one; rankings give theirs, split apart."""
        return self.own_ratings or (None if self.rankings is None else split_apart(self.rankings))


def _columns(*names: str) -> frozenset[str]:
    return frozenset(names)


_instruction = ask("instruction", "input")
_asked = ask("question")

FORMATS: tuple[Format, ...] = (
    # The first whose columns are all there is meant, so a format stands above those whose columns it contains.
    Format("Dressage rankings", _columns("prompt", "answers", "ranks"), one(own_prompt), rankings=own_ranking),
    Format("Dressage answers", _columns("prompt", "answers"), one(own_prompt)),
    Format(
        "HelpSteer2 preferences",
        _columns("prompt", "response_1", "response_2", "preference_strength"),
        one(column("prompt")),
        rankings=preferred(column("prompt"), "response_1", "response_2", "preference_strength"),
    ),
    Format(
        "HelpSteer3 preferences",
        _columns("context", "response1", "response2", "overall_preference"),
        one(column("context")),
        rankings=preferred(column("context"), "response1", "response2", "overall_preference"),
    ),
    Format(
        "UltraFeedback completions",
        _columns("instruction", "completions"),
        one(_instruction),
        rankings=graded_completions(_instruction),
    ),
    Format("OASST trees", _columns("message_tree_id", "prompt"), prompts_of(message_tree), rankings=message_tree),
    Format(
        "PandaLM judgements",
        _columns("instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"),
        one(_instruction),
        rankings=ranked(_instruction, "response1", "response2", majority),
    ),
    Format(
        "Auto-J judgements",
        _columns("prompt", "response 1", "response 2", "label"),
        one(column("prompt")),
        rankings=ranked(column("prompt"), "response 1", "response 2", autoj_label),
    ),
    Format("GSM8K solutions", _columns("question", *SOLVERS), one(_asked), rankings=solutions),
    Format(
        "persona statements",
        _columns("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        one(_asked),
        rankings=compared(_asked, "answer_matching_behavior", "answer_not_matching_behavior"),
    ),
    Format(
        "question, response_chosen, response_rejected",
        _columns("question", "response_chosen", "response_rejected"),
        one(_asked),
        rankings=compared(_asked, "response_chosen", "response_rejected"),
    ),
    Format(
        "question, response_j, response_k",
        _columns("question", "response_j", "response_k"),
        one(_asked),
        rankings=compared(_asked, "response_j", "response_k"),
    ),
    Format(
        "question, chosen, rejected",
        _columns("question", "chosen", "rejected"),
        one(_asked),
        rankings=compared(_asked, "chosen", "rejected"),
    ),
    Format(
        "instruction, chosen, rejected",
        _columns("instruction", "chosen", "rejected"),
        one(_instruction),
        rankings=compared(_instruction, "chosen", "rejected"),
    ),
    Format(
        "ShareGPT comparisons",
        _columns("conversations", "chosen", "rejected"),
        one(talk_prompt("conversations")),
        rankings=compared(talk_prompt("conversations"), "chosen", "rejected"),
    ),
    Format(
        "prompt, chosen, rejected",
        _columns("prompt", "chosen", "rejected"),
        one(column("prompt")),
        rankings=compared(column("prompt"), "chosen", "rejected"),
    ),
    Format("hh dialogues", _columns("chosen", "rejected"), prompts_of(shared_dialogue), rankings=shared_dialogue),
    Format(
        "prompt, completion, label",
        _columns("prompt", "completion", "label"),
        one(column("prompt")),
        demonstrations=worth_imitating,
        own_ratings=rated,
    ),
    Format(
        "prompt, completion",
        _columns("prompt", "completion"),
        one(column("prompt")),
        demonstrations=completed,
    ),
    Format(
        "self-instruct tasks",
        _columns("instruction", "instances"),
        seed_task_prompts,
        demonstrations=seed_tasks,
    ),
    # Held out by those who made them, or not all worth imitating: prompts only.
    Format("self-instruct predictions", _columns("prompt", "instruction", "response", "target"), one(_instruction)),
    Format("judge tasks", _columns("instruction", "response_source", "gpt4_score"), one(judged)),
    Format("labelled messages", _columns("messages", "label"), one(talk_prompt("messages"))),
    Format(
        "instruction, output",
        _columns("instruction", "output"),
        one(_instruction),
        demonstrations=answered(_instruction, "output"),
    ),
    Format(
        "prompt, response",
        _columns("prompt", "response"),
        one(column("prompt")),
        demonstrations=answered(column("prompt"), "response"),
    ),
    Format("messages", _columns("messages"), one(talk_prompt("messages")), demonstrations=talk("messages")),
    Format(
        "ShareGPT conversations",
        _columns("conversations"),
        one(talk_prompt("conversations")),
        demonstrations=talk("conversations"),
    ),
    Format(
        "body, question, answer",
        _columns("body", "question", "answer"),
        one(ask("body", "question")),
        demonstrations=answered(ask("body", "question"), "answer"),
    ),
    Format("question, answer", _columns("question", "answer"), one(_asked), demonstrations=answered(_asked, "answer")),
    Format("turns", _columns("turns"), one(first_turn)),
    Format("prompt", _columns("prompt"), one(column("prompt"))),
    Format("instruction", _columns("instruction"), one(_instruction)),
    Format("question", _columns("question"), one(_asked)),
    Format("text", _columns("text"), one(column("text"))),
)
