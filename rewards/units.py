r"""Units of measure at the end (or a currency sign at the front) of a normalised answer.

The rule (docs/verifier.md): both sides carry the same unit, or the answer alone carries one. What counts as a unit is a
known word or a plural noun, inside `\text{}` or after a blank, but no number or operation (pairs, sixteenths, roots);
a letter glued to a number is a variable: 6s is not 6.
"""

import re
from functools import lru_cache
from typing import NamedTuple

_ALIASES = """
mm millimeter millimetre 毫米 | cm centimeter centimetre cms 厘米 | m meter metre 米 | km kilometer kilometre kms 千米
in inch inches | ft foot feet | yd yard yds | mi mile | nm nanometer nanometre | mg milligram | g gram gm 克
kg kilogram kgs 千克 公斤 | lb pound lbs | oz ounce | ton tonne 吨 | ml milliliter millilitre 毫升 | l liter litre 升
gal gallon | s sec second secs 秒 | min minute mins 分钟 | h hr hour hrs 小时 | day 天 | week 周 | month 月
year yr yrs 年 岁 | ms millisecond | dollar usd $ 美元 | cent | euro € 欧元 | pound-sterling £
rupee rs inr ₹ | yuan 元 | yen jpy ¥
degree deg 度 | degree-f | degree-c | radian rad | mph mi/h | kmh km/h kph kmph | unit | square | sq-unit
person people 人 名 | man men | woman women | child children | mouse mice | foot-pound | v volt | w watt kw
a amp ampere | n newton | j joule | hz hertz | mol mole | kelvin | pa pascal | am a.m. a.m | pm p.m. p.m
acre | hectare | way 种 | time 次 | percent-point | coulomb | tesla | ev | atm | erg | dyne
increase | decrease | probability | cup | teaspoon tsp | tablespoon tbsp | piece 个 只 条 本 张 块 棵 辆 件 颗 支 位
"""  # fmt: skip
_CANONICAL = {
    word: group.split()[0]
    for line in _ALIASES.strip().splitlines()
    for group in line.split("|")
    for word in group.split()
}
_CANONICAL["ordered pairs"] = "ordered pair"  # pairs alone would be twice as many
_SINGLE_LETTERS = frozenset(word for word in _CANONICAL if len(word) == 1 and word.isascii())
_GLUED = "mm|cm|km|kg|mg|ml|lbs?|oz|ft|mph|kmh|[hH]z"  # no product that anybody writes
_TENS = "(?:twen|thir|for|fif|six|seven|eigh|nine)"
_NUMBER_WORD = re.compile(  # also as an adjective: 42 six sevenths, 42 twenty seconds
    rf"(?:illion|illionth|teenth|ieth|enth|tuple|uplet|teen)s?\b|\b{_TENS}t(?:y|ies)\b|\b(?:quar|quin|sex|sep|oc|non)tets\b"
    r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
)
_POWER = re.compile(r"(square |sq\.? |cubic |cu |平方|立方)(.+)|(.+?)( squared| cubed|[23])")
_SQUARES = frozenset(("square", "sq", "sq.", "平方", "squared", "2"))
_NO_NOUNS = frozenset(  # numbers and operations (42 sixteenths is not 42), and what is no noun at all
    """lakhs crores myriads googols grosses minuses pluses duos
    halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths twelfths hundredths thousandths
    ones twos threes fours fives sixes sevens eights nines tens hundreds thousands dozens zeros zeroes percents
    pairs couples scores twins trios singles doubles triples quadruples triplets halfs cubes roots powers multiples
    factors factorials reciprocals inverses negatives opposites complements conjugates logs logarithms radicals
    exponents differences products quotients sums derivatives integrals limits mods this less plus minus perhaps
    wrongs solutions does unless besides versus approximates equals others sometimes whereas guesses maybes
    possibilities options""".split()
)
_NO_ADJECTIVES = _NO_NOUNS | frozenset(
    """not no if is was has about approximately roughly nearly almost under over below above per fewer more or and maybe
    to of by half third quarter hundred thousand dozen double triple twice else times negative""".split()
)
NOT_OPTIONAL = frozenset(("am", "pm"))  # in a gold: 3:45 may be either
_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}

