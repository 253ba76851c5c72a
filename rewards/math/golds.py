"""Checks of gold answers when data is loaded: a gold that cannot be matched gives only incorrect rewards.

A gold must survive extraction from a box, satisfy the size limits, and be readable: a number, words, or an expression
that equals itself without the shortcut for equal strings.
"""

from dataclasses import replace

from .compare import Leaf, compare
from .extract import final_answers
from .normalize import normalize

NOT_CHECKED = ("timeout", "crash")
"""Reasons of a gold that exceeded the limits of its check: no verdict, since a faster machine may reach one."""


def trouble_with(gold: str, leaf: Leaf) -> str | None:
    """Return why this gold must not be used; None if it is valid. Raises Undecided if `leaf` cannot decide."""
    verdict, reason = compare((gold,), gold, replace(leaf, trust_spelling=False))
    if reason != "guard" and not normalize(gold):
        return "empty"
    if final_answers(f"\\boxed{{{gold}}}") != (gold.strip(),):
        return "does not survive \\boxed{}: unbalanced braces, a box of its own, or nothing visible"
    if reason == "guard":
        return "over a size limit (docs/verifier.md)"
    if verdict is None:
        raise Undecided
    return None if verdict else "not readable as mathematics or text: only the very same spelling would match"


class Undecided(Exception):
    """Raised if a check needs computer algebra."""
