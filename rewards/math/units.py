r"""Units of measure at the end of a normalised answer, or a currency sign at either end.

Rule (docs/verifier.md): both sides have the same unit, or one side has none. A unit is a product of powers of known
units and of counted things (plural nouns), inside `\text{}` or after a blank. Words for numbers or operations (pairs,
sixteenths, reciprocals) are not units. A letter directly after a number is a variable: 6s is not 6.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

_PREFIXES = {"": ""} | dict(
    kilo="k", mega="M", giga="G", tera="T", hecto="h", deci="d", centi="c", milli="m", micro="μ", nano="n"
)
_BASES = dict(
    meter="m", metre="m", gram="g", liter="L", litre="L", second="s", watt="W", joule="J", volt="V", ampere="A",
    amp="A", newton="N", pascal="Pa", hertz="Hz", electronvolt="eV", mole="mol", coulomb="C", tesla="T", ohm="Ω",
    byte="B", bit="b", calorie="cal",
)  # fmt: skip
_ALIASES = """
in inch inches | ft foot feet | yd yard yds | mi mile | lb pound lbs | oz ounce | ton tonne 吨 | gal gallon | acre
mm 毫米 | cm cms 厘米 | m 米 | km kms 千米 | g gm 克 | kg kgs 千克 公斤 | mL 毫升 | L 升 | s sec secs 秒
min minute mins 分钟 | h hr hour hrs 小时 | day 天 | week wk 周 | month 月 | year yr yrs 年 岁 | hectare | kelvin
dollar usd us$ $ 美元 | cent ¢ | euro € 欧元 | pound-sterling £
rupee rs inr ₹ | yuan 元 | yen jpy ¥ | degree deg 度 | degree-f fahrenheit degrees-fahrenheit degrees-f
degree-c celsius degrees-celsius degrees-c | radian rad | unit | person people 人 名 | man men | woman women
child children | mouse mice | am a.m. a.m | pm p.m. p.m | way 种 | time 次 | percent-point | Å angstrom | erg | dyne
atm | cup | teaspoon tsp | tablespoon tbsp | piece 个 只 条 本 张 块 棵 辆 件 颗 支 位
ordered-pair | increase | decrease | probability
"""
_CANONICAL = {
    **{prefix + base: short + symbol for base, symbol in _BASES.items() for prefix, short in _PREFIXES.items()},
    **{word: names.split()[0] for names in _ALIASES.strip().replace("\n", "|").split("|") for word in names.split()},
}
_SLASHED = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "bps": "b/s", "Mbps": "Mb/s", "Gbps": "Gb/s"}
_SYMBOL = re.compile(r"[GMTkhdcmμn]?(?:[mgslLWJVANΩ]|Pa|Hz|eV|mol|cal)|[GMTkmμn][KCTBb]")
_GLUED = re.compile(r"(?:mm|cm|km|kg|mg|ml|mL|lbs?|oz|ft|mph|kmh|[hH]z)(?![a-zA-Z])|[a-zA-Z]{4}")  # cannot be a product
_FACTOR = re.compile(r"([^\s*^\d{}]+)(?:\^?\{?(-?\d)\}?)?(?:[\s*]+|$)")
_PER = re.compile(r" ?/ ?| per | an? (?=[a-z]{3})")
_ASIDE = re.compile(  # words after a unit that do not change it: 20 years old, 3 cups of sugar
    r" (?:each|apiece|long|tall|old|wide|deep|high|thick|away|ago|apart|left|remaining|altogether|overall"
    r"|(?:in )?total|in (?:all|length|height|width|area|volume|weight))$|(?<=[a-z]) of (?:the )?[a-z]+(?: [a-z]+)?$"
)
_RAISED = re.compile(r"(?:(square|sq\.?)|cubic|cu\.?) (.+)|(.+?) (?:(squared)|cubed)|(平方)(.+)|立方(.+)")
_NUMBER_WORD = re.compile(  # also as an adjective: 42 six sevenths, 42 twenty seconds
    r"(?:illion|illionth|teenth|ieth|enth|tuple|uplet|teen)s?\b|\b(?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ies)\b"
    r"|\b(?:quar|quin|sex|sep|oc|non)tets\b"
    r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
)
_NO_NOUNS = frozenset(  # numbers and operations (42 sixteenths is not 42), and words that are not nouns
    """lakhs crores myriads googols grosses minuses pluses duos
    halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths twelfths hundredths thousandths
    ones twos threes fours fives sixes sevens eights nines tens hundreds thousands dozens zeros zeroes percents
    pairs couples scores twins trios singles doubles triples quadruples triplets halfs cubes roots powers
    factorials reciprocals inverses negatives opposites complements conjugates logs logarithms radicals
    exponents differences products quotients sums derivatives integrals limits mods this less plus minus perhaps
    wrongs does unless besides versus approximates equals others sometimes whereas guesses maybes""".split()
)
_NO_ADJECTIVES = _NO_NOUNS | frozenset(
    """not no if is was has about approximately roughly nearly almost under over below above per fewer more or and maybe
    to of by half third quarter hundred thousand dozen double triple twice else times negative factorial choose
    squared cubed""".split()
)
MAX_WORDS = 12  # words of a unit and of the text after it
NOT_OPTIONAL = frozenset(("am", "pm"))  # required if in the gold: 3:45 may be either
_MULTIPLIERS = {  # exponents of ten; capital letters only for money
    "hundred": 2, "thousand": 3, "K": 3, "万": 4, "million": 6, "M": 6, "亿": 8, "billion": 9, "B": 9, "trillion": 12,
}  # fmt: skip

_POWER = r"(?:\^\{?-?\d\}?)?"
_IN_TEXT = re.compile(rf"(.+?)[ ,]*((?:[*/]?\\text\{{[^{{}}]*\}}{_POWER})+)", re.DOTALL)
_CHINESE_OR_SIGN = re.compile(r"(.*?[\d)}%\]]) ?\\?([\u4e00-\u9fff]+|[$€£₹¥¢])", re.DOTALL)
_TAIL_START = re.compile(r"(?<=[\w)}%\]]) (?=[A-Za-z])|(?<=[\d)}])(?=[A-Za-z])")
_SIGN = re.compile(r"\\\$|[$€£₹¥¢]|Rs\.?|\\text\{(?:USD|US\$|Rs\.?)\}|(?:US)\\?\$")
_SCALE = re.compile(r"(?<=\d)(\\text\{)? ?([KMB])(?(1)\})$")  # of money: $70K
_DEGREE = re.compile(  # not \cos 60\degree
    r"((?:(?!\\(?:degree|sin|cos|tan|cot|sec|csc)).)+)\\degree(?:(\\text\{)? ?([CFK])(?(2)\}))?", re.DOTALL
)


class Measure(NamedTuple):
    """Normalised answer without its unit, and the canonical name of the unit ("" for none)."""

    core: str
    unit: str


@lru_cache(maxsize=4096)
def split_unit(text: str) -> Measure:
    """Split a normalised answer into value and unit. The unit is "" if there is none or if the words are not a unit."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    if currency := _SIGN.match(text, len(sign)):
        return _money(text, sign, currency[0], text[currency.end() :])
    if degree := _DEGREE.fullmatch(text):
        return Measure(degree[1], f"degree-{degree[3].lower()}" if degree[3] else "degree")
    return next(filter(None, (_measured(core, words) for core, words in _tails(text))), Measure(text, ""))


