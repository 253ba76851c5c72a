r"""Canonical spelling of answers: LaTeX, Unicode and plain-text variants become the same short string.

`normalize` never changes a value. parts.py and compare.py interpret the result. Normalised form:

- blanks only between two letters or digits
- `\frac{a}{b}`, `*` for products, `^{..}`, `\{ \}`, `|`, `%`, `\degree`, `\leq \geq \neq`, `\emptyset`, `\infty`,
  `\pmod{n}`, `¶` between the rows of an environment
- words and units inside `\text{...}`; a text answer is one `\text{...}` in lower case
"""

import re
from functools import lru_cache

ROW = "¶"  # row separator of a matrix, to distinguish it from a backslash

_CHARACTERS = {
    "-": "−–—‐‑﹣－", "+": "＋", "=": "＝", "*": "×⋅·∙∗", "/": "÷⁄∕", "\\pi ": "π", "\\infty ": "∞", "\\leq ": "≤⩽",
    "\\geq ": "≥⩾", "\\neq ": "≠", "\\approx ": "≈", "\\pm ": "±", "\\mp ": "∓", "\\degree ": "°º", "\\cup ": "∪",
    "\\cap ": "∩", "\\in ": "∈", "\\emptyset ": "∅⌀ø", "\\mathbb{R}": "ℝ", "\\mathbb{Z}": "ℤ", "\\theta ": "θ",
    "\\alpha ": "α", "\\beta ": "β", "\\langle ": "⟨〈", "\\rangle ": "⟩〉", "\\ldots ": "…", "\\sqrt ": "√", "%": "％",
    "μ": "µ", "Å": "Å",
    ",": "，、", "(": "（", ")": "）", ":": "：", ";": "；", ".": "。", "'": "’‘′", '"': "“”″", "\\equiv ": "≡",
    " ": "\u00a0\u2009\u202f\u2002\u2003\u200a\u3000", "": "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u2061\ufe0f",
    **{f"\\frac{{{pair[0]}}}{{{pair[1]}}}": sign for pair, sign in zip(
        "12 13 23 14 34 15 16 18 38 58 78".split(), "½⅓⅔¼¾⅕⅙⅛⅜⅝⅞", strict=True)},
    **{f"^{{{digit}}}": sign for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{f"_{{{digit}}}": sign for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{str(digit): chr(0xFF10 + digit) for digit in range(10)},
}  # fmt: skip
_TRANSLATION = {ord(variant): spelling for spelling, variants in _CHARACTERS.items() for variant in variants}

_COMMANDS = {
    command: spelling
    for spelling, commands in {
        "\\frac": "dfrac tfrac cfrac", "\\binom": "dbinom tbinom",
        "": "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle mathbf boldsymbol bm "
        "mathit mathsf mathnormal mathtt pmb ensuremath underline boxed fbox",
        " ": "displaystyle textstyle scriptstyle limits nolimits bf rm it sf tt boldmath large Large LARGE huge Huge "
        "small normalsize quad qquad enspace thinspace medspace space nobreakspace",
        "\\text": "mbox textrm textbf textit textnormal textsf texttt mathrm operatorname hbox textup",
        "*": "cdot times ast", "|": "vert lvert rvert mid", "\\leq ": "le leqslant leqq", "\\geq ": "ge geqslant geqq",
        "\\ldots ": "dots cdots dotsc", "\\approx ": "simeq thickapprox", "\\degree ": "degrees textdegree",
        "/": "div", "\\log_{10}": "lg", "\\neq ": "ne", "<": "lt", ">": "gt", "\\{": "lbrace", "\\}": "rbrace",
        "[": "lbrack", "]": "rbrack", "\\emptyset ": "varnothing", "\\infty ": "infin", "i": "imath", ":": "colon",
        ",": "lor", "\\land ": "wedge", "€": "euro", "\\text{Å}": "AA",
        "£": "pounds", "\\$": "textdollar dollar", "%": "percent",
        "\\cup ": "bigcup", "\\cap ": "bigcap", "\\setminus ": "backslash smallsetminus", "\\mod ": "bmod",
    }.items()
    for command in commands.split()
}  # fmt: skip
FUNCTIONS = frozenset(
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp lg lcm gcd max min det arg".split()
)
_COMMAND = re.compile(r"\\([A-Za-z]+)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\s*(\{|\\sqrt\{[^{}]*\}|\\[a-zA-Z]+|[0-9a-zA-Z])")
_ARGUMENTS = re.compile(r"\\(?:frac|binom)(?![a-zA-Z])")
_SPACING = re.compile(r"\\[,;:> ]|~|\\\n|\s+|\\hspace\*?\{[^{}]*\}")
_EDGE = r"(?:[ \t\r\n,;~]|\\[,;:!> ]|\\\\(?![a-zA-Z])|\\q?quad(?![a-zA-Z])|\\(?:blacks|s)quare|\\checkmark)+"
_EDGES = re.compile(rf"^{_EDGE}|(?<![ \t\r\n,;~]){_EDGE}$")
_PRAISE = re.compile(r"(?:\s|[✅✔✓☑✨⭐🎉🎊🏆👍💯🔥🌟🙂😀😊😄])+$")  # removed at the end; a cross stays and is rejected
_TEXT_GROUP = re.compile(  # with groups inside
    r"\\text\s*\{((?:\\.|[^{}\\]|\{(?:\\.|[^{}\\]|\{[^{}]*\})*+\})*+)\}", re.DOTALL
)
_PLAIN_JOINER = re.compile(r"(?<=[ )\]}])(and|or)(?=[ (\[])")
_SEVERAL_EACH = re.compile(r"=[^;=]*,[^;=]*=.* or .*=[^;=]*,[^;=]*=", re.DOTALL)  # x=1,y=2 or x=3,y=4


def _rules(*rows: tuple[str, str, str]) -> list[tuple[str, re.Pattern[str], str]]:
    return [(needed, re.compile(pattern), spelling) for needed, pattern, spelling in rows]


_INFIX = r"(\{)?((?:[^{}\\]|\\(?!NAME))*+)\\NAME(?![a-zA-Z])((?:[^{}\\]|\\(?!NAME))*+)(?(1)\}|$)"
# (text that must occur, pattern, spelling), applied in this order.
_BEFORE_COMMANDS = _rules(
    ("\\!", r"\\!\s*", ""), ("{", r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))", ""), ("{,}", r"\{,\}", ","),
    ("\\%", r"\\%", "%"), ("**", r"\*\*", "^"), ("...", r"\.\.\.", r"\\ldots "),
    ("\\begin", r"\\\\(?:\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\])?", ROW),  # \\[4pt]
    ("{:}", r"\{:\}", ":"), ("{=}", r"\{=\}", "="), ("$", r"(?<!\\)\$", " "),
    ("color", r"\\(?:textcolor|colorbox|color)\{[^{}]*\}", ""), (".", r"\\(?:left|right)\s*\.", ""),
    ("\\not", r"\\not\s*(?:=|\\in(?![a-z]))", r"\\neq "),
)  # fmt: skip
_BEFORE_TEXTS = _rules(
    ("^", r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-zA-Z])|\^\s*o$", r"\\degree "),
    ("", _SPACING.pattern, " "),
    ("mod", r"\(\s*(?:\\?mod|\\text\s*\{ ?mod ?\})\s*([^()]+?)\s*\)|\\pmod\s*(\w+)|\\mod\s*(\w+)$", r"\\pmod{\1\2\3}"),
    ("half", r"(?<=\d) ?(?:\\text\{)? ?and a half\}?", r"\\frac{1}{2}"),
    ("\\frac", r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}(?:\^\{?(\d)\}?)?\}", r"\\text{\1/\2\3}"),
)  # fmt: skip
_BEFORE_BRACES = _rules(
    ("infinity", r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty "),
    ("", r"(?<![\\a-zA-Z])(pi|sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp)(?![a-zA-Z])", r"\\\1 "),
    ("\\over", _INFIX.replace("NAME", "over"), r"\\frac{\2}{\3}"),
    ("C(", r"(?<![a-zA-Z\\])C\((\d*[nmkN](?:[+-]\d+)?),\s*(\w+)\)", r"\\binom{\1}{\2}"),  # C(1,2) is a point
    ("\\choose", _INFIX.replace("NAME", "choose"), r"\\binom{\2}{\3}"),
    ("\\sqrt", r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), ("^", r"(\d)\s*[xX]\s*(10\s*\^)", r"\1*\2"),
    ("<=", "<=", r"\\leq "), (">=", ">=", r"\\geq "), ("!=", r"(?<![\d)}\]!])!=", r"\\neq "),
    ("\\mu", r"\\mu\s*\\text\{ ?", r"\\text{μ"),
    ("\\", r"\\(sqrt|dot|bar|overline|mathbb|hat|vec|tilde)\s*([0-9a-zA-Z])", r"\\\1{\2}"),
)  # fmt: skip
_AT_LAST = _rules(
    ("to", r"(\d)\s*(?:\\text\{to\}|to)\s*(\d)", r"\1:\2"),  # 3 to 2
    ("", r"(\d)\s*\^?\{?(?:\\text\{)?(st|nd|rd|th)\}*$", r"\1\2"),  # 5th
    ("", r"([\^_])\s*(-?\d+|-?[a-zA-Z]|\\[a-zA-Z]+)(?!\{)", r"\1{\2}"),
    ("{", r"(?<![\w}\\^_\])])\{(-?[\w.,]+)\}", r"\1"),  # {42}, after removing \bf
    ("+", r"(?<![\w})\]!|%])\+(?=\\infty|\d|\\frac)", ""),  # unary plus
)  # fmt: skip
_MATHS_IN_TEXT = re.compile(
    r"\s*[-+\\$]|\s*\(?[-+]?\d[\d,.:/]*\)?%?(?:\s|$)|[^=\\]*[=\\]|\s*\d+[A-F]|\s*\(?[A-Za-z]\)?\s*$"
)
_TEXT = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|textnormal)\s*\{([^{}]*)\}")
_AFTER_NUMBER = re.compile(r"[\w}%)][ ,]*$|\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?[*/ ]*$")
_LOOSE_BLANK = re.compile(r"(?<![\w.,]) |(?<=,) (?!\d{3}(?!\d))|(?<!\d,)(?<=,) | (?![\w.])")
_ROOT = re.compile(r"√(\d+)")
_DOUBLED = re.compile(r"(?<!\\)\\\\begin")
_UNIT_OUTSIDE = re.compile(r"^\$([^$]+)\$\s*([A-Za-z][A-Za-z ./]*)$")  # $5$ cm
_LEAD = re.compile(  # text of a sentence before its value: "The value of $n$ is", "There are", "Domain:"
    r"(?i)(?:(?:so|thus|hence|therefore|then|finally)[,\s]+)?(?:there (?:are|is)(?=\s)"
    r"|(?:the|my|our|its|it|this|answer|result|solution)\b[^=<>.;?!]*?\s(?:is|are|equals)(?=[\s$:*]|\\)"
    r"|(?:(?:the|my|our|final)\s+)*(?:answer|result|solution)\s*[=:]|[a-z]{4,}\s*:(?=\s)):?\s*"
)
_SENTENCE = re.compile(r"[A-Za-z][a-z']*(?:,?\s+[A-Za-z'][a-z']*)+?\s+(?=[*$(\\-]*\d)")  # The class found
_ENDING = re.compile(  # 30 eggs in the garden
    r"(\\?\$\d[\d,.]*|-?\d[\d,.]*(?:\\?%|(?: [a-z]+){1,3}?)) (?:altogether |in total )?"
    r"(?:in|of|for|from|at|on|over|during|after|by) [A-Za-z ,']+"
)
_NEEDED = re.compile(  # needs $5 more (dollars) (to buy the wallet)
    r"(?i)(\bneeds? \\?\$?\d[\d,.]*(?: [a-z]+)?) more(?: to buy [a-z ]+)?(?=\.?$| [a-z]+\.?$)"
)
_VERB = re.compile(
    r"\b(?:are|was|has|have|had|found|made|paid|spent|got|ate|won|sold|took|gave|will|can|need|should|must|would|to|[a-z]{2,}(?:ed|s))\b"
)
_DENIED = re.compile(
    r"(?i)n't\b|\b(?:not?|nobody|nothing|none|never|nor|neither|wrong\w*|incorrect\w*|false|or|either|maybe|perhaps|possibly|otherwise"
    r"|else|unless|if|might|(?<!that )could|may)\b"
)
_QUALIFIED = re.compile(
    r"(?i)\b(?:than|least|most|about|around|approximately|roughly|nearly|almost|over|under|below|above|between|half|twice"
    r"|double|triple|times|minus|negative|except|without|but|up to|another|extra|every|percent|by|from)\b"
)
_TEXT_WORDS = re.compile(r"[a-z][a-z ,.'&/\-]*")
_KNOWN_WORDS = frozenset("yes no true false even odd none all dne max min never always both".split())
_SYNONYMS = re.compile(
    r"^((?:the \w+ )?does not exist$)|^(no (?:\w+ )?solution)s$|^((?:all |the )?real(?: number)?s(?: x)?)$"
)
_NOT_TEXT = FUNCTIONS | frozenset(("sqrt", "infinity", "frac"))
_PRICE = re.compile(r"\$\d[\d,.]*(?:/[a-z]+| [a-z].*)")  # $15/hour: a currency sign, not a delimiter
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("$", "$"), ("*", "*"), ("`", "`"), ("__", "__"), ('"', '"'))


