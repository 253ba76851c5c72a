r"""Take a normalised answer apart: brackets, lists, environments, and what is said of what (`name = link = value`).

Pure string code without judgement: what may equal what is compare.py's business.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from .exact import number
from .guards import MAX_ITEMS, TooLarge
from .normalize import FUNCTIONS, ROW
from .units import split_unit

# ---------------------------------------------------------------------------------------------------------- brackets


def split(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside all brackets."""
    if separator not in text:
        return [text]
    pieces, depth, last, index = [], 0, 0, 0
    while index < len(text):
        if depth == 0 and text.startswith(separator, index) and not _is_other_sign(text, separator, index):
            pieces.append(text[last:index])
            index += len(separator)
            last = index
            continue
        char = text[index]
        if char == "\\" and not text.startswith(("\\{", "\\}"), index):
            depth += text.startswith("\\langle", index) - text.startswith("\\rangle", index)
            depth += text.startswith("\\begin", index) - text.startswith("\\end", index)
            index += 1
        elif char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        index += 1
    return [piece.strip() for piece in [*pieces, text[last:]]]


def _is_other_sign(text: str, separator: str, index: int) -> bool:
    r"""`<=` is no equality, nor is `!=` but after a number: 7!=5040. `\in` is not the head of `\infty`."""
    if separator == "=":
        before = text[index - 1 : index]
        return before in ("<", ">") or (before == "!" and not re.search(r"[\d)}]!$", text[max(0, index - 2) : index]))
    return separator[-1].isalpha() and text[index + len(separator) : index + len(separator) + 1].isalpha()


@dataclass(frozen=True, slots=True)
class Bracket:
    """Items between one pair of brackets that encloses the whole; the brackets of an interval may differ."""

    opening: str
    items: tuple[str, ...]
    closing: str

    @property
    def is_set(self) -> bool:
        return self.opening == "\\{"

    @property
    def is_round(self) -> bool:
        return self.opening in ("(", "\\langle") and self.closing in (")", "\\rangle")


@lru_cache(maxsize=4096)
def bracket(text: str) -> Bracket | None:
    opening = next((mark for mark in ("\\{", "\\langle", "(", "[") if text.startswith(mark)), "")
    closing = next((mark for mark in ("\\}", "\\rangle", ")", "]") if text.endswith(mark)), "")
    if not opening or not closing or (opening == "\\{") != (closing == "\\}"):
        return None
    inner = text[len(opening) : -len(closing)]
    depth = 0
    for char in inner:
        depth += (char in "({[") - (char in ")}]")
        if depth < 0:
            return None
    if depth:
        return None
    items = split(inner, ",")
    if len(items) == 1 and ";" in inner:
        items = split(inner, ";")
    return Bracket(opening, _few(items), closing)


@lru_cache(maxsize=4096)
def listed(text: str) -> tuple[str, ...]:
    """The items of a bare list, () when `text` is none: 1,000 and n=1,000 and $32,348 are one value."""
    if "," not in text and ";" not in text:
        return ()
    if ";" not in text and all(
        "," not in side or number(split_unit(side).core) is not None for side in split(text, "=")
    ):
        return ()
    items = split(text, ",")
    if len(items) == 1:
        items = split(text, ";")
    found = tuple(item for item in _few(items) if item)
    return found if len(found) > 1 else ()


def _few(items: list[str]) -> tuple[str, ...]:
    if len(items) > MAX_ITEMS:
        raise TooLarge
    return tuple(items)


# ------------------------------------------------------------------------------------------------------ environments

_ENVIRONMENT = re.compile(r"(?:\\\{)?\\begin\{([a-zA-Z]*)\*?\}(?:\{[lcr|]*\})?(.*)\\end\{\1\*?\}", re.DOTALL)
_MATRICES = frozenset("pmatrix bmatrix matrix array Bmatrix smallmatrix".split())
_STACKS = frozenset("cases aligned align gathered split array".split())


def unstacked(text: str) -> str:
    """Equations written under each other (cases, aligned, array) as a bare list; anything else as it is."""
    match = _ENVIRONMENT.fullmatch(text) if "\\begin" in text else None
    if not match or match[1] not in _STACKS or (match[1] == "array" and not text.startswith("\\{")):
        return text
    rows = [re.sub(r"&(?==)|(?<==)&|^&", "", row.strip()).strip(" ,") for row in match[2].split(ROW) if row.strip()]
    return text if any("&" in row for row in rows) else ",".join(rows)


def rows_of(text: str, kinds: frozenset[str] = _MATRICES) -> tuple[tuple[str, ...], ...]:
    """The entries of a matrix, () when `text` is none; a determinant is a number, not a matrix."""
    match = _ENVIRONMENT.fullmatch(text.strip("()[]")) if "\\begin" in text else None
    if not match or match[1] not in kinds:
        return ()
    rows = tuple(tuple(entry.strip() for entry in row.split("&")) for row in match[2].split(ROW) if row.strip())
    _few([entry for row in rows for entry in row])
    return rows


_CONDITION_WORDS = re.compile(r"\\text\{(?:if|for|when|where|as)\b\s*([^{}]*)\}")


