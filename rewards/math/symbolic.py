r"""Comparison of single expressions by computer algebra: math-verify with an exact comparison of numbers.

Runs only in worker processes (worker.py), because an adversarial expression may take unlimited time and memory.

math-verify treats numbers as equal below an absolute tolerance (1/30! = 1/31!). Here, numbers are compared by their
exact difference: nonzero at some precision means different, indistinguishable from zero at 1,000 digits means equal.
Expressions with variables that math-verify considers equal must also agree at a few rational points.
"""

import logging
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from math_verify import verify
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef

from .normalize import ROW

logger = logging.getLogger(__name__)

_SPELLING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none")
_READING = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)


def _improper(match: re.Match[str]) -> str:
    whole, upper, lower = int(match[1]), int(match[2]), int(match[3])
    return f"\\frac{{{whole * lower + upper}}}{{{lower}}}" if 0 < upper < lower else match[0]


_AS_SYMPY = [(re.compile(pattern), spelling) for pattern, spelling in (
    (r"(\d*)\.(\d+)", lambda m: f"\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}"),
    (r"(?<![\d}^.)])(\d+)\\frac\{(\d+)\}\{(\d+)\}", _improper),
    (r"(?<=[\d)])\(|(?<=\\pi)\(", "*("),  # otherwise a mixed number: 2(3) would be 5
    (r"(\d+|\\frac\{\d+\}\{\d+\})\\degree", r"(\\frac{\1*\\pi}{180})"),
    (r"\\int.*|\\(?:math[a-z]+|begin|end)\{\w+\}|\\frac\{d[^{}]*\}\{d\w+\}|_\{\w+\}|\\Gamma(?=\()"
     r"|\\(?!(?:gamma|Gamma)(?![a-zA-Z]))[a-zA-Z]+"
     r"|\\?(gamma|Gamma|[EId]|e(?=_))(?:_\{(\w+)\})?",  # parsed as constants, functions or differentials
     lambda m: f"\\Xi_{{{m[1]}{m[2] or ''}}}" if m[1] else m[0]),
    (ROW, r"\\\\"), (r"\*", r"\\cdot "), ("%", r"\\cdot \\frac{1}{100}"),
)]  # fmt: skip
_POINTS = tuple(map(sympy.Rational, "17/11 23/7 5/13 29/19 41/17 3/31 53/23 8/37".split()))
_CONSTANTS = frozenset(("C", "c", "K", "k", "C_{1}", "c_{1}"))  # constants of integration


def equal_expressions(answer: str, gold: str) -> bool:
    """Return True if two normalised expressions are equal; False if one cannot be parsed. Raises MemoryError."""
    try:
        return _equal(answer, gold)
    except MemoryError:
        raise
    except Exception:  # latex2sympy and sympy raise any exception for unsupported input, including bare Exception
        logger.error("not readable", exc_info=True)
        return False


def _equal(answer: str, gold: str) -> bool:
    a, g = _parse(answer), _parse(gold)
    if isinstance(a, sympy.Eq) and isinstance(g, sympy.Eq):  # equal up to a factor, with all terms on one side
        if not (a.free_symbols and g.free_symbols):  # \sqrt{3}=1.732: compare both sides
            return a.free_symbols == g.free_symbols and _same_number(a.lhs, g.lhs) and _same_number(a.rhs, g.rhs)
        ratio: Any = sympy.simplify((a.lhs - a.rhs) / (g.lhs - g.rhs))  # type: ignore[operator]  (sympy types sides as Basic)
        return bool(ratio.is_number and ratio.is_nonzero and ratio.is_finite)
    if _is_number(a) and _is_number(g):
        return _same_number(a, g)
    if not isinstance(a, sympy.Expr) or not isinstance(g, sympy.Expr):
        return bool(verify(g, a, timeout_seconds=None))
    a = _with_constant_of(a, g)
    if a.has(sympy.factorial, sympy.binomial) or g.has(sympy.factorial, sympy.binomial):
        return bool(sympy.gammasimp((a - g).rewrite(sympy.gamma)) == 0)
    return _agree_at_points(a, g) and (bool(verify(g, a, timeout_seconds=None)) or _same_where_real(a, g))


