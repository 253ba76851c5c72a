r"""Structure of a normalised answer: bare lists, brackets, environments, conditions and statements.

`x=\frac{10}{2}=5` has the name x, the link \frac{10}{2} and the value 5. `17=42` has no name. `2x=10` is unsolved. All
functions work on strings. compare.py compares the parts.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .exact import number
from .guards import MAX_ITEMS, TooLarge
from .normalize import FUNCTIONS, ROW, normalize
from .units import split_unit

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\?.", re.DOTALL)
_DEPTH = {
    "(": 1, "[": 1, "{": 1, "\\{": 1, "\\langle": 1, "\\begin": 1,
    ")": -1, "]": -1, "}": -1, "\\}": -1, "\\rangle": -1, "\\end": -1,
}  # fmt: skip
_PAIRS = {"\\{": ("\\}",), "\\langle": ("\\rangle",), "(": (")", "]"), "[": (")", "]")}
_MATRICES = frozenset("pmatrix bmatrix matrix array Bmatrix smallmatrix".split())
_STACKS = frozenset("cases aligned align gathered split array".split())
_ENVIRONMENT = re.compile(r"(?:\\\{)?\\begin\{([a-zA-Z]*)\*?\}(?:\{[lcr|]*\})?(.*)\\end\{\1\*?\}", re.DOTALL)
_CONDITION_WORDS = re.compile(r"\\text\{(?:if|for|when|where|as)\b\s*([^{}]*)\}")
_OPPOSITES = {"<": "\\geq", ">": "\\leq", "\\leq": ">", "\\geq": "<"}
_EITHER_SIGN = re.compile(r"\\([pm])[pm](?![a-zA-Z])")
_SIGNED_SUM = re.compile(r"(?:(?<=^)|(?<==))(-?\d+(?:\.\d+)?)([+-]\d+(?:\.\d+)?)$")
_INTEGER = re.compile(r"(.+?)(?:,|\\text\{[^{}]*\}|\()+([a-z])\\in ?\\mathbb\{([ZN])\}\)?", re.DOTALL)


class Group(NamedTuple):
    """Items inside one pair of brackets, or of a bare list (then without brackets)."""

    opening: str
    items: tuple[str, ...]
    closing: str

    @property
    def is_set(self) -> bool:
        return self.opening == "\\{"


def split(text: str, separator: str) -> list[str]:
    """Split at a separator outside all brackets."""
    if separator not in text:
        return [text]
    pieces, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += _DEPTH.get(token, 0)
        if token == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces]


@lru_cache(maxsize=4096)
def bracket(text: str) -> Group | None:
    """Parse a group in brackets that enclose the whole text; None if there is none. Interval brackets may differ."""
    opening = next((mark for mark in _PAIRS if text.startswith(mark)), "")
    closing = next((mark for mark in _PAIRS.get(opening, ()) if text.endswith(mark)), "")
    inner, depth = text[len(opening) : len(text) - len(closing)], 0
    for char in inner if closing else "}":
        depth += (char in "({[") - (char in ")}]")
        if depth < 0:
            return None
    return None if depth else Group(opening, _items(inner), closing)


@lru_cache(maxsize=4096)
def listed(text: str) -> tuple[str, ...]:
    """Return the items of a bare list; () for other text. 1,000 and n=1,000 and $32,348 are single values."""
    if ";" not in text and all("," not in p or number(split_unit(p).core) is not None for p in split(text, "=")):
        return ()
    items = tuple(item for item in _items(text) if item)
    return items if len(items) > 1 else ()


def _items(text: str) -> tuple[str, ...]:
    """Split at semicolons, whose items may be lists, else at commas. Raises TooLarge over MAX_ITEMS."""
    items = split(text, ";")
    items = items if len(items) > 1 else split(text, ",")
    if len(items) > MAX_ITEMS:
        raise TooLarge
    return tuple(items)


def group(text: str) -> Group | None:
    items = listed(text)
    return Group("", items, "") if items else bracket(text)


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    r"""Simplify: stacked equations to a bare list, `\pm x` to its two values, (5) and \{5\} to 5."""
    match = _ENVIRONMENT.fullmatch(text) if "\\begin" in text else None
    if match and match[1] in _STACKS and (match[1] != "array" or text.startswith("\\{") or "=" in text):
        rows = [re.sub(r"&(?==)|(?<==)&|^&", "", row.strip()).strip(" ,.") for row in match[2].split(ROW)]
        text = text if any("&" in row for row in rows) else ",".join(row for row in rows if row).replace(",=", "=")
    outer = bracket(text)
    if _EITHER_SIGN.search(text) and "\\neq" not in text:
        items = outer.items if outer and outer.is_set else listed(text) or (text,)
        signed = ",".join(signed for item in items for signed in both_signs(item))
        return plain(f"\\{{{signed}\\}}" if outer and outer.is_set else signed)
    if outer and len(outer.items) == 1 and outer.opening in ("(", "\\{") and outer.closing in (")", "\\}"):
        inner = outer.items[0]
        return text if re.match(r"[a-z](?:\\in|[|:])|[^<>=]*\\[lgn]eq|.*[<>]", inner) or not inner else plain(inner)
    return text


def both_signs(text: str) -> list[str]:
    """Return the values of `1\\pm2`: -1 and 3. Text without the sign is unchanged."""
    if not _EITHER_SIGN.search(text):
        return [text]
    first = "p" if "\\pm" in text else "m"  # \mp alone means the same
    marked = _EITHER_SIGN.sub(lambda m: "±" if m[1] == first else "∓", text)
    both = [marked.translate(str.maketrans("±∓", signs)).replace("{+", "{").removeprefix("+") for signs in ("+-", "-+")]
    return [_SIGNED_SUM.sub(lambda m: str(Fraction(m[1]) + Fraction(m[2])), normalize(item)) for item in both]


def without_conditions(a: str, g: str) -> tuple[str, str]:
    r"""Remove a final "k an integer" from both sides; rename the answer's k as in the gold: k\pi for n\pi."""
    x, y = _INTEGER.fullmatch(a), _INTEGER.fullmatch(g)
    if x and y and x[3] == y[3] and not re.search(rf"(?<![a-zA-Z]){y[2]}(?![a-zA-Z])", x[1]):
        return re.sub(rf"(?<![a-zA-Z]){x[2]}(?![a-zA-Z])", y[2], x[1]), y[1]
    if x and y and x.groups()[1:] != y.groups()[1:]:
        return a, g
    return x[1] if x else a, y[1] if y else g