def pieces_of(text: str) -> tuple[tuple[str, str], ...]:
    """(value, condition) of each row of a function given by cases, () when `text` is none."""
    rows = rows_of(text, frozenset(("cases", "array")))
    if not rows or any(len(row) != 2 for row in rows):
        return ()
    return tuple((value.strip(" ,"), _CONDITION_WORDS.sub(r"\1", condition).strip(" ,.")) for value, condition in rows)


_INTEGER = re.compile(r"(.+?)(?:,|\\text\{[^{}]*\}|\()+([a-z])\\in ?\\mathbb\{([ZN])\}\)?", re.DOTALL)


def without_conditions(a: str, g: str) -> tuple[str, str]:
    """Both without their last "k an integer", the answer's k under the gold's name: k\\pi for n\\pi, n an integer."""
    x, y = _INTEGER.fullmatch(a), _INTEGER.fullmatch(g)
    if x and y and x[3] == y[3] and not re.search(rf"(?<![a-zA-Z]){y[2]}(?![a-zA-Z])", x[1]):
        return re.sub(rf"(?<![a-zA-Z]){x[2]}(?![a-zA-Z])", y[2], x[1]), y[1]
    if x and y and (x[2], x[3]) != (y[2], y[3]):
        return a, g
    return x[1] if x else a, y[1] if y else g


# -------------------------------------------------------------------------------------------------------- statements

_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|nu|phi|varphi|psi|omega|rho|sigma|tau|epsilon|Delta|Omega|ell)"
_DRESSED = r"\\(?:vec|bar|hat|tilde|dot|overline|overrightarrow|mathbb|mathcal)\{[A-Za-z]+\}"
_SUFFIXES = r"(?:'|_\{[^{}]*(?:\{[^{}]*\})?\}|\^\{(?:-1|T|c|\\prime|\(\w+\))\})*+"
_LETTER = rf"(?:[A-Za-z]|{_GREEK}|{_DRESSED}){_SUFFIXES}"
_ARGUMENT = r"\((?:[^()]|\([^()]*\))*+\)|\[[^\[\]]*+\]"
_VARIABLE = re.compile(rf"(?:[a-zA-Z]|{_GREEK})(?:_\{{\w+\}}|\([a-z]\))?")
_DERIVATIVE = re.compile(
    r"\\frac\{(?:d|\\partial)(?:\^\{(\d)\})?(\w)(?:\(\w\))?\}\{(?:d|\\partial)(\w)(?:\^\{\1\})?\}|\\dot\{(\w)\}"
)
_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|" + _LETTER + r"|\\(?:triangle|angle)|[A-Z ]|\((?:\w|,)*\))++")
_OF_UNKNOWNS = "|".join(sorted(FUNCTIONS - {"log", "ln", "exp", "lg"}))
_NAME = re.compile(
    rf"{_LETTER}(?:{_ARGUMENT})?"  # x, a_{{10}}, f'(2), P(X=7), E[X], A^{{-1}}
    r"|\\frac\{(?:d|\\partial)[^{}]*(?:\{\d\})?[^{}]*\}\{(?:d|\\partial)[^{}]*(?:\{\d\})?\}(?:\(\w\)|\w(?:\(\w\))?)?"
    rf"|(?:m?\\angle|\\triangle|\\(?:{_OF_UNKNOWNS}))(?:\^\{{\d\}})? ?\(?(?:{_LETTER}|[,+-])++\)?"  # \sin\theta
    rf"|{_LETTER}(?:\\(?:cup|cap|setminus|times) ?{_LETTER})++"  # A\cup B
    rf"|\({_LETTER}\\circ ?{_LETTER}\)(?:{_ARGUMENT})?"  # (f\circ g)(x)
    r"|\[[A-Z]{3,}\]|\|(?:[A-Z]+|z|w|\\(?:vec|overline)\{\w+\})\|"  # [ABC], |AB|
)
_RECIPROCAL = re.compile(r"[a-z](?:_\{\w+\})?\^\{-1\}")
_DENIAL = re.compile(r"n't\b|\b(?:not?|never|neither|nor|wrong|less|more|than|most|least|about|roughly|nearly|false)\b")
_NAMED_TUPLE = re.compile(rf"\(({_LETTER}(?:,{_LETTER})+)\)")
_NEIGHBOURS = ("xyz", "abcd", "pqr", "mn", "uvw", "st", "kl", "rs")
_CONSTANTS = frozenset(("e", "i", "\\pi", "\\infty", "\\emptyset"))


@dataclass(frozen=True, slots=True)
class Statement:
    r"""What an answer says: names = links = value, perhaps modulo something.

    `x=\frac{10}{2}=5` has the name x, the link \frac{10}{2} and the value 5; `17=42` has no name. `solved`: the value
    does not hold the unknown that it is the value of.
    """

    names: tuple[str, ...]
    links: tuple[str, ...]
    value: str
    modulus: str
    solved: bool

    @property
    def is_curve(self) -> bool:
        """Whether it is an equation that may be written in other forms, rather than the value of an unknown."""
        if not self.names or not self.solved:
            return True
        others = unknowns(self.value) - unknowns(self.names[0])
        name = self.names[0]
        return is_curve_side(name) or (re.fullmatch(r"[xyz](?:\([a-z]\))?", name) is not None and bool(others))


