"""Rewards: grade completions against reference answers. Imports neither torch nor the trainer.

    math_reward(completion, gold, problem)  one Grade (starts a shared worker if computer algebra is needed)
    answer_line_reward(completion, gold)    the paper's strict "Answer:" rule
    Verifier(workers, ...)                  many grades in worker processes, submitted during generation
    check_golds(golds)                      why a gold must not be used for training, or None
    shape_reward(grade, ...)                reward of a Grade

math/ has the comparison of answers, pool/ the worker processes. Grading policies: docs/verifier.md.
Command line: `python -m rewards.check FILE.jsonl`.
"""

import os
from functools import cache

from .math.answer_line import answer_line_reward
from .math.compare import UNDECIDED
from .math.exact import number
from .math.golds import NOT_CHECKED, Undecided, trouble_with
from .math.grade import NOT_COMPARED, REASONS, Grade, Reason, shape_reward
from .math.guards import MAX_CHARS
from .math.normalize import normalize
from .pool.verifier import BUILT_IN, GraderError, Ticket, Verifier

__all__ = [
    "BUILT_IN", "NOT_CHECKED", "NOT_COMPARED", "REASONS", "Grade", "GraderError", "Reason", "Ticket",
    "Verifier", "answer_line_reward", "check_golds", "math_reward", "shape_reward", "vote_key",
]  # fmt: skip


@cache
def _shared_verifier(process: int) -> Verifier:
    """Return a verifier with one worker, started at the first call.

    process: id of the calling process, so that a forked child starts its own.
    """
    return Verifier(workers=1, timeout_s=2.0, memory_gib=2.0, grader="math")


def math_reward(completion: str, gold: str, problem: str = "") -> Grade:
    """Grade a completion: correct if its final answer equals the gold and is not copied from `problem`, if given.

    Blocks for at most a few seconds.
    """
    return _shared_verifier(os.getpid()).grade(completion, gold, {"problem": {"problem": problem}})


def check_golds(golds: list[str]) -> list[str | None]:
    """Return for each gold the reason why it does not verify against itself, or None if it is valid.

    Numbers and words take microseconds. Other golds take some milliseconds in the shared worker.
    """
    try:
        return [trouble_with(gold, UNDECIDED) for gold in golds]
    except Undecided:
        return _shared_verifier(os.getpid()).check_golds(golds)


def vote_key(extracted: str) -> str:
    """Return a cheap key for majority voting. Equal numbers and equal spellings have equal keys (0.5 and 1/2)."""
    text = normalize(extracted) if len(extracted) <= MAX_CHARS else extracted
    value = number(text)
    return text if value is None else str(value)
