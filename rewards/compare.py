r"""Does an answer equal the gold? Structure and exact numbers here; single expressions are left to a `leaf` comparison.

`equal` takes both sides apart (parts.py) and compares value by value, one rule for each kind: texts, statements
(`x=5`), bases, roundings, regions, plus-minus, lists, matrices, brackets, units, ratios, expressions; within a rule
equal strings, then exact Fractions, then `leaf`. It returns True, False, or None for "not decided here". With
`UNDECIDED` as the leaf no computer algebra is needed and most answers are settled in microseconds (rewards/pool.py
tries this first, in the caller); in a worker the leaf is symbolic.equal_expressions.

Every policy choice is in docs/verifier.md with examples.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import parts
from .exact import number
from .guards import MAX_ALGEBRA_ITEMS, MAX_CHARS, TooLarge, check_size
from .normalize import normalize
from .parts import bracket, listed, split, statement, unknowns
from .regions import has_inequality, region, speaks_of_regions
from .units import split_unit

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
    """Judge the final answers of one completion (usually one) as (verdict, reason); verdict None: `leaf` could not
    decide.

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
    if not a or not g:
        return False
    if a == g:
        return True
    x, y = number(a), number(g)
    if x is not None and y is not None:
        return x == y
    check_size(a)
    check_size(g)
    a, g = parts.without_conditions(a, g)
    return equal(parts.unstacked(a), parts.unstacked(g), leaf)


def equal(a: str, g: str, leaf: Leaf) -> Verdict:
    """Whether normalised answer `a` equals normalised gold `g`; None when a leaf could not decide."""
    if a == g and leaf.trust_spelling:
        return True
    if not a or not g:
        return False
    x, y = number(a), number(g)
    if x is not None and y is not None:
        return x == y
    for rule in _RULES:
        verdict = rule(a, g, leaf)
        if verdict is not NotImplemented:
            return verdict
    return _expressions(a, g, leaf)


# ------------------------------------------------------------------------------------------------- words and choices

_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CHOICE = re.compile(
    r"\(?([A-Ha-h])\)?[.:)]?|\\text\{(?:choice|option|answer) \(?([a-h])\)?\}"
    r"|\\text\{(?:[Cc]hoice|[Oo]ption)\}\(([A-H])\)"
)
_CHOICE_AND_VALUE = re.compile(
    r"(?:\(?([A-H])\)|([A-H])(?=[.:])|\\text\{\(?([A-H])[).:]+\})[:.]? ?(?![A-H]\b)(.+)", re.DOTALL
)


def _texts(a: str, g: str, leaf: Leaf):
    """Words equal the same words; a choice letter equals itself in any dress, also with its value beside it."""
    letter, gold_letter = _CHOICE.fullmatch(a), _CHOICE.fullmatch(g)
    if letter and gold_letter:
        return {a, g} != {"e", "E"} and _letter(letter) == _letter(gold_letter)
    labelled = _CHOICE_AND_VALUE.fullmatch(a)
    if labelled and not _CHOICE_AND_VALUE.fullmatch(g) and not listed(a):
        if gold_letter:
            return _letter(labelled) == _letter(gold_letter)
        return equal(labelled[4].strip(), g, leaf)
    if _WHOLE_TEXT.fullmatch(a) or _WHOLE_TEXT.fullmatch(g):
        return _plain_words(a) == _plain_words(g)
    return NotImplemented


def _letter(choice: re.Match[str]) -> str:
    return next(group for group in choice.groups() if group).upper()


def _plain_words(text: str) -> str:
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).lower().split())


# -------------------------------------------------------------------------------------------------------- statements


