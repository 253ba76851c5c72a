"""Is a gold fit to be a gold? Checked when data is loaded, for a gold that cannot be matched teaches only noise.

It must survive extraction from a box, stay inside the size limits, and be readable: a number, words, or mathematics
that equals itself when it is compared without the shortcut of equal strings.
"""

from dataclasses import replace

from . import compare, guards
from .exact import number
from .extract import final_answers
from .normalize import normalize

NOT_CHECKED = ("timeout", "crash")
"""Said of a gold that used up the limits of its check: no verdict, since another machine may come to one."""


def trouble_with(gold: str, leaf: compare.Leaf) -> str | None:
    """Why this gold must not be used; None when it is fine. Raises Undecided when `leaf` cannot tell."""
    if len(gold) > guards.MAX_CHARS:
        return "over a size limit (docs/verifier.md)"
    text = normalize(gold)
    if not text:
        return "empty"
    if final_answers(f"\\boxed{{{gold}}}") != (gold.strip(),):
        return "does not survive \\boxed{}: unbalanced braces, a box of its own, or nothing visible"
    try:
        guards.check_size(text)
        verdict = number(text) is not None or compare.equal(text, text, replace(leaf, trust_spelling=False))
    except (guards.TooLarge, RecursionError):
        return "over a size limit (docs/verifier.md)"
    if verdict is None:
        raise Undecided
    return None if verdict else "not readable as mathematics or text: only the very same spelling would match"


class Undecided(Exception):
    """Computer algebra is needed to tell."""
