"""Exact numbers: integers, decimals, thousands separators, percent, fractions, mixed numbers, powers of ten, cycles."""

import re
from fractions import Fraction
from functools import lru_cache

MAX_DIGITS = 400  # of a number read exactly; also bounds the decimal exponent

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(_DIGITS)
_SCIENTIFIC = re.compile(rf"(?:({_DIGITS})(?:[eE]([+-]?\d+)|\*10\^\{{([+-]?\d+)\}})|10\^\{{([+-]?\d+)\}})")
_FRACTION = re.compile(rf"\\frac\{{([+-]?)({_DIGITS})\}}\{{([+-]?)({_DIGITS})\}}|()({_DIGITS})/([+-]?)({_DIGITS})")
_MIXED = re.compile(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}|(\d+)[ +](\d+)/(\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\\dot\{(\d)\}(\d*)\\dot\{(\d)\}|\((\d+)\))")
_ELLIPSIS = re.compile(r"(\d*)\.(\d+)\\ldots")
_PARENTHESES = re.compile(r"([+-]?)\(([^(),]*)\)")


@lru_cache(maxsize=1 << 16)
def number(text: str) -> Fraction | None:
    """The exact value of a normalised string that is one number; None when it is anything else, or too long."""
    if not text or len(text) > MAX_DIGITS:
        return None
    if text.isdecimal():
        return Fraction(int(text))
    factor: int | Fraction = 1
    if text.endswith("%"):
        text, factor = text[:-1].rstrip(), Fraction(1, 100)
    enclosed = _PARENTHESES.fullmatch(text) if text[-1:] == ")" else None
    text = enclosed[1] + enclosed[2] if enclosed else text
    if text[:1] in ("+", "-"):
        text, factor = text[1:], -factor if text[0] == "-" else factor
    if text[:1].isdigit() or text[:1] in ("\\", "."):
        for read in (_decimal, _scientific, _fraction, _mixed, _repeating, _continued):
            value = read(text)
            if value is not None:
                return value if factor == 1 else factor * value
    return None


def same_number(a: str, g: str) -> bool | None:
    """Whether two numbers are equal, None unless both are; a percent sign on one of them is a hundredth or a unit."""
    p, q = number(a), number(g)
    if p is None or q is None:
        return None
    return p == q or (a[-1] == "%") != (g[-1] == "%") and number(a.rstrip("%")) == number(g.rstrip("%"))


def value_or_text(text: str) -> Fraction | str:
    """A key that is equal for equal numbers."""
    value = number(text)
    return text if value is None else value


def _decimal(text: str) -> Fraction | None:
    if text.isdecimal():
        return Fraction(int(text))
    return Fraction(text.replace(",", "").replace(" ", "").rstrip(".")) if _DECIMAL.fullmatch(text) else None


def _scientific(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text)
    exponent = match and (match[2] or match[3] or match[4])
    if not match or not exponent or len(exponent) > 4 or abs(int(exponent)) > MAX_DIGITS:
        return None
    head = _decimal(match[1] or "1")
    return None if head is None else head * Fraction(10) ** int(exponent)


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    signs_and_digits = [group for group in match.groups() if group is not None]
    top, bottom = (_decimal(digits) for digits in signs_and_digits[1::2])
    if top is None or not bottom:
        return None
    return -top / bottom if signs_and_digits[::2].count("-") == 1 else top / bottom


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    whole, upper, lower = (int(group) for group in match.groups() if group) if match else (0, 0, 0)
    return whole + Fraction(upper, lower) if 0 < upper < lower else None  # 3\frac{5}{2} is no mixed number


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text)
    return _with_cycle(match[1], match[2], "".join(part for part in match.groups()[2:] if part)) if match else None


def _continued(text: str) -> Fraction | None:
    """`0.2727...`: the shortest cycle that is written out at least twice, three times when it is one digit."""
    match = _ELLIPSIS.fullmatch(text)
    whole, digits = match.groups() if match else ("", "")
    for length in range(1, len(digits) // 2 + 1):
        for start in range(len(digits) - max(3, 2 * length) + 1):
            tail = digits[start:]
            if (tail[:length] * len(tail))[: len(tail)] == tail:
                return _with_cycle(whole, digits[:start], tail[:length])
    return None


def _with_cycle(whole: str, fixed: str, cycle: str) -> Fraction:
    head = Fraction(int((whole or "0") + fixed), 10 ** len(fixed))
    return head + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