@lru_cache(maxsize=1 << 16)
def normalize(answer: str) -> str:
    """Return the canonical spelling of an answer (see the module docstring); "" if nothing is left."""
    text = answer.strip().replace("\x00", " ").replace("US$", "\\$")
    if text.isdecimal() and text.isascii():
        return text
    text = _unwrap(text if text.isascii() else _PRAISE.sub("", _ROOT.sub(r"\\sqrt{\1}", text).translate(_TRANSLATION)))
    text = _UNIT_OUTSIDE.sub(r"\1\\text{\2}", text)
    if "\\\\" in text and ("\\begin" not in text or _DOUBLED.search(text)):  # escaped backslash, not a row separator
        text = _unwrap(text.replace("\\\\", "\\"))
    text = without_lead(text)
    words = _as_words(text)
    return "\\mathbb{R}" if words == "reals" else f"\\text{{{words}}}" if words else _normalize_math(text)


def without_lead(text: str) -> str:
    """Return the value in a sentence (see _LEAD and _SENTENCE); other text is unchanged."""
    plain = _TEXT.sub(r"\1", text) if text.startswith("\\text") else text
    plain = _NEEDED.sub(r"\1", plain)
    lead = _LEAD.match(plain) or _SENTENCE.match(plain)
    if not lead or _DENIED.search(lead[0]):
        return text
    if lead.re is _SENTENCE and (_QUALIFIED.search(lead[0]) or not _VERB.search(lead[0])):
        return text
    value = _unwrap(plain[lead.end() :])
    ending = _ENDING.fullmatch(value)
    return ending[1] if ending and not _DENIED.search(value) else value


