r"""Detection of echoes, answers copied from the problem: `\cos 1050^\circ` for "Find $\cos 1050^\circ$".

An echo is a formula of the problem or one side of it, and differs from the gold by more than the order of its terms.
Plain numbers, single symbols and choice letters are never echoes, alone or in a list, because a problem may contain its
answer. Reducible fractions, powers and repeating decimals do not count as plain numbers.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from .exact import number
from .guards import TooLarge
from .normalize import normalize
from .parts import group, statement
from .units import split_unit

_FORMULA = re.compile(r"(\$\$?|\\[(\[]|\\begin\{(?:align|equation|gather)\*?\})(.+?)(?:\$\$?|\\[)\]]|\\end\{)", re.S)
_WORD = re.compile(r"\S*[^\sA-Za-z.,?]\S*")  # a formula without delimiters
_RELATION = re.compile(r"=|\\[lgn]eq(?![a-z])|[<>,;]|\\equiv|\\approx|\\text\{[^{}]*\}")
_DRESS = re.compile(r"\\frac|\\cdot|[{}()*\s]|\[(?=\D)")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+|\S")
_WORK = re.compile(r"\\(?:overline|bar|dot)|^-?10\^|\(\d+\)$")  # unevaluated numbers: cycles, bare powers of ten
_MIXED = re.compile(r"-?\d+ ?\\frac")


def is_echo(answers: Sequence[str], gold: str, problem: str) -> bool:
    """Return True if all final answers are copied from the problem. They must already equal the gold."""
    try:
        return all(
            not _is_plain(a) and _is_copied(a, _value(normalize(gold)), problem) for a in map(normalize, answers)
        )
    except (TooLarge, RecursionError):  # such a large gold equals only the same spelling
        return False


def _is_copied(answer: str, gold: str, problem: str) -> bool:
    value = _value(answer)
    if sorted(_TOKEN.findall(_bare(value))) == sorted(_TOKEN.findall(_bare(gold))):
        return False
    return not {_bare(answer), _bare(value)}.isdisjoint(_formulas(problem))


def _is_plain(text: str) -> bool:
    value = _value(text)
    items_group = group(value)
    items = [_value(item) for item in items_group.items] if items_group else [value]
    return all(len(_TOKEN.findall(item.lstrip("+-"))) == 1 or _is_plain_number(item) for item in items)


def _is_plain_number(text: str) -> bool:
    value, bare = number(text), _bare(text).lstrip("+-")
    if value is None or _WORK.search(text):
        return False
    return "/" not in bare or bare == f"{abs(value.numerator)}/{value.denominator}" or bool(_MIXED.match(text))


def _value(text: str) -> str:
    """Return the value of a normalised answer, without its name and unit."""
    claim = statement(text)
    return split_unit(claim.value if claim and claim.names and not claim.links else text).core


def _bare(text: str) -> str:
    """Remove brackets and product signs of a normalised text, and write fractions with a slash."""
    return _DRESS.sub("", text.replace("}{", "/"))


@lru_cache(maxsize=1024)
def _formulas(problem: str) -> frozenset[str]:
    """Return the formulas of a problem and their sides, without brackets and product signs."""
    formulas = [normalize(match[2]) for match in _FORMULA.finditer(problem)]
    formulas += [normalize(word.rstrip(".,;:?")) for word in _WORD.findall(_FORMULA.sub(" ", problem))]
    return frozenset(_bare(part) for formula in formulas for part in [formula, *_RELATION.split(formula)])
