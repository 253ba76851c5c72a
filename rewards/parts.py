r"""Take a normalised answer apart: bare lists, brackets, environments, conditions.

Pure string code without judgement: what may equal what is compare.py's business.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from .exact import number
from .guards import MAX_ITEMS, TooLarge
from .normalize import ROW, normalize
from .units import split_unit

_PAIRS = {"\\{": ("\\}",), "\\langle": ("\\rangle",), "(": (")", "]"), "[": (")", "]")}
_MATRICES = frozenset("pmatrix bmatrix matrix array Bmatrix smallmatrix".split())
_STACKS = frozenset("cases aligned align gathered split array".split())
_ENVIRONMENT = re.compile(r"(?:\\\{)?\\begin\{([a-zA-Z]*)\*?\}(?:\{[lcr|]*\})?(.*)\\end\{\1\*?\}", re.DOTALL)
_CONDITION_WORDS = re.compile(r"\\text\{(?:if|for|when|where|as)\b\s*([^{}]*)\}")
_EITHER_SIGN = re.compile(r"\\([pm])[pm](?![a-zA-Z])")
_SIGNED_SUM = re.compile(r"(?:(?<=^)|(?<==))(-?[\d.]+)([+-][\d.]+)$")
_INTEGER = re.compile(r"(.+?)(?:,|\\text\{[^{}]*\}|\()+([a-z])\\in ?\\mathbb\{([ZN])\}\)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Group:
    """Items between one pair of brackets that encloses the whole, or of a bare list (then without brackets)."""

    opening: str
    items: tuple[str, ...]
    closing: str

    @property
    def is_set(self) -> bool:
        return self.opening == "\\{"

    @property
    def is_round(self) -> bool:
        return self.opening in ("(", "\\langle") and self.closing in (")", "\\rangle")


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
            depth += text.startswith(("\\langle", "\\begin"), index) - text.startswith(("\\rangle", "\\end"), index)
            index += 1
        depth += (char in "({[") - (char in ")}]")
        index += 1
    return [piece.strip() for piece in [*pieces, text[last:]]]


def _is_other_sign(text: str, separator: str, index: int) -> bool:
    r"""`<=` is no equality, nor is `!=` but after a number: 7!=5040. `\in` is not the head of `\infty`."""
    if separator == "=":
        before = text[index - 1 : index]
        return before in ("<", ">") or (before == "!" and not re.search(r"[\d)}]!$", text[max(0, index - 2) : index]))
    return separator[-1].isalpha() and text[index + len(separator) : index + len(separator) + 1].isalpha()


@lru_cache(maxsize=4096)
def bracket(text: str) -> Group | None:
    """The group that one pair of brackets makes of the whole text; the brackets of an interval may differ."""
    opening = next((mark for mark in _PAIRS if text.startswith(mark)), "")
    closing = next((mark for mark in _PAIRS.get(opening, ()) if text.endswith(mark)), "")
    inner, depth = text[len(opening) : len(text) - len(closing)], 0
    for char in inner if closing else "}":
        depth += (char in "({[") - (char in ")}]")
        if depth < 0:
            return None
    items = split(inner, ",")
    return None if depth else Group(opening, _few(split(inner, ";") if len(items) == 1 else items), closing)


@lru_cache(maxsize=4096)
def listed(text: str) -> tuple[str, ...]:
    """The items of a bare list, () when `text` is none: 1,000 and n=1,000 and $32,348 are one value."""
    if "," not in text and ";" not in text:
        return ()
    if ";" not in text and all("," not in p or number(split_unit(p).core) is not None for p in split(text, "=")):
        return ()
    items = split(text, ",")
    found = tuple(item for item in _few(split(text, ";") if len(items) == 1 else items) if item)
    return found if len(found) > 1 else ()


def _few(items: list[str]) -> tuple[str, ...]:
    if len(items) > MAX_ITEMS:
        raise TooLarge
    return tuple(items)


def group(text: str) -> Group | None:
    items = listed(text)
    return Group("", items, "") if items else bracket(text)


# What is only another form is rewritten before anything is compared.


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    r"""Stacked equations as a bare list, `\pm x` as its two values, (5) and \{5\} as 5."""
    match = _ENVIRONMENT.fullmatch(text) if "\\begin" in text else None
    if match and match[1] in _STACKS and (match[1] != "array" or text.startswith("\\{")):
        rows = [re.sub(r"&(?==)|(?<==)&|^&", "", row.strip()).strip(" ,") for row in match[2].split(ROW)]
        text = text if any("&" in row for row in rows) else ",".join(row for row in rows if row)
    if _EITHER_SIGN.search(text) and "\\neq" not in text:
        text = ",".join(signed for item in listed(text) or (text,) for signed in both_signs(item))
    found = bracket(text)
    if found and len(found.items) == 1 and found.opening in ("(", "\\{") and found.closing in (")", "\\}"):
        inner = found.items[0]
        return text if re.match(r"[a-z](?:\\in|[|:])|[^<>=]*\\[lgn]eq|.*[<>]", inner) or not inner else plain(inner)
    return text


def both_signs(text: str) -> list[str]:
    """`1\\\\pm2` as -1 and 3; a text without the sign as it is."""
    if not _EITHER_SIGN.search(text):
        return [text]
    first = "p" if "\\pm" in text else "m"  # \mp alone means the same
    marked = _EITHER_SIGN.sub(lambda m: "±" if m[1] == first else "∓", text)
    said = [marked.translate(str.maketrans("±∓", signs)).replace("{+", "{").removeprefix("+") for signs in ("+-", "-+")]
    return [_SIGNED_SUM.sub(_sum, normalize(item)) for item in said]


def _sum(match: re.Match[str]) -> str:
    first, second = number(match[1]), number(match[2])
    return match[0] if first is None or second is None else str(first + second)


def without_conditions(a: str, g: str) -> tuple[str, str]:
    r"""Both without their last "k an integer", the answer's k under the gold's name: k\pi for n\pi, n an integer."""
    x, y = _INTEGER.fullmatch(a), _INTEGER.fullmatch(g)
    if x and y and x[3] == y[3] and not re.search(rf"(?<![a-zA-Z]){y[2]}(?![a-zA-Z])", x[1]):
        return re.sub(rf"(?<![a-zA-Z]){x[2]}(?![a-zA-Z])", y[2], x[1]), y[1]
    if x and y and x.groups()[1:] != y.groups()[1:]:
        return a, g
    return x[1] if x else a, y[1] if y else g


def rows_of(text: str, kinds: frozenset[str] = _MATRICES) -> tuple[tuple[str, ...], ...]:
    """The entries of a matrix, () when `text` is none; a determinant is a number, not a matrix."""
    match = _ENVIRONMENT.fullmatch(text.strip("()[]")) if "\\begin" in text else None
    if not match or match[1] not in kinds:
        return ()
    rows = tuple(tuple(entry.strip() for entry in row.split("&")) for row in match[2].split(ROW) if row.strip())
    _few([entry for row in rows for entry in row])
    return rows


def pieces_of(text: str) -> tuple[tuple[str, str], ...]:
    """(value, condition) of each row of a function given by cases, () when `text` is none."""
    rows = rows_of(text, frozenset(("cases", "array")))
    if not rows or any(len(row) != 2 for row in rows):
        return ()
    return tuple((value.strip(" ,"), _CONDITION_WORDS.sub(r"\1", condition).strip(" ,.")) for value, condition in rows)