def rows_of(text: str, kinds: frozenset[str] = _MATRICES) -> tuple[tuple[str, ...], ...]:
    """Return the entries of a matrix; () for other text. A determinant is a number, not a matrix."""
    match = _ENVIRONMENT.fullmatch(text.strip("()[]")) if "\\begin" in text else None
    if not match or match[1] not in kinds:
        return ()
    rows = tuple(tuple(entry.strip() for entry in row.split("&")) for row in match[2].split(ROW) if row.strip())
    if sum(map(len, rows)) > MAX_ITEMS:
        raise TooLarge
    return rows


def pieces_of(text: str) -> tuple[tuple[str, str], ...]:
    """Return (value, condition) of each row of a function given by cases; () for other text."""
    rows = rows_of(text, frozenset(("cases", "array")))
    if not rows or any(len(row) != 2 for row in rows):
        return ()
    pieces = [(value.strip(" ,"), _CONDITION_WORDS.sub(r"\1", condition).strip(" ,.")) for value, condition in rows]
    signs = re.findall(r"\\[lg]eq|[<>]", pieces[0][1])
    if len(pieces) == 2 and pieces[1][1] in ("\\text{otherwise}", "\\text{else}") and len(signs) == 1:
        pieces[1] = (pieces[1][0], pieces[0][1].replace(signs[0], _OPPOSITES[signs[0]]))
    return tuple(pieces)