def _statements(a: str, g: str, leaf: Leaf):
    """`x=5` says 5 and is said by 5; every link of a chain must hold: 6*7=42 is right, 17=42 is not."""
    x, y = statement(a), statement(g)
    if x is None and y is None:
        return NotImplemented
    if x is None:
        assert y is not None
        return _named_gold(a, y, leaf)
    if y is None:
        return _claims(x, g, leaf) if x.solved else False
    if x.modulus or y.modulus:
        return x.modulus == y.modulus and not x.links and _residues(x.value, y.value, y.modulus, leaf)
    if x.names and x.solved and y.names and y.solved:
        if _same_names(x, y):
            return _claims(x, y.value, leaf)
        if not y.is_curve:
            return False
    two_sides = all(len(side.names) + len(side.links) == 1 for side in (x, y))
    return _expressions(a, g, leaf) if y.is_curve and two_sides else False


def _named_gold(a: str, g: parts.Statement, leaf: Leaf) -> Verdict:
    """A bare value, where the gold has a name."""
    named = g.names and g.solved and not g.modulus and not any(parts.is_curve_side(name) for name in g.names)
    return equal(a, _ordered(g), leaf) if named else False


def _same_names(x: parts.Statement, y: parts.Statement) -> bool:
    ours, theirs = parts.tuple_names(x.names[0]), parts.tuple_names(y.names[0])
    if ours and theirs:
        return set(ours) == set(theirs)
    return any(parts.same_name(p, q) for p in x.names for q in y.names)


def _ordered(found: parts.Statement) -> str:
    """The value, a named tuple's in the order of its names: (y,x)=(1,2) says (2,1)."""
    names, values = parts.tuple_names(found.names[0]) if found.names else (), bracket(found.value)
    if not names or values is None or len(values.items) != len(names):
        return found.value
    return f"{values.opening}{','.join(parts.in_name_order(names, list(values.items)))}{values.closing}"


def _claims(found: parts.Statement, g: str, leaf: Leaf) -> Verdict:
    """Whether a statement's value is the gold, and each link is too; a formula in other letters claims nothing.

    The first side may be the answer: 42=6*7.
    """
    if found.modulus:
        return False
    links = [link for link in found.links if not found.names or unknowns(link) <= unknowns(g) or not unknowns(link)]
    if any(parts.is_name(link) and unknowns(link) & unknowns("".join(found.names)) for link in found.links):
        return False
    value = equal(_ordered(found), g, leaf)
    if value is False and not found.names and found.links:
        return _all_of((equal(found.links[0], g, leaf), *(_holds(side, g, leaf) for side in (*links[1:], found.value))))
    return _all_of((value, *(_holds(link, g, leaf) for link in links)))


def _holds(link: str, g: str, leaf: Leaf) -> Verdict:
    """A link of a chain like 6*7=42 may be arithmetic not carried out, or digits in another base; it must be true."""
    x, y = number(link), number(g)
    x, y = (_value_in_base(link) if x is None else x), (_value_in_base(g) if y is None else y)
    if x is not None and y is not None:
        return x == y
    if "\\approx" in link or "\\text" in link or "\\neq" in link:
        return False
    check_size(link)
    return leaf.expressions(link, split_unit(g).core)


def _residues(a: str, g: str, modulus: str, leaf: Leaf) -> Verdict:
    x, y, m = number(a), number(g), number(modulus)
    if x is None or y is None or not m:
        return equal(a, g, leaf)
    return (x - y) % m == 0


# ------------------------------------------------------------------------------------------------- bases, roundings

_BASE = re.compile(r"\(?([0-9A-F]+)\)?_\{?\(?(?:\\text\{(?:base ?)?\}?)?([0-9a-z]+)\}?\)?\}?")
_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "ten": "10",
    "sixteen": "16"}  # fmt: skip


def _bases(a: str, g: str, leaf: Leaf):
    """Digits in a base equal the same digits in the same base, nothing else: the question asked for that base."""
    x, y = _digits_and_base(a), _digits_and_base(g)
    if x is None and y is None:
        return NotImplemented
    if x is None or y is None:
        bare, (digits, base) = (a, y) if y else (g, x or ("", ""))
        return base == "10" and (equal(bare, digits, leaf) if y else equal(digits, bare, leaf))
    return x == y


def _digits_and_base(text: str) -> tuple[str, str] | None:
    match = _BASE.fullmatch(text) if "_" in text else None
    base = _BASE_NAMES.get(match[2], match[2]) if match else ""
    return (match[1].lstrip("0"), base) if match and base.isdecimal() and len(base) < 3 else None


