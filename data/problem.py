"""The `Problem` dataclass. Imports only the standard library."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A math problem without prompt (data/prompts.py adds it), with its cleaned gold answer.

    id: unique within a set and stable between runs, "<source>/<published id or row number>".
    problem: the bare problem text.
    gold: the final answer, never empty; canonical integers ("25", not "025" or "25.0").
    source: the set's name in data/registry.py, or the file's name.
    level: MATH's difficulty 1..5 if the set publishes it, else None.
    messages: turns of a conversation, which is rendered without prompt template; `problem` is its user turns. Empty for
        an ordinary problem.
    row: all columns of the published row, as JSON types, for the reward; {} for a generated problem.
    """

    id: str
    problem: str
    gold: str
    source: str
    level: int | None
    messages: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
