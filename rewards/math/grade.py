"""The verdict on one completion, the only thing that leaves this package, and the reward that is made of it.

`correct` is what accuracy, pass@k and the reward read; `extracted` is the answer that was judged, None when there was
none; `reason` says why, so that a run can count its time-outs apart from its wrong answers.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

Reason = Literal["match", "mismatch", "no_answer", "contradiction", "echo", "guard", "timeout", "crash"]
"""match: equal to the gold. mismatch: an answer, but another one. no_answer: none, or an empty or cut-off one.
contradiction: several different final answers. echo: equal to the gold, but copied from the problem. guard: refused
before any computer algebra, too large to be honest. timeout: the item used up its processor time. crash: it ended its
worker (memory, a fault)."""

REASONS: tuple[str, ...] = get_args(Reason)
NOT_COMPARED = tuple(reason for reason in REASONS if reason not in ("match", "mismatch"))  # logged as reward/REASON


@dataclass(frozen=True, slots=True)
class Grade:
    """One verdict. `own_score` and `own_parts` are set by a user's own reward alone."""

    correct: bool
    extracted: str | None
    reason: Reason
    own_score: float | None = None
    own_parts: dict[str, float] | None = field(default=None, hash=False)

    @property
    def score(self) -> float:
        """The reward before any shaping; 1.0 or 0.0 of the built-in ones."""
        return float(self.correct) if self.own_score is None else self.own_score

    @property
    def parts(self) -> dict[str, float]:
        """Further numbers by name that are worth logging, as reward/NAME."""
        return self.own_parts or {}


def shape_reward(
    grade: Grade,
    response_tokens: int,
    truncated: bool,
    *,
    right: float,
    wrong: float,
    overlong_buffer_tokens: int,
    max_response_tokens: int,
) -> float:
    """The reward of one response.

    right, wrong: the value of a verdict (the paper: +1, -1); a score in between (a user's own grader) is interpolated.
    overlong_buffer_tokens: length of DAPO's soft overlong punishment (arXiv 2503.14476, equation 13; 0: off). It grows
    linearly from 0 to 1 over that many tokens before `max_response_tokens`, and is 1 for a truncated response.
    """
    reward = wrong + (right - wrong) * grade.score
    if overlong_buffer_tokens > 0:
        over = response_tokens - (max_response_tokens - overlong_buffer_tokens)
        reward -= 1.0 if truncated else min(max(over / overlong_buffer_tokens, 0.0), 1.0)
    return reward