_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|nu|phi|varphi|psi|omega|rho|sigma|tau|epsilon|Delta|Omega|ell)"
_LETTER = (  # also with an accent, a prime, an index or an exponent of a name: \vec{a}, f', x_1, A^{-1}
    rf"(?:[A-Za-z]|{_GREEK}|\\(?:vec|bar|hat|tilde|dot|overline|overrightarrow|mathbb|mathcal)\{{[A-Za-z]+\}})"
    r"(?:'|_\{[^{}]*(?:\{[^{}]*\})?\}|\^\{(?:-1|T|c|\\prime|\(\w+\))\})*+"
)
_ARGUMENT = r"\((?:[^()]|\([^()]*\))*+\)|\[[^\[\]]*+\]"
_D = r"\{(?:d|\\partial)[^{}]*(?:\{\d\})?[^{}]*\}"
_OF_UNKNOWNS = "|".join(sorted(FUNCTIONS - {"log", "ln", "exp", "lg"})) + "|deg|dim|Pr"
_NAME = re.compile(
    rf"(?:\\lim_\{{[^{{}}]*\}} ?)?{_LETTER}(?:{_ARGUMENT})?|\\max|\\min"  # x, f'(2), P(X=7), A^{-1}
    rf"|\\frac{_D}{_D}(?:\(\w\)|\w(?:\(\w\))?)?"  # \frac{dy}{dx}
    rf"|(?:m?\\angle|\\triangle|\\(?:{_OF_UNKNOWNS}))(?:\^\{{\d\}})? ?\(?(?:{_LETTER}|[,+-])++\)?"  # \sin\theta
    rf"|{_LETTER}(?:\\(?:cup|cap|setminus|times) ?{_LETTER})++|{_LETTER}(?::{_LETTER})++"  # A\cup B, S_1:S_2
    rf"|\({_LETTER}\\circ ?{_LETTER}\)(?:{_ARGUMENT})?"  # (f\circ g)(x)
    r"|\[[A-Z]{3,}\]|\|(?:[A-Z]+|[A-Z](?:\\c[au]p ?[A-Z])+|z|w|\\(?:vec|overline)\{\w+\})\||\\sigma\^\{2\}"  # |AB|
)
_WORDS = re.compile(
    rf"(?:\\text\{{[^{{}}]*\}}|{_LETTER}|\\(?:triangle|angle)|[A-Z ]|\((?:\w|,|\\text\{{[^{{}}]*\}})*\))++"
)
_DENIAL = re.compile(
    r"n't\b|\b(?:not?|non|never|neither|nor|cannot|(?:is|are|was|does|ca)nt|wrong|false|but|except|without|unlike"
    r"|less|more|than|most|least|about|roughly|nearly|half|twice|double|triple)\b"
)
_VARIABLE = re.compile(rf"(?:[a-zA-Z]|{_GREEK})(?:_\{{\w+\}}|\([a-z]\))?")
_NAMED_TUPLE = re.compile(rf"\(({_LETTER}(?:[,;]{_LETTER})+)\)")
_MEMBER = re.compile(rf"^((?![ei] ?\\){_VARIABLE.pattern}|{_NAMED_TUPLE.pattern}) ?\\in(?![a-z]) ?")  # x\in\{1,2\}
_DERIVATIVE = re.compile(r"\\frac\{(?:d|\\partial)(?:\^\{(\d)\})?(\w)(?:\(\w\))?\}\{(?:d|\\partial)(\w)(?:\^\{\1\})?\}")
_SIMPLE = re.compile(rf"({_GREEK}|[A-Za-z])((?:'|\^\{{\\prime\}})*)((?:_\{{[^{{}}]*\}})?)(?:\((.*)\))?")
_CONSTANTS = frozenset(("e", "i", "\\pi", "\\infty", "\\emptyset"))
_SERIES = tuple(row.split() for row in (
    "x y z", "a b c d", "p q r", "m n", "u v w", "s t", "k l", "r s", "e f", "f g h", "h k", "i j k",
    r"\alpha \beta \gamma \delta", r"\lambda \mu \nu", r"\phi \psi \omega",
    r"r \theta z", r"r \theta \phi", r"r \theta \varphi",
))  # fmt: skip


class Statement(NamedTuple):
    """Statement names = links = value, optionally modulo `modulus`. solved: no side contains the named unknown."""

    names: tuple[str, ...]
    links: tuple[str, ...]
    value: str
    modulus: str
    solved: bool

    @property
    def is_curve(self) -> bool:
        """True for an equation that has other equivalent forms, False for the value of an unknown."""
        if not self.names or not self.solved or not names_a_value(self.names[0], self.value):
            return True
        others = unknowns(self.value) - unknowns(self.names[0])
        return bool(others and re.fullmatch(r"[xyz](?:\([a-z]\))?", self.names[0]))


@lru_cache(maxsize=4096)
def statement(text: str) -> Statement | None:
    """Parse a statement; None for a bare value or a list."""
    modulus = re.search(r"\\pmod\{([^{}]+)\}$", text)
    body = _MEMBER.sub(r"\1=", text[: modulus.start()] if modulus else text).replace("\\equiv", "=")
    if ("=" not in body and not modulus) or listed(body):
        return None
    sides = split(body, "=")
    if (len(sides) == 1 and not modulus) or not all(sides):
        return None
    if len(sides) == 2 and is_variable(sides[1]) and not is_name(sides[0]):  # 5=x
        sides.reverse()
    names = []
    while len(sides) > 1 and (is_name(sides[0]) or (sides[0] == "i" and number(sides[-1]) is not None)):
        names.append(sides.pop(0))
    unknown = names[0] if names and is_variable(names[0]) and "(" not in names[0] else None
    solved = unknown is None or not any(unknown in unknowns(side) for side in sides)
    return Statement(tuple(names), tuple(sides[:-1]), sides[-1], modulus[1] if modulus else "", solved)