def _with_constant_of(a: Any, g: Any) -> Any:
    """Rename constants of integration as in the gold: x^2+K for x^2+C, c_1e^x for C_1e^x."""
    ours, theirs = a.free_symbols - g.free_symbols, g.free_symbols - a.free_symbols
    solves = ours and theirs and any(symbol.name in "xyt" for symbol in g.free_symbols)  # not an angle of a triangle
    if solves and {symbol.name.lower()[0] for symbol in ours | theirs} == {"c"}:
        return a.subs({symbol: sympy.Symbol(symbol.name.swapcase()) for symbol in ours})
    if len(ours) == len(theirs) == 1:
        (mine,), (wanted,) = ours, theirs
        if {mine.name, wanted.name} <= _CONSTANTS and not (a - mine).has(mine) and not (g - wanted).has(wanted):
            return a.subs(mine, wanted)
    return a


def _same_where_real(a: Any, g: Any) -> bool:
    r"""Return True if equal for positive values, and for negative ones where roots and logarithms are real.

    Examples: \ln x^2=2\ln x, |x|≠x.
    """
    symbols = sorted(a.free_symbols | g.free_symbols, key=str)
    inner = [part.args[0] for part in a.atoms(sympy.log) | g.atoms(sympy.log)]
    inner += [part.base for part in a.atoms(sympy.Pow) | g.atoms(sympy.Pow) if not part.exp.is_Integer]
    for signs in ((-1,), (-1, 1), (1, -1)):
        point = {symbol: signs[index % len(signs)] * _POINTS[index % 8] for index, symbol in enumerate(symbols)}
        if all(part.subs(point).is_nonnegative for part in inner) and not _same_number(a.subs(point), g.subs(point)):
            return False
    positive = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in symbols}
    return bool(sympy.simplify(sympy.expand_log(a.subs(positive) - g.subs(positive))) == 0)


@lru_cache(maxsize=1024)  # parsing costs more than comparing, and a group of samples shares its gold
def _parse(text: str) -> Any:
    """Parse to a sympy object with exact numbers.

    Decimals and mixed numbers become fractions, degrees become radians, i is the imaginary unit.
    """
    for pattern, spelling in _AS_SYMPY:
        text = pattern.sub(spelling, text)
    parsed: Any = latex2sympy(text, normalization_config=_SPELLING, conversion_config=_READING)
    if not isinstance(parsed, (sympy.Basic, sympy.MatrixBase)):
        raise ValueError("neither an expression nor a matrix")
    parsed = parsed if isinstance(parsed, sympy.Eq) else parsed.doit()
    parsed = parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})
    return parsed.replace(_is_odd_root_of_negative, lambda root: -((-root.base) ** root.exp))


def _is_odd_root_of_negative(part: Any) -> bool:
    """Match odd roots of negative numbers: the cube root of -8 is -2, but sympy takes the complex principal root."""
    return bool(part.is_Pow and part.exp.is_Rational and part.exp.p == 1 and part.exp.q % 2 and part.base.is_negative)


def _is_number(parsed: Any) -> bool:
    return isinstance(parsed, sympy.Basic) and bool(parsed.is_number) and not parsed.has(AppliedUndef)


def _same_number(a: Any, g: Any) -> bool:
    if any(value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for value in (a, g)):
        return bool(a == g) and a not in (sympy.zoo, sympy.nan)
    if (a - g).is_real:
        return _same_real(a, g)
    return all(_same_real(x, y) for x, y in zip(a.as_real_imag(), g.as_real_imag(), strict=True))


def _same_real(x: Any, y: Any) -> bool:
    try:
        return bool((x - y).evalf(5, maxn=1000, strict=True) == 0)
    except PrecisionExhausted:
        # Zero to 1,000 digits means equal, unless sympy cannot evaluate it at all (the cosine of 10^300).
        return bool(abs(x.evalf(20) - y.evalf(20)) <= sympy.Rational(1, 10**15) * max(1, abs(y.evalf(20))))


def _agree_at_points(a: Any, g: Any) -> bool:
    """Return False if two expressions differ at some rational point: a cheap test before and a check of the algebra."""
    symbols = sorted(a.free_symbols | g.free_symbols, key=str)
    for shift in range(3):
        point = {symbol: _POINTS[(index + shift) % len(_POINTS)] + index for index, symbol in enumerate(symbols)}
        x, y = a.subs(point), g.subs(point)
        if _is_number(x) and _is_number(y) and not _same_number(x, y):
            return False
    return True
