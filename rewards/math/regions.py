r"""Sets of real numbers: intervals, unions, inequalities in one unknown, and excluded points.

`x\neq0`, `\mathbb{R}\setminus\{0\}`, `(-\infty,0)\cup(0,\infty)` and `x<0 or x>0` become the same Region: the real line
with a hole at 0. Endpoints stay text, which compare.py compares.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from .exact import number, value_or_text
from .parts import both_signs, bracket, is_variable, listed, split

SIGNS = re.compile(r"\\leq|\\geq|\\neq|<|>")
MARKS = re.compile(SIGNS.pattern + r"|\\cup|\\setminus|\\mathbb\{R\}")  # only in regions; (1,2) may be a point
_MIRRORED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_BUILDER = re.compile(r"\\\{[a-z](?:\\in ?\\mathbb\{R\})?[|:](.*)\\\}|[a-z]\\in ?([^<>]*)")


class Span(NamedTuple):
    """Interval: its endpoints as text, and whether they belong to it."""

    low: str
    high: str
    has_low: bool
    has_high: bool


class Region(NamedTuple):
    """Union of spans and single points, minus the holes. `name` is its unknown, "" if there is none."""

    spans: tuple[Span, ...]
    points: tuple[str, ...] = ()
    holes: tuple[str, ...] = ()
    name: str = ""


_LINE = Region((Span("-\\infty", "\\infty", False, False),))


@lru_cache(maxsize=4096)
def region(text: str) -> Region | None:
    """Parse a region from normalised text, with touching spans joined; None if it is not a region."""
    if text in ("\\mathbb{R}", "\\emptyset"):
        return _LINE if text == "\\mathbb{R}" else Region(())
    both, items, unions = split(text, "\\land"), listed(text), split(text, "\\cup")
    if len(both) > 1:
        return _combine(both, union=False)
    if items:
        name = re.match(r"[a-z]\\neq", items[0])  # x\neq 2,3
        texts = [item if SIGNS.search(item) or not name else name[0] + item for item in items]
        return _combine(texts, union="\\neq" not in text)
    if len(unions) > 1:
        return _combine(unions, union=True)
    base, *without = split(text.replace("\\mathbb{R}-", "\\mathbb{R}\\setminus"), "\\setminus")
    if without:
        whole, holes = region(base), bracket(without[0])
        return whole._replace(holes=whole.holes + holes.items) if whole and holes and holes.is_set else None
    built = _BUILDER.fullmatch(text)
    if built:
        return region(built[1] or built[2])
    group = bracket(text)
    if group is None:
        return _inequality(text) if SIGNS.search(text) else None
    if group.is_set:
        return None if SIGNS.search(text) else Region((), points=group.items)
    if len(group.items) != 2 or group.opening not in "([" or group.closing not in ")]":
        return None
    return Region((Span(*group.items, group.opening == "[", group.closing == "]"),))


def _inequality(text: str) -> Region | None:
    r"""Parse an inequality: `2>x\geq1`, `x<3`, `x\neq\pm1`, `|x|<2`."""
    sides, signs = [side.strip() for side in SIGNS.split(text)], SIGNS.findall(text)
    if signs == ["\\neq"] and is_variable(sides[0]):
        return _LINE._replace(holes=tuple(both_signs(sides[1])), name=sides[0])
    if signs[0] in (">", "\\geq"):
        sides, signs = sides[::-1], [_MIRRORED.get(sign, sign) for sign in reversed(signs)]
    if not all(sides) or len(signs) > 2 or not set(signs) <= {"<", "\\leq"}:
        return None
    closed = [sign == "\\leq" for sign in signs]
    absolute = re.fullmatch(r"\|([a-z])\|,(.+)|(.+),\|([a-z])\|", ",".join(sides) if len(signs) == 1 else "")
    bound, end = absolute and (absolute[2] or absolute[3]), closed[0]
    if absolute and bound and (number(bound) or 0) > 0:
        outside = Span("-\\infty", f"-{bound}", False, end), Span(bound, "\\infty", end, False)  # |x|>2
        return Region(
            (Span(f"-{bound}", bound, end, end),) if absolute[1] else outside, name=absolute[1] or absolute[4]
        )
    if len(signs) == 1:  # x<2 or 1<x
        below = is_variable(sides[0])
        sides, closed = (["-\\infty", *sides], [False, *closed]) if below else ([*sides, "\\infty"], [*closed, False])
    return Region((Span(sides[0], sides[2], closed[0], closed[1]),), name=sides[1]) if is_variable(sides[1]) else None


def _combine(texts: list[str] | tuple[str, ...], *, union: bool) -> Region | None:
    """Return the union of regions in one unknown, or their intersection if it has one lower and one upper endpoint.

    Returns None for other texts.
    """
    regions = [part for part in map(region, texts) if part]
    names = {part.name for part in regions if part.name}
    spans = [span for part in regions for span in part.spans]
    points = [point for part in regions for point in part.points]
    holes = [hole for part in regions for hole in part.holes]
    if len(regions) != len(texts) or len(names) > 1 or (holes if union else points):
        return None
    if not union:
        lows = {(span.low, span.has_low) for span in spans} - {("-\\infty", False)} or {("-\\infty", False)}
        highs = {(span.high, span.has_high) for span in spans} - {("\\infty", False)} or {("\\infty", False)}
        if len(lows) > 1 or len(highs) > 1 or any(len(part.spans) != 1 for part in regions):
            return None
        ((low, has_low),), ((high, has_high),) = lows, highs
        spans = [Span(low, high, has_low, has_high)]
    return _join_spans(Region(tuple(spans), tuple(points), tuple(holes), "".join(names)))


def _join_spans(area: Region) -> Region:
    """Join touching spans, with a hole at an endpoint that both exclude: (1,2) and (2,3) have a hole at 2."""
    spans, holes, points = list(area.spans), list(area.holes), {value_or_text(point): point for point in area.points}
    for _ in area.spans:
        pair = next(
            ((p, q) for p in spans for q in spans if p is not q and value_or_text(p.high) == value_or_text(q.low)), None
        )
        if pair is None:
            break
        left, right = pair
        spans = [span for span in spans if span is not left and span is not right]
        spans.append(Span(left.low, right.high, left.has_low, right.has_high))
        if not left.has_high and not right.has_low and not points.pop(value_or_text(left.high), None):
            holes.append(left.high)
    return area._replace(spans=tuple(spans), points=tuple(points.values()), holes=tuple(holes))
