r"""Detection of unevaluated arithmetic in an answer: `17\times23`, `40+\frac{4}{2}`, `2\cdot3!` for a number.

A sum, difference or product of two rational numbers is unevaluated, anywhere in the answer. Single fractions, powers,
roots, factorials, binomials and functions are accepted, as are mixed numbers, scientific notation and quotients of
factorials. For a gold that is a fraction, only integers and decimals count as operands: `\frac12+\frac13` is accepted
for 5/6.

Simple expressions are also evaluated at one point, which rejects most incorrect answers without computer algebra. Both
parse an expression with Python's ast module and never execute it.
"""

import ast
import cmath
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from math import isqrt

_LARGE = Fraction(7)  # placeholder for an integer that need not be computed
_FUNCTION = (
    r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|gcd|lcm|max|min|[lr](?:floor|ceil))"
    r"(?:_\{?\w+\}?)?(?:\^\{-?\w+\})? ?(?:(?:\d+(?:\.\d+)?|\\pi(?![a-z])|\\frac\{[^{}]*\}\{[^{}]*\}|[a-z](?![a-z]))*)"
)
_AS_PYTHON = [(re.compile(pattern), python) for pattern, python in (
    (r"(?<=\d) ?\\frac\{(\d+)\}\{(\d+)\}", lambda m: "" if int(m[1]) < int(m[2]) else m[0]),  # of a mixed number
    (r"\*10\^\{-?\d+\}|%|\\degree", ""),  # part of a number
    (r"\\lfloor|\\lceil", "unknown("), (r"\\rfloor|\\rceil", ")"),
    (_FUNCTION, "unknown "), (r"unknown (?=[({])", "unknown"), (r"\\binom\{[^{}]*\}\{[^{}]*\}", "7"),
    (r"\|([^|]*)\|", r"(\1)"),
    (r"\}\{", ")/("), (r"\\frac", ""), (r"\\sqrt\[[^\[\]]*\]", "unknown"), (r"\\sqrt(?=\{)", "root"),
    (r"\\(theta|pi)(?![a-z])|(?<![a-z\\])([a-zA-Z])(?![a-z])", r"\1\2 "), (r"\\([a-z]+)", r"\1"),
    (r"\{", "("), (r"\}", ")"), (r"\^", "**"), (r"(\d+)!", r"(\1).whole "), (r"\)!", ").whole "),
    (r"(?<![\d.])0+(?=\d)", ""), (r"(?<![a-z])\(", "group("), (r"(?<=[\d)])(?=[a-zA-Z])|(?<=\))(?=\d)", "*"),
    (r"(?<=[a-zA-Z]) +(?=[\da-zA-Z])", "*"),
)]  # fmt: skip
_PYTHON = re.compile(
    r"(?:[a-zA-Z+\-*/() ,]|\d++(?:\.\d*+)?+(?![\w.])|\.\d++(?![\w.])|\.whole )*+"
)  # text that parses without warnings
_NO_ARITHMETIC = (SyntaxError, ValueError, RecursionError, MemoryError)  # words, several values, truncated text


def _parse(text: str) -> ast.expr:
    for pattern, python in _AS_PYTHON:
        text = pattern.sub(python, text)
    if not _PYTHON.fullmatch(text):
        raise ValueError("no arithmetic")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SystemError:  # CPython miscounts the depth if another thread parses meanwhile (python/cpython#106905)
        return ast.parse(text.strip(), mode="eval").body


@lru_cache(maxsize=4096)
def is_undone(text: str, *, whole: bool) -> bool:
    """Return True if a normalised answer to a numeric gold has unevaluated arithmetic. whole: integer gold."""
    reader = _Reader(whole)
    try:
        reader.read(_parse(text), top=True)
    except _NO_ARITHMETIC:
        return False
    return reader.undone


class _Reader:
    """Reader of an expression. Values are fractions, or None if not known to be rational."""

    def __init__(self, whole: bool):
        self.whole, self.undone = whole, False

    def read(self, node: ast.expr, *, top: bool = False, below: bool = False) -> Fraction | None:
        """Return the value of a node. top: outside brackets and functions. below: in a denominator.

        A product of factorials is accepted in a denominator.
        """
        match node:
            case ast.Constant(value=int() | float()):
                return Fraction(str(node.value))
            case ast.Name():
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
    """Return the root of a fraction for index 1 or 2; None if it is not rational or for any other index."""
    if index == 1 or value is None:
        return value
    top, bottom = (isqrt(part) if part >= 0 else 0 for part in value.as_integer_ratio())
    return Fraction(top, bottom) if index == 2 and Fraction(top * top, bottom * bottom) == value else None


_SIMPLE = re.compile(  # unambiguous expressions: no functions, no f(x), no mixed numbers, nothing after a/b
    r"(?:[-+*^{ ]|\}(?![(^])|\d++(?:\.\d++)?+(?! ?\\frac)|(?<![a-zA-Z}])\(|\)|/\d++(?![.a-zA-Z\\({^])|[a-zA-Z]"
    r"|\\frac(?=\{)|\\sqrt(?=\{)|\\pi(?![a-zA-Z]))++"
)
_LETTER = re.compile(r"\\[a-zA-Z]+|([a-df-hj-zA-Z])")
_PRODUCT = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]{2,}")  # product of unknowns: xy^2
_CONSTANTS: dict[str, complex] = {"e": cmath.e, "i": 1j, "pi": cmath.pi}
_OPERATIONS: dict[type, Callable[[complex, complex], complex]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip


def differ(a: str, g: str) -> bool:
    """Return True if two normalised expressions in the same letters have clearly different values at one point.

    Returns False for different letters, which may stand for the same constant of integration.
    """
    if {*_LETTER.findall(a), ""} != {*_LETTER.findall(g), ""}:
        return False
    x, y = _value(a), _value(g)
    return x is not None and y is not None and abs(x - y) > 1e-6 * (1 + abs(x) + abs(y))


@lru_cache(maxsize=4096)
def _value(text: str) -> complex | None:
    if not _SIMPLE.fullmatch(text) or text.count("}{") != text.count("\\frac"):
        return None
    try:
        return _evaluate(_parse(_PRODUCT.sub(lambda m: " ".join(m[0]), text)))
    except (*_NO_ARITHMETIC, ArithmeticError):
        return None


def _evaluate(node: ast.expr) -> complex:
    """Evaluate a node at one point. Raises ValueError for unsupported nodes and for values too large for float."""
    match node:
        case ast.Constant(value=int() | float() as number):
            value = complex(number)
        case ast.Name(id=name) if len(name) == 1 or name == "pi":
            value = _CONSTANTS.get(name) or 0.3 + ord(name) * 0.0170733
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            value = _evaluate(inner) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.Call(func=ast.Name(id="group" | "root" as name), args=[inner]):
            value = cmath.sqrt(_evaluate(inner)) if name == "root" else _evaluate(inner)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATIONS:
            x, y = _evaluate(left), _evaluate(right)
            if isinstance(kind, ast.Pow) and y != round(y.real) and (x.real < 0 or x.imag):
                raise ValueError("which root is meant?")
            value = _OPERATIONS[type(kind)](x, y)
        case _:
            raise ValueError("no plain arithmetic")
    if not abs(value) < 1e9:
        raise ValueError("too large")
    return value
