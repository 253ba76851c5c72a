r"""Comparison of an answer with the gold by structure and exact numbers. A `leaf` compares single expressions.

`equal` has one rule per kind of value: texts, statements (`x=5`), matrices, bases, roundings, sets of reals, groups
(lists, sets, tuples), units, ratios, expressions. The first rule that applies to either side decides: by equal strings,
then exact Fractions, then `leaf`. The verdict is True, False, or None for undecided.

With the leaf `UNDECIDED`, no computer algebra is needed, and most answers take microseconds. pool/verifier.py tries
this first, in the caller. In a worker, the leaf is symbolic.equal_expressions. Grading policies: docs/verifier.md.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import arithmetic, parts, regions
from .exact import number, same_number, value_or_text
from .guards import MAX_ALGEBRA_ITEMS, MAX_CHARS, TooLarge, check_size
from .normalize import normalize
from .units import NOT_OPTIONAL, split_unit

Verdict = bool | None


@dataclass(frozen=True, slots=True)
class Leaf:
    """Comparison of single expressions, after structure and exact numbers.

    `expressions`: (answer, gold), both normalised -> whether they are equal; None: undecided.
    `trust_spelling`: equal strings are equal. Off when a gold is compared with itself (golds.py).
    """

    expressions: Callable[[str, str], Verdict]
    trust_spelling: bool = True


UNDECIDED = Leaf(lambda answer, gold: None)
"""Leaf that decides no expression."""


def compare(answers: Sequence[str], gold: str, leaf: Leaf) -> tuple[Verdict, str]:
    """Compare the final answers of one completion (usually one) with the gold; return (verdict, reason).

    The verdict is None if `leaf` cannot decide. Several answers must each equal the gold, or together equal it as a
    list.
    """
    try:
        if len(answers) == 1:
            verdict = _guarded_equal(answers[0], gold, leaf)
            return verdict, "match" if verdict else "mismatch"
        each = _all_of(_guarded_equal(answer, gold, leaf) for answer in answers)
        together = each or _guarded_equal(" , ".join(answers), gold, leaf)
    except (TooLarge, RecursionError):
        return False, "guard"
    if together:
        return True, "match"
    return (None, "") if None in (each, together) else (False, "contradiction")


def _guarded_equal(answer: str, gold: str, leaf: Leaf) -> Verdict:
    if leaf.trust_spelling and answer.strip() == gold.strip() and answer.strip():
        return True
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        raise TooLarge
    a, g = normalize(answer), normalize(gold)
    if (same := same_number(a, g)) is not None:  # fast, for most answers
        return same
    check_size(a)
    check_size(g)
    return equal(*parts.without_conditions(a, g), leaf)


def equal(a: str, g: str, leaf: Leaf) -> Verdict:
    """Return whether normalised answer `a` equals normalised gold `g`; None if `leaf` cannot decide."""
    a, g = parts.plain(a), parts.plain(g)
    if not a or not g or (a == g and leaf.trust_spelling):
        return bool(a) and a == g
    if (same := same_number(a, g)) is not None:
        return same
    for rule in _RULES:
        verdict = rule(a, g, leaf)
        if verdict is not NotImplemented:
            return verdict
    return _expressions(a, g, leaf)


_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CHOICE = re.compile(r"(?:\\text\{(?:choice|option|answer)\}? ?)?\(?([A-H])\)?[.:)]?\}?", re.I)
_CHOICE_AND_VALUE = re.compile(
    r"(?:\(?([A-H])\)|([A-H])(?=[.:])|\\text\{\(?([A-H])[).:]+\})[:.]? ?(?!\(?[A-H]\b)(.+)", re.S
)


def _texts(a: str, g: str, leaf: Leaf):
    """Words: equal to the same words. Choice letters: equal in any formatting, also with the value of the choice."""
    letter, gold_letter = _CHOICE.fullmatch(a), _CHOICE.fullmatch(g)
    if letter and gold_letter:
        return {a, g} != {"e", "E"} and letter[1].upper() == gold_letter[1].upper()
    labelled = _CHOICE_AND_VALUE.fullmatch(a)
    if labelled and not _CHOICE_AND_VALUE.fullmatch(g) and not parts.listed(a):
        label = labelled[1] or labelled[2] or labelled[3]
        return label == gold_letter[1].upper() if gold_letter else equal(labelled[4].strip(), g, leaf)
    if _TEXT.fullmatch(a) or _TEXT.fullmatch(g):
        words = [" ".join(_TEXT.sub(r" \1 ", text).lower().split()) for text in (a, g)]
        return words[0] == words[1]
    return NotImplemented


def _statements(a: str, g: str, leaf: Leaf):
    """Statements: `x=5` equals 5. An unsolved equation equals nothing, unless the gold is a curve."""
    x, y = parts.statement(a), parts.statement(g)
    if x is None:
        if y is None:
            return NotImplemented
        named = y.solved and not y.modulus and all(parts.names_a_value(name, y.value) for name in y.names)
        chained = y.names or all(same_number(link, y.value) for link in y.links)  # 0.56=56\%
        return equal(a, parts.ordered_value(y), leaf) if named and chained else False
    if y is None:
        return x.solved and not x.modulus and _claims(x, g, leaf)
    if x.modulus or y.modulus:
        p, q, m = number(x.value), number(y.value), number(y.modulus)
        congruent = equal(x.value, y.value, leaf) if p is None or q is None or not m else (p - q) % m == 0
        return x.modulus == y.modulus and not x.links and congruent
    if x.solved and y.solved and any(parts.same_name(p, q) for p in x.names for q in y.names):
        return _claims(x, parts.ordered_value(y), leaf)
    two_sides = all(len(side.names) + len(side.links) == 1 for side in (x, y))
    return _expressions(a, g, leaf) if y.is_curve and two_sides else False


def _claims(claim: parts.Statement, g: str, leaf: Leaf) -> Verdict:
    r"""Return whether the value and each link equal the gold: 6*7=42 and 42=6*7 are correct, 17=42 is not.

    A formula in other letters is not compared: A=\pi r^2=9\pi.
    """
    links = [link for link in claim.links if not claim.names or parts.unknowns(link) <= parts.unknowns(g)]
    value = equal(parts.ordered_value(claim), g, leaf)
    if value is False and links and not claim.names:
        value, links = equal(links[0], g, leaf), [*links[1:], claim.value]
    return _all_of((value, *(_holds(link, g, leaf) for link in links)))


def _holds(link: str, g: str, leaf: Leaf) -> Verdict:
    """Return whether a link equals the gold. It may be unevaluated arithmetic or digits in another base."""
    x, y = (_value_in_base(text) if number(text) is None else number(text) for text in (link, g))
    if x is not None and y is not None:
        return x == y
    if re.search(r"\\approx|\\text|\\neq", link):
        return False
    return leaf.expressions(link, split_unit(g).core)


def _matrices(a: str, g: str, leaf: Leaf):
    """Matrices: compared entry by entry, with any brackets. Functions by cases: piece by piece, in any order."""
    p, q, x, y = parts.pieces_of(a), parts.pieces_of(g), parts.rows_of(a), parts.rows_of(g)
    if p and q:
        return _match_all(p, q, lambda m, n: _in_order(m, n, leaf))
    if not x and not y or (not x and "\\begin" in a) or (not y and "\\begin" in g):
        return NotImplemented
    return len(x) == len(y) and _all_of(_in_order(p, q, leaf) for p, q in zip(x, y, strict=True))


_BASE = re.compile(
    r"\(?([0-9A-F]+(?:\.[0-9A-F]+)?)\)?"
    r"(?:_\{?\(?(?:\\text\{(?:base ?)?\}?)?|\(?\\text\{(?:in )?base\})([0-9a-z]+)\}?\)?\}?"
)
_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"}


def _bases(a: str, g: str, leaf: Leaf):
    """Digits in a base: equal only to the same digits in the same base, since the question asks for that base."""
    x, y = _digits_and_base(a), _digits_and_base(g)
    if x and y:
        return x == y
    for digits, other in ((x, g), (y, a)):
        if digits:
            return digits[1] == "10" and number(digits[0]) == number(other)
    return NotImplemented


def _digits_and_base(text: str) -> tuple[str, str] | None:
    match = _BASE.fullmatch(text) if "_" in text or "base" in text else None
    base = _BASE_NAMES.get(match[2], match[2]) if match else ""
    return (match[1].lstrip("0"), base) if match and base.isdecimal() and len(base) < 3 else None


def _value_in_base(text: str) -> int | None:
    digits, base = _digits_and_base(text) or ("", "0")
    valid = digits.isalnum() and 2 <= int(base) <= 36 and all(int(digit, 36) < int(base) for digit in digits)
    return int(digits, int(base)) if valid else None


def _roundings(a: str, g: str, leaf: Leaf):
    r"""Roundings: `x \approx 3.14` is correct only for a decimal gold. `\pi \approx 3.14` equals \pi."""
    if "\\approx" not in a:
        return NotImplemented
    exact, _, rounded = a.partition("\\approx")
    if "\\approx" in g:
        return equal(a.rpartition("\\approx")[2], g.rpartition("\\approx")[2], leaf)
    p, q = number(rounded), number(g)
    far = p is not None and q is not None and abs(p - q) * 20 > abs(q)
    named = exact and not parts.is_name(exact)
    return not far and equal(exact, g, leaf) if named else "." in g and equal(rounded, g, leaf)


def _regions(a: str, g: str, leaf: Leaf):
    r"""Sets of real numbers: inequalities, intervals, `x\neq0`. Sets in different unknowns are not equal."""
    if not regions.MARKS.search(a + g):
        return NotImplemented
    x, y = regions.region(a), regions.region(g)
    if x is None or y is None:
        if all(regions.SIGNS.search(text) and not parts.listed(text) for text in (a, g)):
            return _expressions(a, g, leaf)
        return False if regions.SIGNS.search(a + g) or x or y else NotImplemented
    return _all_of((
        not x.name or not y.name or x.name == y.name,
        _match_all(x.spans, y.spans, lambda p, q: p[2:] == q[2:] and _in_order(p[:2], q[:2], leaf)),
        _unordered(x.holes, y.holes, leaf), _unordered(x.points, y.points, leaf),
    ))  # fmt: skip


def _groups(a: str, g: str, leaf: Leaf):
    """Groups: sets and bare lists are unordered, tuples, points and named values are ordered.

    Repeated elements of a set count once. Brackets around two items must be the same: (3,4] does not equal [3,4].
    """
    x, y = parts.group(a), parts.group(g)
    first, other = (x, g) if x else (y, a)
    if first is None:
        return NotImplemented
    if x is None or y is None:
        if first.opening or not re.fullmatch(r"\d{3}(,\d{3})+" if first is x else r"\d{1,3}(,\d{3})+", other):
            return False if len(first.items) > 1 or first.opening in ("[", "\\{") else NotImplemented
        thousands = parts.Group("", tuple(other.split(",")), "")  # compared with a list, 100,200 may be a list
        x, y = x or thousands, y or thousands
    heads = [item.partition("=")[0] for item in x.items if "=" in item]
    if y.opening == "(" and len(set(heads)) < len(heads):
        return False  # two values of one unknown are not a point
    (names, items), (gold_names, golds) = parts.assigned(x.items), parts.assigned(y.items)
    if names and gold_names and set(names) != set(gold_names):
        return False
    all_numbers = all(number(item) is not None for item in (*items, *golds))
    if len(items) == len(golds) > MAX_ALGEBRA_ITEMS and not all_numbers and sorted(items) != sorted(golds):
        raise TooLarge
    if not names and not gold_names and all(side.is_set or not side.opening for side in (x, y)):
        distinct = _distinct if x.is_set or y.is_set else list
        return _unordered(distinct(items), distinct(golds), leaf)
    ends = {x.opening + x.closing, y.opening + y.closing}
    same = len(ends) == 1 or ends <= {"", "()", "\\langle\\rangle"} or (len(items) > 2 and ends == {"()", "[]"})
    return same and not x.is_set and not y.is_set and _in_order(items, golds, leaf)


_COMPOUND = re.compile(r"(\d[\d.,]*\\text\{[^{}]*\})[ ,]*")


def _units(a: str, g: str, leaf: Leaf):
    """Units: the same, or on one side only. Degrees may be radians. 2 hours 3 minutes is compared by part."""
    if len(measures := _COMPOUND.findall(g)) > 1 and not _COMPOUND.sub("", g):
        return not _COMPOUND.sub("", a) and _in_order(_COMPOUND.findall(a), measures, leaf)
    x, y = split_unit(a), split_unit(g)
    if (x.core, y.core) == (a, g):
        return NotImplemented
    if "degree" in (x.unit, y.unit) and not (x.unit and y.unit) and "\\pi" in x.core + y.core:
        radians = [f"\\frac{{({m.core})*\\pi}}{{180}}" if m.unit else m.core for m in (x, y)]
        return _expressions(radians[0], radians[1], leaf)
    percent = (x.core[-1:] == "%") != (y.core[-1:] == "%") and (x.unit or y.unit)  # percent and another unit
    bare = not y.unit or (not x.unit and y.unit not in NOT_OPTIONAL)
    return not percent and (bare or x.unit == y.unit) and equal(x.core, y.core, leaf)


def _ratios(a: str, g: str, leaf: Leaf):
    """Ratios: 1:2 equals 2:4 and 1/2, 1:2:3 equals 2:4:6. Times of day must be identical. An integer is not a ratio."""
    x, y = parts.split(a, ":"), parts.split(g, ":")
    if len(x) == 1 and len(y) == 1:
        return NotImplemented
    if all(re.fullmatch(r"\d{1,2}:[0-5]\d", text) for text in (a, g)):
        return a.lstrip("0") == g.lstrip("0")
    alone = [number(terms[0]) for terms in (x, y) if len(terms) == 1]
    if any(value is not None and value.denominator == 1 for value in alone):
        return False
    ours, theirs = ([f"\\frac{{{term}}}{{{terms[-1]}}}" for term in terms[:-1]] or terms for terms in (x, y))
    return _in_order(ours, theirs, leaf)


_UNEVALUATED = ("\\mod", "\\pmod", "\\int", "\\sum", "\\prod", "\\lim", "\\oint", "\\iint")
_NOT_MATHS = re.compile(
    r"\d \d|['\"?]|\\ldots|,|\\text\{|\\neg|\\to(?![a-z])|\|-?[\d.]+\|$|\\(?:sqrt|frac\{\w*\})\{\w*\}\d"
)


def _expressions(a: str, g: str, leaf: Leaf) -> Verdict:
    """Compare two expressions. Rejects unevaluated arithmetic (17*23 for 391), words, blanks between digits, primes."""
    left = number(g)
    undone = any(head in a and head not in g for head in _UNEVALUATED)
    if undone or (left is not None and arithmetic.is_undone(a, whole=left.denominator == 1)):
        return False
    if _NOT_MATHS.search(a) or "\\text{" in g or ("=" in a) != ("=" in g):
        return False
    return False if arithmetic.differ(a, g) else leaf.expressions(a, g)


_RULES: tuple[Callable[[str, str, Leaf], Verdict], ...] = (
    _texts, _statements, _matrices, _bases, _roundings, _regions, _groups, _units, _ratios,
)  # fmt: skip


def _all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Three-valued `all`: False if any is False, else None if any is None."""
    outcome: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        outcome = outcome and verdict
    return outcome


def _in_order(answers: Sequence[str], golds: Sequence[str], leaf: Leaf) -> Verdict:
    return len(answers) == len(golds) and _all_of(equal(a, g, leaf) for a, g in zip(answers, golds, strict=True))


def _unordered(answers: Sequence[str], golds: Sequence[str], leaf: Leaf) -> Verdict:
    return _match_all(answers, sorted(golds, key=lambda item: number(item) is None), lambda a, g: equal(a, g, leaf))


def _match_all(answers: Sequence[Any], golds: Sequence[Any], same: Callable[[Any, Any], Verdict]) -> Verdict:
    """Return whether answers and golds are equal in any order: each gold is matched to one equal answer."""
    left, outcome = list(answers), len(answers) == len(golds)
    for gold in golds if outcome else ():
        verdicts = [same(answer, gold) for answer in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            outcome = None
        else:
            return False
    return outcome


def _distinct(items: Sequence[str]) -> list[str]:
    return list({value_or_text(item): item for item in reversed(items)}.values())
