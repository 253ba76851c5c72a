r"""Arithmetic that an answer leaves undone: `17\times23`, `40+\frac{4}{2}`, `2\cdot3!` for a number is the question.

A sum, difference or product of two rational numbers is undone, wherever it stands in the answer. Fractions, powers,
roots, factorials, binomials and functions alone are not, nor are mixed numbers, scientific notation and quotients of
factorials. For a gold that is a fraction, only whole numbers and decimals count: `\frac12+\frac13` says 5/6.
"""

import ast
import re
from fractions import Fraction
from math import isqrt

_LARGE = Fraction(7)  # stands for a whole number that need not be computed
_MIXED = re.compile(r"(?<=\d) ?\\frac\{(\d+)\}\{(\d+)\}")
_FUNCTION = (
    r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|gcd|lcm|max|min|[lr](?:floor|ceil))"
    r"(?:_\{?\w+\}?)?(?:\^\{-?\w+\})? ?(?:(?:\d+(?:\.\d+)?|\\pi(?![a-z])|\\frac\{[^{}]*\}\{[^{}]*\}|[a-z](?![a-z]))*)"
)
_AS_PYTHON = [(re.compile(pattern), python) for pattern, python in (
    (r"\*10\^\{-?\d+\}|%|\\degree", ""),  # ends a number, as the fraction of a mixed one does
    (r"\\lfloor|\\lceil", "unknown("), (r"\\rfloor|\\rceil", ")"),
    (_FUNCTION, "unknown"), (r"\\binom\{[^{}]*\}\{[^{}]*\}", "7"), (r"\|([^|]*)\|", r"(\1)"),
    (r"\}\{", ")/("), (r"\\frac", ""), (r"\\sqrt\[[^\[\]]*\]", "unknown"), (r"\\sqrt(?=\{)", "root"),
    (r"\\(?:theta|pi)(?![a-z])|(?<![a-z\\])[a-zA-Z](?![a-z])", "unknown "), (r"\\([a-z]+)", r"\1"),
    (r"\{", "("), (r"\}", ")"), (r"\^", "**"), (r"(\d+)!", r"(\1).whole "), (r"\)!", ").whole "),
    (r"(?<![\d.])0+(?=\d)", ""), (r"(?<![a-z])\(", "group("), (r"(?<=[\d)])(?=[a-z])|(?<=\))(?=\d)", "*"),
    (r"(?<=unknown )(?=[\da-z])|(?<=whole )(?=[\da-z])", "*"),
)]  # fmt: skip


def is_undone(text: str, *, whole: bool) -> bool:
    """Whether a normalised answer to a gold that is a number (`whole`: a whole one) leaves arithmetic undone."""
    text = _MIXED.sub(lambda m: "" if int(m[1]) < int(m[2]) else m[0], text)
    for pattern, python in _AS_PYTHON:
        text = pattern.sub(python, text)
    try:
        reader = _Reader(whole)
        reader.read(ast.parse(text.strip(), mode="eval").body, top=True)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # no arithmetic: words, several values, a cut-off one
        return False
    return reader.undone


class _Reader:
    """Reads an expression; its value is a fraction, None when it is not known to be rational."""

    def __init__(self, whole: bool):
        self.whole, self.undone = whole, False

    def read(self, node: ast.expr, *, top: bool = False, below: bool = False) -> Fraction | None:
        """`top`: in no brackets or function. `below`: in a denominator, where factorials may stand side by side."""
        match node:
            case ast.Constant(value=int() | float()):
                return Fraction(str(node.value))
            case ast.Name(id="unknown"):
                return None
            case ast.UnaryOp(op=sign, operand=inner):
                value = self.read(inner, top=top, below=below)
                return -value if isinstance(sign, ast.USub) and value is not None else value
            case ast.Attribute(value=inner):
                self.read(inner)
                return _LARGE
            case ast.Call(func=ast.Name(id=name), args=[inner]):
                value = self.read(inner, below=below and name == "group")
                return value if name == "group" else _root(value, 2) if name == "root" else None
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                value, exponent = self.read(left), self.read(right)
                return _LARGE if exponent is not None and _root(value, exponent.denominator) is not None else None
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                value, under = self.read(left, top=top), self.read(right, below=True)
                return value / under if value is not None and under else None
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as operator, right=right):
                values = self.read(left, top=top, below=below), self.read(right, top=top, below=below)
                known = [value for value in values if value is not None]
                factorials = below and isinstance(operator, ast.Mult) and _is_factorial(left) and _is_factorial(right)
                plain = all(_is_plain(side, value) for side, value in zip((left, right), values, strict=True))
                self.undone |= not factorials and (
                    (len(known) == 2 and (self.whole or plain)) or (len(known) == 1 and self.whole and top)
                )
                return _LARGE if len(known) == 2 else None
        raise ValueError("no arithmetic")


def _is_factorial(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) or (isinstance(node, ast.BinOp) and _is_factorial(node.left))


def _is_plain(node: ast.expr, value: Fraction | None) -> bool:
    return isinstance(node, ast.Constant) or (value is not None and value.denominator == 1)


def _root(value: Fraction | None, index: int) -> Fraction | None:
    """The square root (or `index` 1: the value itself) of a fraction, None if it is not rational or not looked for."""
    if index == 1 or value is None:
        return value
    top, bottom = (isqrt(part) if part >= 0 else 0 for part in value.as_integer_ratio())
    return Fraction(top, bottom) if index == 2 and Fraction(top * top, bottom * bottom) == value else None
