r"""What is said of what: `name = link = value`, and which names name the same thing.

`x=\frac{10}{2}=5` has the name x, the link \frac{10}{2} and the value 5; `17=42` has no name; `2x=10` is still to be
solved. Pure string code on normalised text; which statements are paid is compare.py's business.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from .normalize import FUNCTIONS
from .parts import bracket, listed, split

_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|nu|phi|varphi|psi|omega|rho|sigma|tau|epsilon|Delta|Omega|ell)"
_DRESSED = r"\\(?:vec|bar|hat|tilde|dot|overline|overrightarrow|mathbb|mathcal)\{[A-Za-z]+\}"
_LETTER = (
    rf"(?:[A-Za-z]|{_GREEK}|{_DRESSED})(?:'|_\{{[^{{}}]*(?:\{{[^{{}}]*\}})?\}}|\^\{{(?:-1|T|c|\\prime|\(\w+\))\}})*+"
)
_ARGUMENT = r"\((?:[^()]|\([^()]*\))*+\)|\[[^\[\]]*+\]"
_D = r"\{(?:d|\\partial)[^{}]*(?:\{\d\})?[^{}]*\}"
_OF_UNKNOWNS = "|".join(sorted(FUNCTIONS - {"log", "ln", "exp", "lg"}))
_NAME = re.compile(
    rf"{_LETTER}(?:{_ARGUMENT})?"  # x, a_{10}, f'(2), P(X=7), E[X], A^{-1}
    rf"|\\frac{_D}{_D}(?:\(\w\)|\w(?:\(\w\))?)?"  # \frac{dy}{dx}
    rf"|(?:m?\\angle|\\triangle|\\(?:{_OF_UNKNOWNS}))(?:\^\{{\d\}})? ?\(?(?:{_LETTER}|[,+-])++\)?"  # \sin\theta
    rf"|{_LETTER}(?:\\(?:cup|cap|setminus|times) ?{_LETTER})++"  # A\cup B
    rf"|\({_LETTER}\\circ ?{_LETTER}\)(?:{_ARGUMENT})?"  # (f\circ g)(x)
    r"|\[[A-Z]{3,}\]|\|(?:[A-Z]+|z|w|\\(?:vec|overline)\{\w+\})\|"  # [ABC], |AB|
)
_WORDS = re.compile(rf"(?:\\text\{{[^{{}}]*\}}|{_LETTER}|\\(?:triangle|angle)|[A-Z ]|\((?:\w|,)*\))++")
_DENIAL = re.compile(r"n't\b|\b(?:not?|never|neither|nor|wrong|less|more|than|most|least|about|roughly|nearly|false)\b")
_VARIABLE = re.compile(rf"(?:[a-zA-Z]|{_GREEK})(?:_\{{\w+\}}|\([a-z]\))?")
_NAMED_TUPLE = re.compile(rf"\(({_LETTER}(?:,{_LETTER})+)\)")
_RECIPROCAL = re.compile(r"[a-z](?:_\{\w+\})?\^\{-1\}")
_DERIVATIVE = re.compile(
    r"\\frac\{(?:d|\\partial)(?:\^\{(\d)\})?(\w)(?:\(\w\))?\}\{(?:d|\\partial)(\w)(?:\^\{\1\})?\}|\\dot\{(\w)\}"
)
_SIMPLE = re.compile(rf"({_GREEK}|[A-Za-z])((?:'|\^\{{\\prime\}})*)((?:_\{{[^{{}}]*\}})?)(?:\((.*)\))?")
_CONSTANTS = frozenset(("e", "i", "\\pi", "\\infty", "\\emptyset"))
_NEIGHBOURS = ("xyz", "abcd", "pqr", "mn", "uvw", "st", "kl", "rs")
_ANGLES = frozenset(("\\theta", "\\phi", "\\varphi"))


@dataclass(frozen=True, slots=True)
class Statement:
    """See the head of this file. `solved`: no side holds the unknown that the statement is about."""

    names: tuple[str, ...]
    links: tuple[str, ...]
    value: str
    modulus: str
    solved: bool

    @property
    def is_curve(self) -> bool:
        """Whether it is an equation that may be written in other forms, rather than the value of an unknown."""
        if not self.names or not self.solved or is_curve_side(self.names[0]):
            return True
        others = unknowns(self.value) - unknowns(self.names[0])
        return re.fullmatch(r"[xyz](?:\([a-z]\))?", self.names[0]) is not None and bool(others)


@lru_cache(maxsize=4096)
def statement(text: str) -> Statement | None:
    """`text` as a statement; None for a bare value or a list."""
    modulus = re.search(r"\\pmod\{([^{}]+)\}$", text)
    body = (text[: modulus.start()] if modulus else text).replace("\\equiv", "=")
    if ("=" not in body and "\\in" not in body and not modulus) or listed(body):
        return None
    sides = split(body, "=")
    if len(sides) == 1:
        member = split(body, "\\in")
        sides = member if len(member) == 2 and (is_variable(member[0]) or tuple_names(member[0])) else sides
    if (len(sides) == 1 and not modulus) or not all(sides):
        return None
    if len(sides) == 2 and is_variable(sides[1]) and not is_name(sides[0]):  # 5=x
        sides.reverse()
    names = []
    while len(sides) > 1 and is_name(sides[0]):
        names.append(sides.pop(0))
    unknown = names[0] if names and is_variable(names[0]) and "(" not in names[0] else None
    solved = unknown is None or not any(unknown in unknowns(side) for side in sides)
    return Statement(tuple(names), tuple(sides[:-1]), sides[-1], modulus[1] if modulus else "", solved)


def is_variable(text: str) -> bool:
    return text not in _CONSTANTS and _VARIABLE.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether `text` names what is asked for (x, f(2), AB, m+n, angle ABC, "the area") rather than claiming a value.

    A multiple, a power or a product of one unknown is no name: 2x=42 is still to be solved.
    """
    if not text or text in _CONSTANTS or text[0] in "+-*/" or _RECIPROCAL.fullmatch(text):
        return False
    if "\\text" in text:
        return _WORDS.fullmatch(text) is not None and not _DENIAL.search(text.lower())
    if _NAME.fullmatch(text) or _NAMED_TUPLE.fullmatch(text):
        return True  # else a combination of at least two unknowns: m+n, xy, 100m+n, a:b, AB^2
    return len(unknowns(text)) > 1 and not re.search(r"[=<>,!]|\\(?!frac|sqrt|cdot|pi)|\(.*\(", text)