def _value_in_base(text: str) -> int | None:
    found = _digits_and_base(text)
    if found is None or not 2 <= int(found[1]) <= 36 or any(int(digit, 36) >= int(found[1]) for digit in found[0]):
        return None
    return int(found[0] or "0", int(found[1]))


def _approximations(a: str, g: str, leaf: Leaf):
    r"""`x \approx 3.14` is right for a decimal gold; `\pi \approx 3.14` says \pi. For an exact gold "about" is not
    enough.
    """
    if "\\approx" not in a:
        return NotImplemented
    if "\\approx" in g:
        return equal(a.rpartition("\\approx")[2], g.rpartition("\\approx")[2], leaf)
    exact, _, rounded = a.partition("\\approx")
    if exact and not parts.is_name(exact):
        return equal(exact, g, leaf)
    return "." in g and equal(rounded, g, leaf)


# ------------------------------------------------------------------------------------------------ regions and curves


def _regions(a: str, g: str, leaf: Leaf):
    r"""Sets of real numbers: an inequality, an interval, `x\neq0`; in another unknown they are another answer."""
    if not speaks_of_regions(a) and not speaks_of_regions(g):
        return NotImplemented
    x, y = region(a), region(g)
    if x is None or y is None:
        both = has_inequality(a) and has_inequality(g) and not listed(a) and not listed(g)
        return _expressions(a, g, leaf) if both else False if has_inequality(a + g) or x or y else NotImplemented
    if x.name and y.name and x.name != y.name:
        return False
    return _all_of((
        _matched(x.spans, y.spans, lambda p, q: (p.has_low, p.has_high) == (q.has_low, q.has_high) and _all_of(
            (equal(p.low, q.low, leaf), equal(p.high, q.high, leaf)))),
        _unordered(x.holes, y.holes, leaf),
        _unordered(x.points, y.points, leaf),
    ))  # fmt: skip


# -------------------------------------------------------------------------------------------------- lists, brackets


def _plus_minus(a: str, g: str, leaf: Leaf):
    r"""`\pm x` is the list of its two values."""
    if not any(sign in text for sign in ("\\pm", "\\mp") for text in (a, g)):
        return NotImplemented
    return equal(_both_signs(a), _both_signs(g), leaf)


def _both_signs(text: str) -> str:
    signed = []
    for item in listed(text) or (text,):
        found = statement(item)
        item = found.value if found and found.names and not found.links else item
        item = item if "\\pm" in item else item.replace("\\mp", "\\pm")
        for sign, other in ("+-", "-+") if "\\pm" in item else ("  ",):
            signed.append(item.replace("\\pm", sign).replace("\\mp", other).removeprefix("+"))
    return ",".join(_sum(normalize(item.replace("{+", "{"))) for item in signed)


def _sum(text: str) -> str:
    match = re.fullmatch(r"(-?[\d.]+)([+-])([\d.]+)", text)
    first, second = (number(match[1]), number(match[2] + match[3])) if match else (None, None)
    return text if first is None or second is None else str(first + second)


def _lists(a: str, g: str, leaf: Leaf):
    """Bare lists and sets are unordered, named values in the order of their names; a bare list beside a tuple is
    read in order.
    """
    items_a, items_g = listed(a), listed(g)
    if not items_a and not items_g:
        return NotImplemented
    names_a, names_g = _assigned_names(items_a), _assigned_names(items_g)
    if names_a and names_g and set(names_a) != set(names_g):
        return False
    values_a, values_g = _values(items_a, names_a), _values(items_g, names_g)
    if values_a and values_g:
        return (_in_order if names_a or names_g else _unordered)(values_a, values_g, leaf)
    other = bracket(a if values_g else g)
    if other is None:  # 100,200 is a number, but beside a list it may be one too
        thousands = split(a if values_g else g, ",")
        if len(thousands) == 1 or number(a if values_g else g) is None:
            return False
        return _unordered(values_a or thousands, values_g or thousands, leaf)
    x, y = values_a or other.items, values_g or other.items
    if other.is_set:
        return not (names_a or names_g) and _unordered(_distinct(x), _distinct(y), leaf)
    return _in_order(x, y, leaf) if other.is_round else False


