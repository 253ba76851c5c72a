"""One maths problem, the only row that the rest of the project sees. No imports of ours, nothing heavy."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A problem without any prompt around it (data/prompts.py adds that) and its cleaned gold answer.

    id: unique within a set and stable between runs, "<source>/<published id or row number>".
    problem: the bare problem text.
    gold: the final answer, never empty; plain integers are written plainly ("25", not "025" or "25.0").
    source: the set's name in data/registry.py, or the file's name.
    level: MATH's difficulty 1..5 where the set publishes it, else None.
    messages: the turns of a conversation, which is rendered as it stands; its user turns are `problem` too. Empty for
        a problem that the prompt template surrounds.
    row: all columns of the published row, in JSON types, for the reward; {} for a generated problem.
    """

    id: str
    problem: str
    gold: str
    source: str
    level: int | None
    messages: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