def _unwrap(text: str) -> str:
    """Strip blanks, the final full stop, and delimiters around the whole text."""
    for _ in range(20):
        before, text = text, _EDGES.sub("", text).removesuffix("\\")
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            if inner and text.startswith(opening) and text.endswith(closing) and not inner.endswith("\\"):
                text = text if opening in inner.replace("\\$", "") else inner
        if text.startswith("$") and text.replace("\\$", "").count("$") == 1:
            text = f"\\{text}" if _PRICE.fullmatch(text) else text[1:]
        if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


def closing_brace(text: str, opening: int, stop: int | None = None) -> int:
    """Return the index of the brace that closes the one at `opening`, -1 if there is none before `stop`.

    Escaped braces are skipped.
    """
    depth = 0
    for token in _BRACE.finditer(text, opening, len(text) if stop is None else stop):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return token.start()
    return -1


def _as_words(text: str) -> str:
    """Return a text answer in lower case; "" if `text` is mathematics."""
    bare = _TEXT.sub(r"\1", text)
    plain = " ".join(_SPACING.sub(" ", bare).split()).strip(" .,").lower()
    words = re.findall("[a-z]+", plain)
    if not _TEXT_WORDS.fullmatch(plain) or _NOT_TEXT.intersection(words):
        return ""
    word_like = any(len(word) >= 4 or word in _KNOWN_WORDS for word in words)
    plain = _SYNONYMS.sub(lambda m: "dne" if m[1] else m[2] or "reals", plain)
    return plain if word_like or (bare != text and plain.isalpha() and len(plain) > 1) else ""