def _assigned_names(items: tuple[str, ...]) -> tuple[str, ...]:
    """The names when every item is `name=value` with its own name, else ()."""
    found = [statement(item) for item in items]
    names = tuple(part.names[0] for part in found if part and len(part.names) == 1)
    return names if len(set(names)) == len(items) else ()


def _values(items: Sequence[str], names: tuple[str, ...] = ()) -> list[str]:
    values = []
    for item in items:
        found = statement(item)
        values.append(found.value if found and len(found.names) == 1 and not found.links and found.solved else item)
    return parts.in_name_order(names, values) if names else values


def _brackets(a: str, g: str, leaf: Leaf):
    """Sets unordered, repeated elements once; tuples, points, intervals in order, and for two items the brackets must
    be the same: (3,4] is not [3,4]. A set of one element is that element.
    """
    x, y = bracket(a), bracket(g)
    if x is None and y is None:
        return NotImplemented
    if x is None or y is None:
        found, other = (x, g) if x else (y, a)
        assert found is not None
        if len(found.items) == 1 and found.opening in ("(", "\\{") and found.closing in (")", "\\}"):
            return equal(found.items[0], other, leaf) if x else equal(other, found.items[0], leaf)
        return False if len(found.items) > 1 or found.is_set or found.opening == "[" else NotImplemented
    if x.is_set and y.is_set:
        return _unordered(_distinct(x.items), _distinct(y.items), leaf)
    if x.is_set or y.is_set:
        single, other = (x, g) if x.is_set else (y, a)
        if len(single.items) != 1:
            return False
        return equal(single.items[0], other, leaf) if x.is_set else equal(other, single.items[0], leaf)
    same = (x.opening, x.closing) == (y.opening, y.closing) or (x.is_round and y.is_round)
    if not same and not (len(x.items) > 2 and {x.opening + x.closing, y.opening + y.closing} == {"()", "[]"}):
        return False
    if len(x.items) == len(y.items) == 1:
        return equal(x.items[0], y.items[0], leaf)
    return _in_order(_values(x.items), _values(y.items), leaf)


def _matrices(a: str, g: str, leaf: Leaf):
    """Matrices entry by entry, whatever their brackets; functions by cases piece by piece, in any order."""
    if "\\begin" not in a + g:
        return NotImplemented
    p, q = parts.pieces_of(a), parts.pieces_of(g)
    if p and q:
        return _matched(p, q, lambda m, n: _all_of((equal(m[0], n[0], leaf), equal(m[1], n[1], leaf))))
    x, y = parts.rows_of(a), parts.rows_of(g)
    if not x and not y:
        return NotImplemented
    if not x or not y or [len(row) for row in x] != [len(row) for row in y]:
        return False
    return _all_of(equal(p, q, leaf) for rows in zip(x, y, strict=True) for p, q in zip(*rows, strict=True))


# ------------------------------------------------------------------------------------------------- units, ratios


def _units(a: str, g: str, leaf: Leaf):
    """The same unit on both sides, or a unit on the answer alone; degrees also as radians."""
    x, y = split_unit(a), split_unit(g)
    if (x.core, y.core) == (a, g):
        return NotImplemented
    if "degree" in (x.unit, y.unit) and not (x.unit and y.unit) and "\\pi" in x.core + y.core:
        radians = [f"\\frac{{({m.core})*\\pi}}{{180}}" if m.unit else m.core for m in (x, y)]
        return _expressions(radians[0], radians[1], leaf)
    if x.unit == y.unit or not y.unit or (not x.unit and y.unit_may_be_left_out):
        return equal(x.core, y.core, leaf)
    return False


_TIME = re.compile(r"\d{1,2}:[0-5]\d")


