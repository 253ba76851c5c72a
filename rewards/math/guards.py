"""Size limits that reject answers whose computer algebra could cost far more than that of ordinary answers.

The checks are deterministic and linear in the length, so the verdict does not depend on machine or load. The workers'
time limit is only the second line of defence. Over a limit, an answer is incorrect with the reason "guard".
"""

import re
from functools import lru_cache
from itertools import accumulate

MAX_CHARS = 2000
MAX_DEPTH = 12  # nested brackets; parsing time of the LaTeX grammar doubles with each level
MAX_DIGITS = 400  # consecutive digits
MAX_EXPONENT = 1000
MAX_POWER_DIGITS = 5000  # digits of an integer power, whose exponent may be larger: 2^{2024}
MAX_FACTORIAL = 2500
MAX_BINOMIAL_DIGITS = 4
MAX_OPERATORS = 150
MAX_FUNCTIONS = 20
MAX_BARS = 12
MAX_ITEMS = 400  # items of a list, compared pairwise
MAX_ALGEBRA_ITEMS = 12  # items of a list that contains other values than numbers


class TooLarge(Exception):
    """Raised for an answer over one of the limits above, before any computer algebra."""


_EXPONENT = re.compile(r"((?<![\w.])\d+)?\^\{?(?:[+-]|\()?(\d+)")
_DIGITS = re.compile(r"\d+")
_TOWER = re.compile(r"\^\{[^{}a-zA-Z]*\^|\^\{?[^{}^a-zA-Z]*\}?\^|\^\{[^{}]*!|\^\{\{|(?:\^\{[^{}]*){5}")  # or 5 levels
_SMALL_TOWER = re.compile(r"\^\{(\d{1,2})\^\{(\d|[a-z])\}\}")
_FACTORIAL = re.compile(r"\^\{?\d+[)}]*(?=!)|!(?=[)}\s]*!)|(\d+)[)}]*(?=!)")  # of a power, factorial or number
_OPERATOR = re.compile(r"[+\-*/^_&]|\\frac|\\sqrt")
_FUNCTION = re.compile(
    r"\\(?:a?r?c?sin|a?r?c?cos|a?r?c?tan|cot|sec|csc|log|ln|exp|lg|sinh|cosh|tanh|det|gcd|lcm|max|min|binom)"
)


def _small_tower(match: re.Match[str]) -> str:
    value = int(match[1]) ** int(match[2]) if match[2].isdigit() else 0  # 2^{2^n} is no number
    return f"^{{{value}}}" if value <= MAX_EXPONENT else match[0]


@lru_cache(maxsize=4096)
def check_size(text: str) -> None:
    """Raise TooLarge if an expression exceeds a limit of this module. Linear time."""
    depths = accumulate((char in "({[") - (char in ")}]") for char in text)
    powers = _EXPONENT.findall(text) if "^" in text else ()
    if (
        len(text) > MAX_CHARS
        or (sum(map(text.count, "({[")) > MAX_DEPTH and max(depths) > MAX_DEPTH)
        or max(map(len, _DIGITS.findall(text)), default=0) > (MAX_BINOMIAL_DIGITS if "\\binom" in text else MAX_DIGITS)
        or ("^" in text and _TOWER.search(_SMALL_TOWER.sub(_small_tower, text)))
        or any(len(n) > 4 or int(n) > (MAX_POWER_DIGITS // len(base) if base else MAX_EXPONENT) for base, n in powers)
        or ("!" in text and any(not n or len(n) > 4 or int(n) > MAX_FACTORIAL for n in _FACTORIAL.findall(text)))
        or len(_OPERATOR.findall(text)) > MAX_OPERATORS
        or len(_FUNCTION.findall(text)) > MAX_FUNCTIONS
        or text.count("|") > MAX_BARS
    ):
        raise TooLarge