def is_variable(text: str) -> bool:
    return text not in _CONSTANTS and _VARIABLE.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Return True if `text` names the requested quantity: x, f(2), AB, m+n, "the area".

    A multiple, power or product of one unknown is not a name: 2x=42 is unsolved.
    """
    if not text or text in _CONSTANTS or text[0] in "+-*/" or re.fullmatch(r"[a-z](?:_\{\w+\})?\^\{-1\}", text):
        return False
    if "\\text" in text:
        return _WORDS.fullmatch(text) is not None and not _DENIAL.search(text.lower())
    if _NAME.fullmatch(text) or tuple_names(text):
        return True  # otherwise a combination of at least two unknowns: m+n, xy, 100m+n, a:b, AB^2
    return len(unknowns(text)) > 1 and not re.search(r"[=<>,!]|\\(?!frac|sqrt|cdot|pi)|\(.*\(", text)


def names_a_value(name: str, value: str) -> bool:
    """Return True if `value` alone is equivalent to `name=value`: f(2)=5, AB=5.

    Returns False for relations: a+c=2b, ab=1, PV=nRT.
    """
    return _NAME.fullmatch(name) is not None or bool(
        tuple_names(name) or "\\text" in name or (re.fullmatch("[A-Z]{2,3}", name) and not unknowns(value))
    )


@lru_cache(maxsize=4096)
def unknowns(text: str) -> frozenset[str]:
    """Return the Latin and Greek letters of an expression, except in commands and words, and except e, i and \\pi."""
    latin = re.sub(r"\\text\{[^{}]*\}|\\begin\{\w*\}|\\end\{\w*\}|\\[a-zA-Z]+", " ", text)
    return frozenset([*re.findall(_GREEK + "(?![a-z])", text), *re.findall("[a-zA-Z]", latin)]) - _CONSTANTS


@lru_cache(maxsize=4096)
def _canonical(name: str) -> tuple[str, int, str]:
    """Return (base, order of the derivative, argument): f'(2) is (f, 1, 2); y and y(x) are (y, 0, "")."""
    derivative, simple = _DERIVATIVE.fullmatch(name), _SIMPLE.fullmatch(name)
    if derivative:
        return derivative[2], int(derivative[1] or 1), "" if derivative[3] in "xt" else f"/{derivative[3]}"
    if not simple:
        return name.replace(" ", ""), 0, ""
    order = simple[2].count("'") + simple[2].count("p")
    return simple[1] + simple[3], order, re.sub("^[a-z]$", "", simple[4] or "")


def same_name(first: str, second: str) -> bool:
    """Return True if two names may be the same: words and any name, y(x) and y, f(x) and y, but not y' and y."""
    if "\\text" in first + second or (tuple_names(first) and set(tuple_names(first)) == set(tuple_names(second))):
        return True
    (p, order, argument), (q, other, at) = _canonical(first), _canonical(second)
    return order == other and argument == at and (p == q or ("y" in (p, q) and {p, q} <= set("yfgh")))


def tuple_names(name: str) -> tuple[str, ...]:
    """Return (x, y) for the name `(x,y)`; () for any other name."""
    match = _NAMED_TUPLE.fullmatch(name)
    names = tuple(re.split("[,;]", match[1])) if match else ()
    return names if len(set(names)) == len(names) else ()


def in_name_order(names: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
    """Sort values by name if the names are in one series (x, y; a, b; r, θ) or have one letter (x_1, x_2)."""
    letters = [_TOKEN.findall(name)[0].lower() for name in names]
    series = next((row for row in _SERIES if set(letters) <= set(row)), letters)
    if series is letters and (len(set(letters)) > 1 or letters[0][0] == "\\"):
        return values
    order = sorted(range(len(names)), key=lambda i: (series.index(letters[i]), len(names[i]), names[i]))
    return tuple(values[index] for index in order)


def assigned(items: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (names, values) of `x=1, y=2`, values in the order of the names. names: () unless all are distinct."""
    statements = [statement(item) for item in items]
    named = [part if part and len(part.names) == 1 and not part.links and part.solved else None for part in statements]
    names = tuple(part.names[0] for part in named if part)
    values = tuple(part.value if part else item for part, item in zip(named, items, strict=True))
    return (names, in_name_order(names, values)) if len(set(names)) == len(items) else ((), values)


def ordered_value(found: Statement) -> str:
    """Return the value, sorted by name for a named tuple: (y,x)=(1,2) gives (2,1)."""
    names, values = tuple_names(found.names[0]) if found.names else (), bracket(found.value)
    if values is None or len(values.items) != len(names):
        return found.value
    return f"{values.opening}{','.join(in_name_order(names, values.items))}{values.closing}"