def _normalize_math(text: str) -> str:
    text = _apply_rules(text, _BEFORE_COMMANDS)
    text = _COMMAND.sub(_one_command, text) if "\\" in text else text
    text = _apply_rules(text, _BEFORE_TEXTS)
    pieces = _TEXT_GROUP.split(text)  # groups at odd places
    for place in range(1, len(pieces), 2):
        pieces[place] = _one_text(pieces[place].strip(), "".join(pieces[max(0, place - 2) : place]))
    text = "".join(pieces)
    both = " \\land " if re.search(r"[<>]|\\[lgn]eq", text) else " , "  # "and" between inequalities is an intersection
    either = " ; " if " or " in text and _SEVERAL_EACH.search(text) else " , "
    text = _PLAIN_JOINER.sub(lambda m: both if m[1] == "and" else either, text)
    text = _apply_rules(text, _BEFORE_BRACES)
    text = _in_braces(text) if "\\frac" in text or "\\binom" in text else text
    text = _squeeze(_apply_rules(text, _AT_LAST))
    if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    return "\\emptyset" if text in ("\\{\\}", "\\{\\emptyset\\}") else text


def _apply_rules(text: str, rules: list[tuple[str, re.Pattern[str], str]]) -> str:
    for needed, pattern, spelling in rules:
        if needed in text:
            text = pattern.sub(spelling, text)
    return text


