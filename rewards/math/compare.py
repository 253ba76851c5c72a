r"""Does an answer equal the gold? Structure and exact numbers here; single expressions are left to a `leaf` comparison.

`equal` goes through one rule for each kind of value: texts, statements (`x=5`), matrices, bases, roundings, sets of
reals, groups (lists, sets, tuples), units, ratios, expressions. The first rule whose kind either side is decides: by
equal strings, then exact Fractions, then `leaf`. The verdict is True, False, or None for "not decided here". With
`UNDECIDED` as the leaf no computer algebra is needed and most answers are settled in microseconds (pool/verifier.py
tries this first, in the caller); in a worker the leaf is symbolic.equal_expressions. Policies: docs/verifier.md.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import arithmetic, parts, regions
from .exact import number, same_number, value_or_text
from .guards import MAX_ALGEBRA_ITEMS, MAX_CHARS, TooLarge, check_size
from .normalize import normalize
from .parts import Statement, statement, unknowns
from .units import NOT_OPTIONAL, split_unit

Verdict = bool | None


@dataclass(frozen=True, slots=True)
class Leaf:
    """How single expressions are compared where structure and exact numbers leave off.

    `expressions`: (answer, gold), both normalised -> whether they are equal; None: not decided.
    `trust_spelling`: equal strings are equal. Off when a gold is tested against itself (golds.py).
    """

    expressions: Callable[[str, str], Verdict]
    trust_spelling: bool = True


UNDECIDED = Leaf(lambda answer, gold: None)
"""The leaf that leaves every expression to somebody else."""


def compare(answers: Sequence[str], gold: str, leaf: Leaf) -> tuple[Verdict, str]:
    """Judge the final answers of one completion (usually one) as (verdict, reason); None: `leaf` could not decide.

    Several different final answers must all equal the gold, or together be the list that the gold is.
    """
    try:
        if len(answers) == 1:
            verdict = _guarded_equal(answers[0], gold, leaf)
            return verdict, "match" if verdict else "mismatch"
        each = _all_of(_guarded_equal(answer, gold, leaf) for answer in answers)
        together = _guarded_equal(" , ".join(answers), gold, leaf) if each is not True else True
    except (TooLarge, RecursionError):
        return False, "guard"
    if each or together:
        return True, "match"
    return (None, "") if each is None or together is None else (False, "contradiction")


def _guarded_equal(answer: str, gold: str, leaf: Leaf) -> Verdict:
    if answer.strip() == gold.strip() and answer.strip():
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
    """Whether normalised answer `a` equals normalised gold `g`; None when a leaf could not decide."""
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
    """Words equal the same words; a choice letter equals itself in any dress, also with its value beside it."""
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
    """`x=5` says 5 and is said by 5; an equation still to be solved says nothing, unless the gold is a curve."""
    x, y = statement(a), statement(g)
    if x is None and y is None:
        return NotImplemented
    if y is None:
        assert x is not None
        return x.solved and not x.modulus and _claims(x, g, leaf)
    if x is None:
        named = y.solved and not y.modulus and all(parts.names_a_value(name, y.value) for name in y.names)
        chained = y.names or all(same_number(link, y.value) for link in y.links)  # 0.56=56\%
        return equal(a, parts.ordered_value(y), leaf) if named and chained else False
    if x.modulus or y.modulus:
        p, q, m = number(x.value), number(y.value), number(y.modulus)
        congruent = equal(x.value, y.value, leaf) if p is None or q is None or not m else (p - q) % m == 0
        return x.modulus == y.modulus and not x.links and congruent
    if x.names and x.solved and y.names and y.solved:
        if any(parts.same_name(p, q) for p in x.names for q in y.names):
            return _claims(x, parts.ordered_value(y), leaf)
    two_sides = all(len(side.names) + len(side.links) == 1 for side in (x, y))
    return _expressions(a, g, leaf) if y.is_curve and two_sides else False


def _claims(found: Statement, g: str, leaf: Leaf) -> Verdict:
    r"""Whether the value and each link are the gold: 6*7=42 and 42=6*7 are right, 17=42 is not. A formula in other
    letters claims nothing: A=\pi r^2=9\pi.
    """
    links = [link for link in found.links if not found.names or unknowns(link) <= unknowns(g)]
    value = equal(parts.ordered_value(found), g, leaf)
    if value is False and links and not found.names:
        value, links = equal(links[0], g, leaf), [*links[1:], found.value]
    return _all_of((value, *(_holds(link, g, leaf) for link in links)))


def _holds(link: str, g: str, leaf: Leaf) -> Verdict:
    """A link may be arithmetic not carried out, or digits in another base; it must be true."""
    x, y = (_value_in_base(text) if number(text) is None else number(text) for text in (link, g))
    if x is not None and y is not None:
        return x == y
    if re.search(r"\\approx|\\text|\\neq", link):
        return False
    check_size(link)
    return leaf.expressions(link, split_unit(g).core)


def _matrices(a: str, g: str, leaf: Leaf):
    """Matrices entry by entry, whatever their brackets; functions by cases piece by piece, in any order."""
    p, q, x, y = parts.pieces_of(a), parts.pieces_of(g), parts.rows_of(a), parts.rows_of(g)
    if p and q:
        return _matched(p, q, lambda m, n: _in_order(m, n, leaf))
    if not x and not y or (not x and "\\begin" in a) or (not y and "\\begin" in g):
        return NotImplemented
    return len(x) == len(y) and _all_of(_in_order(p, q, leaf) for p, q in zip(x, y, strict=True))


_BASE = re.compile(
    r"\(?([0-9A-F]+(?:\.[0-9A-F]+)?)\)?"
    r"(?:_\{?\(?(?:\\text\{(?:base ?)?\}?)?|\(?\\text\{(?:in )?base\})([0-9a-z]+)\}?\)?\}?"
)
_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"}


def _bases(a: str, g: str, leaf: Leaf):
    """Digits in a base equal the same digits in the same base, nothing else: the question asked for that base."""
    x, y = _digits_and_base(a), _digits_and_base(g)
    if x and y:
        return x == y
    for found, other in ((x, g), (y, a)):
        if found:
            return found[1] == "10" and number(found[0]) == number(other)
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
    r"""`x \approx 3.14` is right for a decimal gold, not for an exact one; `\pi \approx 3.14` says \pi."""
    if "\\approx" not in a:
        return NotImplemented
    exact, _, rounded = a.partition("\\approx")
    if "\\approx" in g:
        return equal(a.rpartition("\\approx")[2], g.rpartition("\\approx")[2], leaf)
    p, q = number(rounded), number(g)
    far = p is not None and q is not None and abs(p - q) * 20 > abs(q)
    said = exact and not parts.is_name(exact)
    return not far and equal(exact, g, leaf) if said else "." in g and equal(rounded, g, leaf)


def _regions(a: str, g: str, leaf: Leaf):
    r"""Sets of real numbers: an inequality, an interval, `x\neq0`; in another unknown they are another answer."""
    if not regions.MARKS.search(a + g):
        return NotImplemented
    x, y = regions.region(a), regions.region(g)
    if x is None or y is None:
        if all(regions.SIGNS.search(text) and not parts.listed(text) for text in (a, g)):
            return _expressions(a, g, leaf)
        return False if regions.SIGNS.search(a + g) or x or y else NotImplemented
    return _all_of((
        not x.name or not y.name or x.name == y.name,
        _matched(x.spans, y.spans, lambda p, q: p[2:] == q[2:] and _in_order(p[:2], q[:2], leaf)),
        _unordered(x.holes, y.holes, leaf), _unordered(x.points, y.points, leaf),
    ))  # fmt: skip


def _groups(a: str, g: str, leaf: Leaf):
    """Sets and bare lists are unordered, a set's repeated elements count once; tuples, points and named values are in
    order. The brackets of two items must be the same: (3,4] is not [3,4].
    """
    x, y = parts.group(a), parts.group(g)
    found, other = (x, g) if x else (y, a)
    if found is None:
        return NotImplemented
    if x is None or y is None:
        if found.opening or not re.fullmatch(r"\d{3}(,\d{3})+" if found is x else r"\d{1,3}(,\d{3})+", other):
            return False if len(found.items) > 1 or found.opening in ("[", "\\{") else NotImplemented
        thousands = parts.Group("", tuple(other.split(",")), "")  # beside a list 100,200 may be one too
        x, y = x or thousands, y or thousands
    heads = [item.partition("=")[0] for item in x.items if "=" in item]
    if y.opening == "(" and len(set(heads)) < len(heads):
        return False  # two values of one unknown are no point
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
    """The same unit on both sides, or a unit on one side alone; degrees also as radians; 2 hours 3 minutes in parts."""
    if len(measures := _COMPOUND.findall(g)) > 1 and not _COMPOUND.sub("", g):
        return not _COMPOUND.sub("", a) and _in_order(_COMPOUND.findall(a), measures, leaf)
    x, y = split_unit(a), split_unit(g)
    if (x.core, y.core) == (a, g):
        return NotImplemented
    if "degree" in (x.unit, y.unit) and not (x.unit and y.unit) and "\\pi" in x.core + y.core:
        radians = [f"\\frac{{({m.core})*\\pi}}{{180}}" if m.unit else m.core for m in (x, y)]
        return _expressions(radians[0], radians[1], leaf)
    percent = (x.core[-1:] == "%") != (y.core[-1:] == "%") and (x.unit or y.unit)  # a unit as well, and another one
    bare = not y.unit or (not x.unit and y.unit not in NOT_OPTIONAL)
    return not percent and (bare or x.unit == y.unit) and equal(x.core, y.core, leaf)


_TIME = re.compile(r"\d{1,2}:[0-5]\d")


def _ratios(a: str, g: str, leaf: Leaf):
    """1:2 is 2:4 and 1/2, 1:2:3 is 2:4:6; times of day are compared as they stand, a whole number is no ratio."""
    x, y = parts.split(a, ":"), parts.split(g, ":")
    if len(x) == 1 and len(y) == 1:
        return NotImplemented
    if _TIME.fullmatch(a) and _TIME.fullmatch(g):
        return a.lstrip("0") == g.lstrip("0")
    if len(x) > 2 or len(y) > 2:
        values = [(number(p), number(q)) for p, q in zip(x, y, strict=False)]
        return len(x) == len(y) and all(p and q for p, q in values) and len({p / q for p, q in values if p and q}) == 1
    alone = [number(terms[0]) for terms in (x, y) if len(terms) == 1]
    if any(value is not None and value.denominator == 1 for value in alone):
        return False
    ours, theirs = (f"\\frac{{{terms[0]}}}{{{terms[1]}}}" if len(terms) == 2 else terms[0] for terms in (x, y))
    return equal(ours, theirs, leaf)


_UNEVALUATED = ("\\mod", "\\pmod", "\\int", "\\sum", "\\prod", "\\lim", "\\oint", "\\iint")
_NOT_MATHS = re.compile(
    r"\d \d|['\"?]|\\ldots|,|\\text\{|\\neg|\\to(?![a-z])|\|-?[\d.]+\|$|\\(?:sqrt|frac\{\w*\})\{\w*\}\d"
)


def _expressions(a: str, g: str, leaf: Leaf) -> Verdict:
    """One expression against another. Refused here: work left undone (17*23 for 391 is the question), stray words,
    blanks between digits, primes.
    """
    left = number(g)
    undone = any(head in a and head not in g for head in _UNEVALUATED)
    if undone or (left is not None and arithmetic.is_undone(a, whole=left.denominator == 1)):
        return False
    if _NOT_MATHS.search(a) or "\\text{" in g or ("=" in a) != ("=" in g):
        return False
    check_size(g)
    return False if arithmetic.differ(a, g) else leaf.expressions(a, g)


_RULES: tuple[Callable[[str, str, Leaf], Verdict], ...] = (
    _texts, _statements, _matrices, _bases, _roundings, _regions, _groups, _units, _ratios,
)  # fmt: skip


def _all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Three-valued `all`: False wins, then None."""
    outcome: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        outcome = outcome and verdict
    return outcome


def _in_order(answers: Sequence[str], golds: Sequence[str], leaf: Leaf) -> Verdict:
    return len(answers) == len(golds) and _all_of(equal(a, g, leaf) for a, g in zip(answers, golds, strict=True))


def _unordered(answers: Sequence[str], golds: Sequence[str], leaf: Leaf) -> Verdict:
    return _matched(answers, sorted(golds, key=lambda item: number(item) is None), lambda a, g: equal(a, g, leaf))


def _matched(answers: Sequence[Any], golds: Sequence[Any], same: Callable[[Any, Any], Verdict]) -> Verdict:
    """Whether the two are the same but for order: each gold takes one equal answer."""
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
