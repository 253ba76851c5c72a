r"""Arithmetic that an answer leaves undone: `17\times23`, `40+\frac{4}{2}`, `2\cdot3!` for a number is the question.

A sum, difference or product of two rational numbers is undone, wherever it stands in the answer. Fractions, powers,
roots, factorials, binomials and functions alone are not, nor are mixed numbers, scientific notation and quotients of
factorials. For a gold that is a fraction, only whole numbers and decimals count: `\frac12+\frac13` says 5/6.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d*)?|\.\d+|\S")
_SCALE = re.compile(r"\*10\^\{-?\d+\}|%|\\degree")  # ends a number; as does the fraction of a mixed one
_MIXED = re.compile(r"(?<=\d) ?\\frac\{(\d+)\}\{(\d+)\}")
_FUNCTION = re.compile(r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|gcd|lcm|max|min)")
_UNKNOWN = re.compile(r"[a-zA-Z]|\\(?:pi|theta)")
_CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_END = frozenset(("", "+", "-", *_CLOSING.values()))
_LARGE = Fraction(7)  # stands for a whole number that need not be computed


class _Term(NamedTuple):
    """`value`: None if not known to be rational. `factorials`: how many, if it is a product of them alone."""

    value: Fraction | None
    decimal: bool = False
    factorials: int = 0

    @property
    def plain(self) -> bool:
        return self.decimal or (self.value is not None and self.value.denominator == 1)


def is_undone(text: str, *, whole: bool) -> bool:
    """Whether a normalised answer to a gold that is a number (`whole`: a whole one) leaves arithmetic undone."""
    text = _MIXED.sub(lambda m: "" if int(m[1]) < int(m[2]) else m[0], _SCALE.sub("", text))
    reader = _Reader(_TOKEN.findall(text), whole)
    try:
        total = reader.sum()
    except ValueError:  # no arithmetic: words, several values, something cut off
        return False
    return not reader.tokens and (reader.undone or total.factorials > 1)


class _Reader:
    """Recursive descent over the tokens of an expression; the guards bound its depth."""

    def __init__(self, tokens: list[str], whole: bool):
        self.tokens, self.whole, self.undone, self.depth = tokens[::-1], whole, False, 0

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self) -> str:
        if not self.tokens:
            raise ValueError("cut off")
        return self.tokens.pop()

    def sum(self) -> _Term:
        total = self.product()
        while self.next() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            total = self.joined(total, self.product(), lambda x, y, sign=sign: x + sign * y)
        return total

    def product(self) -> _Term:
        if self.next() in ("+", "-"):
            sign, inner = self.take(), self.product()
            return inner._replace(value=-inner.value) if sign == "-" and inner.value is not None else inner
        total = self.power()
        while self.next() not in _END:
            operator = self.take() if self.next() in ("*", "/") else "*"
            right = self.power()
            if operator == "/":
                total = self.quotient(total, right)
            elif total.factorials and right.factorials:
                total = _Term(_LARGE, factorials=2)
            else:
                total = self.joined(total, right, lambda x, y: x * y)
        return total

    def joined(self, left: _Term, right: _Term, operation: Callable[[Fraction, Fraction], Fraction]) -> _Term:
        """A sum or a product. With one rational part of a whole result, the other is rational as well."""
        known = [term.value for term in (left, right) if term.value is not None]
        if len(known) == 2:
            self.undone |= self.whole or (left.plain and right.plain)
            return _Term(operation(known[0], known[1]))
        self.undone |= self.whole and self.depth == 0 and len(known) == 1
        return _Term(None)

    def quotient(self, top: _Term, bottom: _Term) -> _Term:
        self.undone |= top.factorials > 1
        return _Term(top.value / bottom.value if top.value is not None and bottom.value else None)

    def power(self) -> _Term:
        base = self.atom()
        while self.next() in ("^", "!"):
            if self.take() == "!":
                base = _Term(_LARGE, factorials=1)
            else:
                exponent = self.atom().value
                root = _root(base.value, exponent.denominator) if exponent is not None else None
                base = _Term(None if root is None else _LARGE)
        return base

    def atom(self) -> _Term:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return _Term(Fraction(token), decimal=True)
        if token in _CLOSING:
            self.depth += 1
            inner = self.sum()
            self.depth -= 1
            if self.take() != _CLOSING[token]:
                raise ValueError("another bracket")
            return inner if token in "({|" else _Term(None)
        if token == "\\frac":
            return self.quotient(self.atom(), self.atom())
        if token == "\\binom":
            self.atom()
            self.atom()
            return _Term(_LARGE)
        if token == "\\sqrt":
            index = self.atom() if self.next() == "[" else None
            radicand = self.atom().value
            return _Term(_root(radicand, 2) if index is None else None)
        if _FUNCTION.fullmatch(token):
            while self.next() in ("_", "^"):
                self.take()
                self.atom()
            self.atom()
        elif not _UNKNOWN.fullmatch(token):
            raise ValueError("no arithmetic")
        return _Term(None)


def _root(value: Fraction | None, index: int) -> Fraction | None:
    """The square root (or `index` 1: the value itself) of a fraction, None if it is not rational or not looked for."""
    if index == 1 or value is None:
        return value
    top, bottom = (isqrt(part) if part >= 0 else 0 for part in value.as_integer_ratio())
    return Fraction(top, bottom) if index == 2 and Fraction(top * top, bottom * bottom) == value else None