def _tails(text: str) -> Iterator[tuple[str, str]]:
    """Yield (core, words) for each way to split words off the end of a text."""
    match = _IN_TEXT.fullmatch(text) or _CHINESE_OR_SIGN.fullmatch(text)
    if match:
        yield match[1], re.sub(r"\\text\{([^{}]*)\}", r" \1", match[2])
    for start in () if "\\text" in text else _TAIL_START.finditer(text):
        words = text[start.end() :]
        known = re.search("[A-Za-z]{2}|[/.]", words) if start[0] else _GLUED.match(words)
        if known and words.count(" ") < MAX_WORDS and re.fullmatch(rf"[A-Za-z./ *-]+{_POWER}", words):
            yield text[: start.start()], words


def _money(text: str, sign: str, currency: str, amount: str) -> Measure:
    """Split an amount of money: `$5`, `-$5`, `$5 per day`, `$5 dollars`, `$70K`, `$48,000/year`."""
    unit = _CANONICAL[re.sub(r"\\text|[\\{}.]", "", currency).lower()]
    amount = _SCALE.sub(lambda scale: f"*10^{{{_MULTIPLIERS[scale[2]]}}}", amount)
    rate = re.fullmatch("([^/]*)(/[a-zA-Z]+)", amount)
    inner = (rate and _measured(rate[1], rate[2])) or split_unit(amount)
    if inner.unit in ("", unit):
        return Measure(sign + inner.core, unit)
    return Measure(sign + inner.core, f"{unit} {inner.unit}") if "^-1" in inner.unit else Measure(text, "")


