"""Exact numbers: integers, decimals, thousands separators, percent, fractions, mixed numbers, powers of ten, cycles."""

import re
from fractions import Fraction
from functools import lru_cache

MAX_DIGITS = 400  # longest number that is read exactly; also limits the decimal exponent

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_SCIENTIFIC = re.compile(
    rf"({_DIGITS})(?:(?:[eE]|\*10\^\{{)([+-]?\d+)\}}?)?|10\^\{{([+-]?\d+)\}}"
)  # or a plain decimal
_SIGNED = rf"([+-]?(?:{_DIGITS}))"
_FRACTION = re.compile(rf"\\frac\{{{_SIGNED}\}}\{{{_SIGNED}\}}|{_SIGNED}/{_SIGNED}")
_MIXED = re.compile(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}|(\d+)[ +](\d+)/(\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\\dot\{(\d)\}(\d*)\\dot\{(\d)\}|\((\d+)\))")
_ELLIPSIS = re.compile(r"(\d*)\.(\d+)\\ldots")
_PARENTHESES = re.compile(r"^([+-]?)\(([^(),]*)\)$")


@lru_cache(maxsize=1 << 16)
def number(text: str) -> Fraction | None:
    """Return the exact value of a normalised string that is one number; None for other or too long strings."""
    if not text or len(text) > MAX_DIGITS:
        return None
    if text.isdecimal():
        return Fraction(int(text))
    factor: int | Fraction = 1
    if text.endswith("%"):
        text, factor = text[:-1].rstrip(), Fraction(1, 100)
    text = _PARENTHESES.sub(r"\1\2", text) if text.endswith(")") else text
    if text[:1] in ("+", "-"):
        text, factor = text[1:], -factor if text[0] == "-" else factor
    value = _unsigned(text) if text[:1].isdigit() or text[:1] in ("\\", ".") else None
    return value if value is None or factor == 1 else factor * value


def same_number(a: str, g: str) -> bool | None:
    """Return whether two numbers are equal; None unless both are numbers.

    A percent sign on one side may mean 1/100 or be a unit.
    """
    p, q = number(a), number(g)
    if p is None or q is None:
        return None
    return p == q or (a[-1] == "%") != (g[-1] == "%") and number(a.rstrip("%")) == number(g.rstrip("%"))


def value_or_text(text: str) -> Fraction | str:
    """Return a key that is equal for equal numbers: the value of a number, else the text."""
    value = number(text)
    return text if value is None else value


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip("."))


def _unsigned(text: str) -> Fraction | None:
    if match := _SCIENTIFIC.fullmatch(text):
        head, exponent = _decimal(match[1] or "1"), match[2] or match[3] or "0"
        return head * Fraction(10) ** int(exponent) if len(exponent) < 5 and abs(int(exponent)) <= MAX_DIGITS else None
    if match := _FRACTION.fullmatch(text):
        top, bottom = (_decimal(group) for group in match.groups() if group)
        return top / bottom if bottom else None
    if match := _MIXED.fullmatch(text):
        whole, upper, lower = (int(group) for group in match.groups() if group)
        return whole + Fraction(upper, lower) if 0 < upper < lower else None  # 3\frac{5}{2} is no mixed number
    if match := _REPEATING.fullmatch(text):
        return _with_cycle(match[1], match[2], "".join(part for part in match.groups()[2:] if part))
    whole, digits = match.groups() if (match := _ELLIPSIS.fullmatch(text)) else ("", "")
    for length in range(1, len(digits) // 2 + 1):  # the shortest cycle written at least twice (one digit: three times)
        for start in range(len(digits) - max(3, 2 * length) + 1):
            tail = digits[start:]
            if (tail[:length] * len(tail))[: len(tail)] == tail:
                return _with_cycle(whole, digits[:start], tail[:length])
    return None


def _with_cycle(whole: str, fixed: str, cycle: str) -> Fraction:
    head = Fraction(int((whole or "0") + fixed), 10 ** len(fixed))
    return head + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