def _in_braces(text: str) -> str:
    r"""Put both arguments of `\frac12`, `\frac1{72}`, `\binom n2` in braces, from the last command to the first.

    As in TeX, an argument is a group in braces or one token.
    """
    for command in reversed(list(_ARGUMENTS.finditer(text))):
        arguments, end = [], command.end()
        while len(arguments) < 2 and (token := _TOKEN.match(text, end)):
            braces = token[1] == "{"
            end = closing_brace(text, token.end() - 1) + 1 if braces else token.end()
            if end == 0:
                return text
            arguments.append(text[token.end() : end - 1] if braces else token[1])
        if len(arguments) == 2:
            text = f"{text[: command.end()]}{{{arguments[0]}}}{{{arguments[1]}}}{text[end:]}"
    return text


def _one_command(match: re.Match[str]) -> str:
    name, follows = match[1], match.string[match.end() : match.end() + 1]
    return _COMMANDS.get(name, f"\\{name} " if follows.isalpha() else f"\\{name}")


def _one_text(inner: str, before: str) -> str:
    r"""Remove `\text{}` around mathematics. Words keep it, and so do units after a number."""
    after_number = _AFTER_NUMBER.search(before) is not None
    if inner in FUNCTIONS and not (after_number and inner == "min"):
        return f"\\{inner} "
    if inner.strip(", ") in ("and", "or"):
        return f" {inner.strip(', ')} "
    if not inner.strip(".,;:"):
        return inner.strip(".:") or " "
    depth = sum((brace == "{") - (brace == "}") for brace in _BRACE.findall(before))
    in_group = len(inner) == 1 and depth > 0  # \frac{3\mathrm{n}}{2}
    if inner in ("e", "i", "infinity") or in_group or (not after_number and _MATHS_IN_TEXT.match(inner)):
        return inner
    return f"\\text{{{re.sub(r'[{}^]', '', ' '.join(inner.split()))}}}"


def _squeeze(text: str) -> str:
    """Remove redundant blanks, and those before `\\text{`.

    A blank between two letters or digits stays, as does the one in `2, 100`, a list of two numbers.
    """
    text = re.sub(r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1", " ".join(text.split()))
    parts = re.split(r"(\\text\{[^{}]*\})", text)
    parts[::2] = [_LOOSE_BLANK.sub("", part) for part in parts[::2]]
    return "".join(parts)