def _ratios(a: str, g: str, leaf: Leaf):
    """1:2 is 2:4 and 1/2, 1:2:3 is 2:4:6; times of day are compared as they stand."""
    x, y = split(a, ":"), split(g, ":")
    if len(x) == 1 and len(y) == 1:
        return NotImplemented
    if _TIME.fullmatch(a) and _TIME.fullmatch(g):
        return a.lstrip("0") == g.lstrip("0")
    if len(x) > 2 or len(y) > 2:
        values = [(number(p), number(q)) for p, q in zip(x, y, strict=False)]
        return len(x) == len(y) and len({p / q for p, q in values if p and q}) == 1 and all(p and q for p, q in values)
    for terms, text in ((x, a), (y, g)):  # a whole number is no ratio
        value = number(text)
        if len(terms) == 1 and (value is None or value.denominator == 1):
            return False
    ours, theirs = (f"\\frac{{{terms[0]}}}{{{terms[1]}}}" if len(terms) == 2 else terms[0] for terms in (x, y))
    return equal(ours, theirs, leaf)


_RULES: tuple[Callable[[str, str, Leaf], Verdict], ...] = (
    _texts, _statements, _matrices, _bases, _approximations, _regions, _plus_minus, _lists, _brackets, _units, _ratios,
)  # fmt: skip

# -------------------------------------------------------------------------------------------------------- expressions

_ARITHMETIC = re.compile(r"[\d\s+\-*.,^{}()]*[\d)}]\s*[+\-*]\s*[\d({\-][\d\s+\-*.,^{}()]*")
_UNEVALUATED = ("\\mod", "\\pmod", "\\int", "\\sum", "\\prod", "\\lim", "\\oint", "\\iint")
_NOT_MATHS = re.compile(r"\d \d|['\"?]|\\ldots|,|\\text\{|\\neg|\\to(?![a-z])|\|-?[\d.]+\|$")


def _expressions(a: str, g: str, leaf: Leaf) -> Verdict:
    """One expression against another. Refused here: work left undone, stray words, blanks between digits, primes."""
    if number(g) is not None and _ARITHMETIC.fullmatch(a):
        return False  # 17*23 for 391 is the question, not the answer
    if any(head in a and head not in g for head in _UNEVALUATED):
        return False
    if _NOT_MATHS.search(a) or "\\text{" in g or ("=" in a) != ("=" in g):
        return False
    check_size(g)
    return leaf.expressions(a, g)


# ---------------------------------------------------------------------------------------------- three-valued matching


def _distinct(items: Sequence[str]) -> list[str]:
    keys: dict[object, str] = {}
    for item in items:
        value = number(item)
        keys.setdefault(item if value is None else value, item)
    return list(keys.values())


def _all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Three-valued `all`: False wins, then None."""
    outcome: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            outcome = None
    return outcome


def _in_order(answers: Sequence[str], golds: Sequence[str], leaf: Leaf) -> Verdict:
    if len(answers) != len(golds):
        return False
    _check_items(answers, golds)
    return _all_of(equal(a, g, leaf) for a, g in zip(answers, golds, strict=True))


def _unordered(answers: Sequence[str], golds: Sequence[str], leaf: Leaf) -> Verdict:
    """Whether the two lists are the same but for order: each gold takes one equal answer."""
    if len(answers) != len(golds):
        return False
    _check_items(answers, golds)
    return _matched(answers, sorted(golds, key=lambda item: number(item) is None), lambda a, g: equal(a, g, leaf))


def _matched(answers: Sequence[Any], golds: Sequence[Any], same: Callable[[Any, Any], Verdict]) -> Verdict:
    if len(answers) != len(golds):
        return False
    left, uncertain = list(answers), False
    for gold in golds:
        verdicts = [same(answer, gold) for answer in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            uncertain = True
        else:
            return False
    return None if uncertain else True


def _check_items(answers: Sequence[str], golds: Sequence[str]) -> None:
    if len(answers) > MAX_ALGEBRA_ITEMS and any(number(item) is None for item in (*answers, *golds)):
        if sorted(answers) != sorted(golds):
            raise TooLarge
