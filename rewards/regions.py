r"""Sets of real numbers: intervals, unions, inequalities in one unknown, and what is left out of them.

`x\neq0`, `\mathbb{R}\setminus\{0\}`, `(-\infty,0)\cup(0,\infty)` and `x<0 or x>0` become the same Region: the real line
without a hole at 0. Ends are kept as text; compare.py says which are equal.
"""

import re
from dataclasses import dataclass, replace

from .exact import number
from .normalize import normalize
from .parts import bracket, is_variable, listed, split

_SIGNS = re.compile(r"\\leq|\\geq|\\neq|<|>")
_MARKS = re.compile(r"\\leq|\\geq|\\neq|<|>|\\cup|\\setminus|\\mathbb\{R\}")
_MIRRORED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_BUILDER = re.compile(r"[a-z](?:\\in ?\\mathbb\{R\})?")


@dataclass(frozen=True, slots=True)
class Span:
    """An interval: its ends as text, and whether they belong to it."""

    low: str
    high: str
    has_low: bool
    has_high: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A union of spans and single points, without the holes; `name` is the unknown it speaks of, if it does."""

    spans: tuple[Span, ...]
    points: tuple[str, ...] = ()
    holes: tuple[str, ...] = ()
    name: str = ""


_LINE = Region((Span("-\\infty", "\\infty", False, False),))


def speaks_of_regions(text: str) -> bool:
    """Whether `text` holds a sign that only regions have; a bare (1,2) may be a point as well."""
    return _MARKS.search(text) is not None


def has_inequality(text: str) -> bool:
    return _SIGNS.search(text) is not None


def region(text: str) -> Region | None:
    """The region that a normalised text describes, its spans joined where they touch; None when it is none."""
    found = _read(text)
    return None if found is None else _joined(found)


def _read(text: str) -> Region | None:
    if text == "\\mathbb{R}":
        return _LINE
    if text == "\\emptyset":
        return Region(())
    unions, differences, both = split(text, "\\cup"), split(text, "\\setminus"), split(text, "\\land")
    if text.startswith("\\mathbb{R}-\\{"):
        differences = ["\\mathbb{R}", text.removeprefix("\\mathbb{R}-")]
    if len(both) > 1:
        return _intersection([_read(part) for part in both])
    if listed(text):
        first, *rest = listed(text)
        name = re.match(r"[a-z]\\neq", first)  # x\neq 2,3
        parts = [_read(first), *(_read(part if has_inequality(part) or not name else name[0] + part) for part in rest)]
        return _intersection(parts) if any(part and part.holes for part in parts) else _union(parts)
    member = re.match(r"([a-z])\\in ?", text)
    if member:
        return _read(text[member.end() :])
    if len(unions) > 1:
        return _union([_read(part) for part in unions])
    if len(differences) == 2:
        base, holes = _read(differences[0]), bracket(differences[1])
        return replace(base, holes=base.holes + _signed(holes.items)) if base and holes and holes.is_set else None
    if has_inequality(text) and not bracket(text):
        return _inequality(text)
    return _bracketed(text)


def _bracketed(text: str) -> Region | None:
    """An interval, a set of points, or `\\{x \\mid x>3\\}`."""
    found = bracket(text)
    if found is None:
        return None
    if found.is_set:
        for bar in ("|", ":"):
            head, *rest = split(text[2:-2], bar)
            if rest and _BUILDER.fullmatch(head):
                return _read(bar.join(rest))
        return None if has_inequality(text) else Region((), points=found.items)
    if len(found.items) != 2 or found.opening not in "([" or found.closing not in ")]":
        return None
    return Region((Span(*found.items, found.opening == "[", found.closing == "]"),))


def _inequality(text: str) -> Region | None:
    r"""`2>x\geq1`, `x<3`, `x\neq\pm1`, `|x|<2`."""
    sides, signs = [side.strip() for side in _SIGNS.split(text)], _SIGNS.findall(text)
    if not all(sides) or len(signs) > 2:
        return None
    if signs == ["\\neq"]:
        return replace(_LINE, holes=_signed((sides[1],)), name=sides[0]) if is_variable(sides[0]) else None
    if signs[0] in (">", "\\geq"):
        sides, signs = sides[::-1], [_MIRRORED.get(sign, sign) for sign in reversed(signs)]
    if not set(signs) <= {"<", "\\leq"}:
        return None
    absolute = re.fullmatch(r"\|([a-z])\|(.+)|(.+)\|([a-z])\|", "".join(sides) if len(signs) == 1 else "")
    if absolute and (number(absolute[2] or absolute[3]) or 0) > 0:
        bound, name = absolute[2] or absolute[3], absolute[1] or absolute[4]
        if absolute[2]:  # |x|<2
            return Region((Span(f"-{bound}", bound, signs[0] == "\\leq", signs[0] == "\\leq"),), name=name)
        ends = (
            Span("-\\infty", f"-{bound}", False, signs[0] == "\\leq"),
            Span(bound, "\\infty", signs[0] == "\\leq", False),
        )
        return Region(ends, name=name)  # |x|>2
    elif len(signs) == 1 and is_variable(sides[0]):  # x<2
        sides, signs = ["-\\infty", *sides], ["<", *signs]
    elif len(signs) == 1:  # 1<x
        sides, signs = [*sides, "\\infty"], [*signs, "<"]
    if not is_variable(sides[1]):
        return None
    return Region((Span(sides[0], sides[2], signs[0] == "\\leq", signs[1] == "\\leq"),), name=sides[1])


def _signed(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        sign + value.removeprefix("\\pm") for value in values for sign in (("", "-") if "\\pm" in value else ("",))
    )


def _common_name(parts: list[Region | None]) -> tuple[list[Region], str] | None:
    """The parts and the one unknown they speak of; None when one is no region or they speak of several."""
    regions = [part for part in parts if part is not None]
    names = {part.name for part in regions if part.name}
    return (regions, "".join(names)) if len(regions) == len(parts) and len(names) < 2 else None


def _union(parts: list[Region | None]) -> Region | None:
    found = _common_name(parts)
    if found is None or any(part.holes for part in found[0]):
        return None
    regions, name = found
    return Region(
        tuple(span for part in regions for span in part.spans),
        tuple(point for part in regions for point in part.points),
        name=name,
    )


def _intersection(parts: list[Region | None]) -> Region | None:
    """Of regions of one span each: `x>1` and `x<2` and `x\\neq\\frac32`. Two lower ends are not worth the code."""
    found = _common_name(parts)
    if found is None or any(len(part.spans) != 1 or part.points for part in found[0]):
        return None
    lows = {(span.low, span.has_low) for part in found[0] for span in part.spans} - {("-\\infty", False)}
    highs = {(span.high, span.has_high) for part in found[0] for span in part.spans} - {("\\infty", False)}
    if len(lows) > 1 or len(highs) > 1:
        return None
    (low, has_low), (high, has_high) = (*lows, ("-\\infty", False))[0], (*highs, ("\\infty", False))[0]
    holes = tuple(hole for part in found[0] for hole in part.holes)
    return Region((Span(low, high, has_low, has_high),), (), holes, found[1])


def _joined(found: Region) -> Region:
    """Spans that touch become one, with a hole where both leave their common end out: (1,2)\\cup(2,3) is (1,3)
    without 2.
    """
    spans, holes = list(found.spans), list(found.holes)
    points = {_key(point): point for point in found.points}
    for _ in range(len(spans)):
        pair = next(((p, q) for p in spans for q in spans if p is not q and _key(p.high) == _key(q.low)), None)
        if pair is None:
            break
        left, right = pair
        spans.remove(left)
        spans.remove(right)
        spans.append(Span(left.low, right.high, left.has_low, right.has_high))
        if not left.has_high and not right.has_low and not points.pop(_key(left.high), None):
            holes.append(left.high)
    return Region(tuple(spans), tuple(points.values()), tuple(holes), found.name)


def _key(end: str) -> object:
    text = normalize(end)
    value = number(text)
    return text if value is None else value