def is_curve_side(name: str) -> bool:
    """`x+y` of x+y=5, which is a line, not a name for 5; `m+n` and `AB` name what was asked for."""
    return not _NAME.fullmatch(name) and not tuple_names(name) and len(unknowns(name) & set("xyz")) > 1


@lru_cache(maxsize=4096)
def unknowns(text: str) -> frozenset[str]:
    """The letters of an expression, Greek ones included, commands and words and e, i, \\pi aside."""
    latin = re.sub(r"\\text\{[^{}]*\}|\\begin\{\w*\}|\\end\{\w*\}|\\[a-zA-Z]+", " ", text)
    return frozenset([*re.findall(_GREEK + "(?![a-z])", text), *re.findall("[a-zA-Z]", latin)]) - _CONSTANTS


@lru_cache(maxsize=4096)
def _canonical(name: str) -> tuple[str, int, str]:
    """(base, order of the derivative, argument): f'(2) is (f, 1, 2); y, y(x) are (y, 0, "")."""
    derivative, simple = _DERIVATIVE.fullmatch(name), _SIMPLE.fullmatch(name)
    if derivative:
        base, variable = derivative[2] or derivative[4], derivative[3] or "t"
        return base, int(derivative[1] or 1), "" if variable in "xt" else f"/{variable}"
    if not simple:
        return name.replace(" ", ""), 0, ""
    order = simple[2].count("'") + simple[2].count("p")
    return simple[1] + simple[3], order, re.sub("^[a-z]$", "", simple[4] or "")


def same_name(first: str, second: str) -> bool:
    """Whether two names may name one thing: words go with anything, y(x) with y, f(x) with y, but y' never with y."""
    if "\\text" in first or "\\text" in second:
        return True
    if tuple_names(first) and tuple_names(second):
        return set(tuple_names(first)) == set(tuple_names(second))
    (p, order, argument), (q, other, at) = _canonical(first), _canonical(second)
    return order == other and argument == at and (p == q or ("y" in (p, q) and {p, q} <= set("yfgh")))


def tuple_names(name: str) -> tuple[str, ...]:
    """`(x,y)` as (x, y); () for any other name."""
    match = _NAMED_TUPLE.fullmatch(name)
    return tuple(match[1].split(",")) if match else ()


def in_name_order(names: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
    """Values in the order in which a tuple gives them: by the names where these are neighbours (x, y, z; a, b; x_1,
    x_2), r before an angle, else as they stand.
    """
    bases = {name[0].lower() for name in names}
    family = any(bases <= set(row) for row in _NEIGHBOURS) or (len(bases) == 1 and "\\" not in bases)
    if not family and not ("r" in names and _ANGLES.intersection(names)):
        return values
    order = sorted(range(len(names)), key=lambda index: (names[index][0] == "\\", len(names[index]), names[index]))
    return tuple(values[index] for index in order)


def assigned(items: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names, values) of `x=1, y=2`, the values in the order of the names; names () unless each item has its own."""
    found = [statement(item) for item in items]
    named = [part if part and len(part.names) == 1 and not part.links and part.solved else None for part in found]
    names = tuple(part.names[0] for part in named if part)
    values = tuple(part.value if part else item for part, item in zip(named, items, strict=True))
    return (names, in_name_order(names, values)) if len(set(names)) == len(items) else ((), values)


def ordered_value(found: Statement) -> str:
    """The value, a named tuple's in the order of its names: (y,x)=(1,2) says (2,1)."""
    names, values = tuple_names(found.names[0]) if found.names else (), bracket(found.value)
    if not names or values is None or len(values.items) != len(names):
        return found.value
    return f"{values.opening}{','.join(in_name_order(names, values.items))}{values.closing}"
