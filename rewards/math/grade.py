"""Grade of one completion, and the reward computed from it.

`correct` is used by accuracy, pass@k and the reward. `extracted` is the graded answer, None if there is none. `reason`
explains the verdict, so that a run can count timeouts separately from incorrect answers.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

Reason = Literal["match", "mismatch", "no_answer", "contradiction", "echo", "guard", "timeout", "crash"]
"""match: equal to the gold. mismatch: not equal. no_answer: no answer, or an empty or truncated one. contradiction:
several different final answers. echo: equal to the gold, but copied from the problem. guard: over a size limit,
rejected before computer algebra. timeout: exceeded its CPU time. crash: its worker ended (memory, a fault)."""

REASONS: tuple[str, ...] = get_args(Reason)
NOT_COMPARED = tuple(reason for reason in REASONS if reason not in ("match", "mismatch"))  # logged as reward/REASON


@dataclass(frozen=True, slots=True)
class Grade:
    """Verdict on one completion. Only a user's reward sets `own_score` and `parts`.

    parts: additional numbers by name, logged as reward/NAME.
    """

    correct: bool
    extracted: str | None
    reason: Reason
    own_score: float | None = None
    parts: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def score(self) -> float:
        """Reward before shaping; 1.0 or 0.0 for the built-in graders."""
        return float(self.correct) if self.own_score is None else self.own_score


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
    """Compute the reward of one response.

    right, wrong: reward of a correct and an incorrect response (the paper: +1, -1). Other scores (a user's reward) are
    interpolated linearly.
    overlong_buffer_tokens: length of DAPO's soft overlong punishment (arXiv 2503.14476, equation 13; 0: off). It grows
    linearly from 0 to 1 over the last N tokens before `max_response_tokens`, and is 1 for a truncated response.
    """
    reward = wrong + (right - wrong) * grade.score
    if overlong_buffer_tokens > 0:
        over = response_tokens - (max_response_tokens - overlong_buffer_tokens)
        reward -= 1.0 if truncated else min(max(over / overlong_buffer_tokens, 0.0), 1.0)
    return reward