def _measured(core: str, words: str) -> Measure | None:
    """Return `core` with the unit of `words`; None if they are not a unit."""
    words = " ".join(words.strip(" .,;:").replace("-", " ").split()) if "^" not in words else words.strip()
    words = words.removesuffix(" and")  # 2 hours and 30 minutes
    first, _, rest = words.partition(" ") if words.isascii() else (words[:1], "", words[1:])
    if first.lower() in _MULTIPLIERS:
        core, words = f"{core}*10^{{{_MULTIPLIERS[first.lower()]}}}", rest.removeprefix("s ")
    if words.lower() in ("percent", "pct", "per cent"):
        return Measure(core + "%", "")
    factors = _factors_of(" " + " ".join(_SLASHED.get(word, word) for word in words.split(" ")))
    if factors is None:
        return None
    unit = " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(factors.items()) if power)
    return Measure(core.rstrip(" ,"), unit)


def _factors_of(words: str) -> Counter[str] | None:
    """Return the powers of units in `m/s^2`, ` miles per hour`, ` an hour`, ` cups of sugar each`; None: not a unit."""
    while (shorter := _ASIDE.sub("", words)) != words:
        words = shorter
    total: Counter[str] = Counter()
    for place, part in enumerate(_PER.split(words)):
        factors = _product(part.strip()) if part.strip() or place else []
        if factors is None and place and re.fullmatch("[a-z]{3,}", part) and part not in _NO_ADJECTIVES:
            factors = [(part, 1)]  # per page
        if factors is None:
            return None
        for name, power in factors:
            total[name] += -power if place else power
    return total


def _product(words: str) -> list[tuple[str, int]] | None:
    """Return the (unit, power) of each factor of a product of units, or of counted things; None for other words."""
    if raised := _RAISED.fullmatch(words):
        inner = _product(next(filter(None, (raised[2], raised[3], raised[6], raised[7]))))
        times = 2 if raised[1] or raised[4] or raised[5] else 3
        return inner and [(name, times * power) for name, power in inner]
    together = words.lower().replace(" ", "-") if len(words) > 1 else words
    words = _CANONICAL.get(together) or _CANONICAL.get(together.removesuffix("s")) or words
    factors = [(_known(name), int(power or 1)) for name, power in _FACTOR.findall(words)]
    if factors and all(name for name, _ in factors) and not _FACTOR.sub("", words):
        return factors
    *adjectives, noun = words.lower().split(" ")
    plural = noun.isalpha() and len(noun) >= 4 and noun.endswith("s") and not noun.endswith("ss")
    if not plural or len(adjectives) > 2 or noun in _NO_NOUNS or _NUMBER_WORD.search(words.lower()):
        return None
    described = all(word.isalpha() and word not in _NO_ADJECTIVES for word in adjectives)
    return [(" ".join([*adjectives, noun[:-1]]), 1)] if described else None


def _known(word: str) -> str:
    """Return the canonical name of a unit; "" if it is unknown. Symbols are case-sensitive (mW, MW), words are not."""
    lower = word.lower() if len(word) > 1 else word
    for spelled in (word, lower, lower.rstrip("."), lower.removesuffix("s") if len(lower) > 3 else lower):
        if spelled in _CANONICAL:
            return _CANONICAL[spelled]
    return re.sub("(?<!mo|ca)l$", "L", word) if _SYMBOL.fullmatch(word) else ""