@lru_cache(maxsize=4096)
def statement(text: str) -> Statement | None:
    r"""`text` as a statement; None for a bare value or a list."""
    modulus = re.search(r"\\pmod\{([^{}]+)\}$", text)
    body = text[: modulus.start()] if modulus else text
    body = body.replace("\\equiv", "=") if "\\equiv" in body else body
    if "=" not in body and "\\in" not in body and not modulus or listed(body):
        return None
    sides = split(body, "=")
    if len(sides) == 1:
        member = split(body, "\\in")
        named = len(member) == 2 and (_VARIABLE.fullmatch(member[0]) or _NAMED_TUPLE.fullmatch(member[0]))
        sides = member if named else sides
    if (len(sides) == 1 and not modulus) or not all(sides):
        return None
    if len(sides) == 2 and is_variable(sides[1]) and not is_name(sides[0]):  # 5=x
        sides.reverse()
    names = []
    while len(sides) > 1 and is_name(sides[0]):
        names.append(sides.pop(0))
    unknown = base_of(names[0]) if names else ""
    solved = not (len(unknown) == 1 and any(unknown in unknowns(side) for side in sides))
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
    return bool(_NAME.fullmatch(text) or _NAMED_TUPLE.fullmatch(text)) or _is_combination(text)


def _is_combination(text: str) -> bool:
    """`m+n`, `xy`, `100m+n`, `a:b`: of at least two unknowns."""
    return len(unknowns(text)) > 1 and not re.search(r"[=<>,!]|\\(?!frac|sqrt|cdot|pi)|\(.*\(", text)


def is_curve_side(name: str) -> bool:
    """`x+y` of x+y=5, which is a line, not a name for 5; `m+n` and `AB` name what was asked for."""
    return not _NAME.fullmatch(name) and not _NAMED_TUPLE.fullmatch(name) and len(unknowns(name) & set("xyz")) > 1


@lru_cache(maxsize=4096)
def unknowns(text: str) -> frozenset[str]:
    """The letters of an expression, Greek ones included, commands and words and e, i, \\pi aside."""
    greek = re.findall(_GREEK + "(?![a-z])", text)
    latin = re.sub(r"\\text\{[^{}]*\}|\\begin\{\w*\}|\\end\{\w*\}|\\[a-zA-Z]+", " ", text)
    return frozenset([*greek, *re.findall("[a-zA-Z]", latin)]) - _CONSTANTS


@lru_cache(maxsize=4096)
def _canonical(name: str) -> tuple[str, int, str]:
    """(base, order of the derivative, argument): f'(2) is (f, 1, 2); y, y(x) are (y, 0, "")."""
    derivative = _DERIVATIVE.fullmatch(name)
    if derivative:
        if derivative[4]:
            return derivative[4], 1, ""
        variable = derivative[3]
        return derivative[2], int(derivative[1] or 1), "" if variable in "xt" else f"/{variable}"
    match = re.fullmatch(rf"({_GREEK}|[A-Za-z])((?:'|\^\{{\\prime\}})*)((?:_\{{[^{{}}]*\}})?)(?:\((.*)\))?", name)
    if not match:
        return name.replace(" ", ""), 0, ""
    argument = "" if match[4] is None or re.fullmatch("[a-z]", match[4]) else match[4]
    return match[1] + match[3], match[2].count("'") + match[2].count("p"), argument


def base_of(name: str) -> str:
    """The letter that a simple name names: x, and y of y' or y(x); the text itself otherwise."""
    return "" if re.fullmatch(r".*\([a-z]\)|.*'.*|\\frac.*", name) else _canonical(name)[0]


def same_name(first: str, second: str) -> bool:
    """Whether two names may name one thing: words go with anything, y(x) with y, f(x) with y, but y' never with y."""
    if "\\text" in first or "\\text" in second:
        return True
    (p, order, argument), (q, other, at) = _canonical(first), _canonical(second)
    functions = {"y", "f", "g", "h"}
    return order == other and argument == at and (p == q or ("y" in (p, q) and {p, q} <= functions))


def tuple_names(name: str) -> tuple[str, ...]:
    """`(x,y)` as (x, y); () for any other name."""
    match = _NAMED_TUPLE.fullmatch(name)
    return tuple(match[1].split(",")) if match else ()


def in_name_order(names: tuple[str, ...], values: list[str]) -> list[str]:
    """Values in the order in which a tuple gives them: by the names where these are neighbours (x, y, z; a, b; x_1,
    x_2), r before an angle, else as they stand.
    """
    bases = {name[0].lower() for name in names}
    family = any(bases <= set(row) for row in _NEIGHBOURS) or (len(bases) == 1 and "\\" not in bases)
    if not family and not ("r" in names and any(name in ("\\theta", "\\phi", "\\varphi") for name in names)):
        return values
    order = sorted(
        range(len(names)), key=lambda index: (names[index].startswith("\\"), len(names[index]), names[index])
    )
    return [values[index] for index in order]
