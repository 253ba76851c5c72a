"""Rewards: is this completion right? Strings in, a Grade out. Imports neither torch nor the trainer.

    math_reward(completion, gold, problem)  one verdict (starts one shared worker when it needs computer algebra)
    answer_line_reward(completion, gold)    the paper's strict "Answer:" rule
    Verifier(workers, ...)                  many at once, submitted while generation goes on
    check_golds(golds)                      golds that must not be trained on, with the reason
    shape_reward(grade, ...)                the grade as a reward

math/ holds the mathematics, pool/ the processes. Policies: docs/verifier.md.
Command line: `python -m rewards.check FILE.jsonl`.
"""

from functools import cache

from .math.answer_line import answer_line_reward
from .math.compare import UNDECIDED
from .math.exact import number
from .math.golds import NOT_CHECKED, Undecided, trouble_with
from .math.grade import NOT_COMPARED, REASONS, Grade, Reason, shape_reward
from .math.guards import MAX_CHARS
from .math.normalize import normalize
from .pool.own import NAMES
from .pool.verifier import BUILT_IN, GraderError, Ticket, Verifier

__all__ = [
    "BUILT_IN", "NAMES", "NOT_CHECKED", "NOT_COMPARED", "REASONS", "Grade", "GraderError", "Reason", "Ticket",
    "Verifier", "answer_line_reward", "check_golds", "math_reward", "shape_reward", "vote_key",
]  # fmt: skip


@cache
def _shared_verifier() -> Verifier:
    """One worker for the functions below, started when first needed, gone with the interpreter."""
    return Verifier(workers=1, timeout_s=2.0, memory_gib=2.0, grader="math")


def math_reward(completion: str, gold: str, problem: str = "") -> Grade:
    """Whether the final answer of a completion equals the gold and is not copied from the problem, where that is given.

    Blocks, at most a few seconds.
    """
    return _shared_verifier().grade(completion, gold, {"problem": {"problem": problem}})


def check_golds(golds: list[str]) -> list[str | None]:
    """For each gold the reason why it must not be used (it does not verify against itself); None when it is fine.

    Numbers and words take microseconds, the others some milliseconds in the shared worker.
    """
    try:
        return [trouble_with(gold, UNDECIDED) for gold in golds]
    except Undecided:
        return _shared_verifier().check_golds(golds)


def vote_key(extracted: str) -> str:
    """A cheap key for majority voting: equal numbers and equal spellings give equal keys (0.5 and 1/2)."""
    text = normalize(extracted) if len(extracted) <= MAX_CHARS else extracted
    value = number(text)
    return text if value is None else str(value)