_TAILS = (
    (re.compile(r"(.+?)\\text\{([^{}]*)\}(?:\^\{?([23])\}?)?(/\\text\{[^{}]*\}(?:\^\{?[23]\}?)?)?", re.DOTALL), True),
    (re.compile(r"(.*?[\d)}%\]]) ?([\u4e00-\u9fff]+)()()", re.DOTALL), True),
    (re.compile(r"(.*?[\d)}%]) ([A-Za-z][A-Za-z./ ]*)(?:\^\{?([23])\}?)?()", re.DOTALL), False),
    (re.compile(r"(.*[\w)}%\]]) ([A-Za-z][A-Za-z./ ]*?)(?:\^\{?([23])\}?)?()", re.DOTALL), False),
    (re.compile(rf"(.*[\d)}}])({_GLUED})(?:\^\{{?([23])\}}?)?()", re.DOTALL), False),
)
_CURRENCY = re.compile(r"([+-]?)(?:(\\\$|[$€£₹¥]|Rs\.?)|\\text\{(USD|US\$|Rs\.?)\}|(?:US)\\?\$)([+-]?.+)", re.DOTALL)
_DEGREE = re.compile(r"(.+)\\degree(?:\\text\{ ?([CFK])\}| ?([CFK]))?", re.DOTALL)


class Measure(NamedTuple):
    """A normalised answer without its unit, and the unit's one name ("" for none)."""

    core: str
    unit: str


@lru_cache(maxsize=4096)
def split_unit(text: str) -> Measure:
    """Cut the unit off a normalised answer; the unit is "" when there is none or when the words are no unit."""
    if text[-1:].isdigit() and text[:1].isdigit():
        return Measure(text, "")
    currency = _CURRENCY.fullmatch(text)
    if currency:
        return _money(text, currency)
    degree = _DEGREE.fullmatch(text)
    if degree and "\\degree" not in degree[1] and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", degree[1]):
        scale = (degree[2] or degree[3] or "").lower()
        return Measure(degree[1], f"degree-{scale}" if scale else "degree")
    for pattern, letters_count in _TAILS:
        tail = pattern.fullmatch(text)
        if tail and "\\text" not in tail[1]:
            under = (tail[4] or "").replace("\\text", "").translate(str.maketrans("", "", "{}^"))
            measure = _measure(text, tail[1], tail[2] + under, tail[3], letters_count=letters_count)
            if measure.core != text:
                return measure
    return Measure(text, "")


def _money(text: str, currency: re.Match[str]) -> Measure:
    """`$5`, `-$5`, `$5 per day`, `$5 dollars`, `$70K`."""
    unit = _CANONICAL[(currency[2] or currency[3] or "usd").removeprefix("\\").lower().rstrip(".")]
    scaled = re.fullmatch(r"(.*\d)(?:\\text\{([KMB])\}| ?([KMB]))", currency[4])
    if scaled:
        exponent = {"K": 3, "M": 6, "B": 9}[scaled[2] or scaled[3]]
        return Measure(f"{currency[1]}{scaled[1]}*10^{{{exponent}}}", unit)
    inner = split_unit(currency[4])
    if inner.unit not in ("", unit) and not inner.unit.startswith("/"):
        return Measure(text, "")
    return Measure(currency[1] + inner.core, unit + (inner.unit if inner.unit.startswith("/") else ""))


def _measure(text: str, core: str, words: str, power: str | None, *, letters_count: bool) -> Measure:
    words = " ".join(words.lower().replace("-", " ").split()).removeprefix("of a ")
    first, _, rest = words.partition(" ") if words.isascii() else (words[:1], "", words[1:])
    if first in _MULTIPLIERS:
        core, words = f"{core}*10^{{{_MULTIPLIERS[first]}}}", rest.removeprefix("s ")
        if not words:
            return Measure(core, "")
    if words in ("percent", "pct", "per cent"):
        return Measure(core + "%", "")
    if not letters_count and words in _SINGLE_LETTERS:
        return Measure(text, "")
    unit = _unit_name(words)
    return Measure(core.rstrip(" ,"), f"{unit}^{power}" if power else unit) if unit else Measure(text, "")


def _unit_name(words: str) -> str:
    """One name for a unit: singular, abbreviated, `square x` as x^2, `x per y` as x/y; "" for words that are none."""
    for divider in (" per ", "/"):
        over, found, under = f" {words}".partition(divider)
        if found:
            upper, lower = _unit_name(over.strip()), _unit_name(under)
            return _CANONICAL.get(f"{upper}/{lower}", f"{upper}/{lower}") if lower and (upper or not over) else ""
    raised = _POWER.fullmatch(words)
    if raised:
        name, power = _unit_name(raised[2] or raised[3]), 2 if (raised[1] or raised[4]).strip() in _SQUARES else 3
        return f"{name}^{power}" if name else ""
    for known in (words, words.rstrip("."), words.removesuffix("s") if len(words) > 3 else words):
        if known in _CANONICAL:
            return _CANONICAL[known]
    *adjectives, noun = words.split(" ")
    plural = noun.isalpha() and len(noun) >= 4 and noun.endswith("s") and not noun.endswith("ss")
    if not plural or len(adjectives) > 1 or noun in _NO_NOUNS or _NUMBER_WORD.search(words):
        return ""
    described = all(word.isalpha() and word not in _NO_ADJECTIVES for word in adjectives)
    return " ".join([*adjectives, noun[:-1]]) if described else ""
