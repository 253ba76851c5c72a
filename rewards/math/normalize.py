r"""One spelling for one answer: LaTeX, Unicode and plain-text variants become the same short string.

`normalize` is cosmetic: it never changes a value; what a spelling means is for parts.py and compare.py.
Normalised form: no blanks but between two letters or digits; `\frac{a}{b}`, `*` for products, `^{..}`, `\{ \}`, `|`,
`%`, `\degree`, `\leq \geq \neq`, `\emptyset`, `\infty`, `\pmod{n}`; `¶` between the rows of an environment; words,
units and their like inside `\text{...}`; a text answer is one `\text{...}` in lower case.
"""

import re
from collections.abc import Callable
from functools import lru_cache

ROW = "¶"  # stands for the row separator of a matrix, so that it is not mistaken for a backslash

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
_MODULUS = re.compile(r"\(\s*(?:\\?mod|\\text\s*\{ ?mod ?\})\s*([^()]+)\)|\\pmod\s*(\w+)|\\mod\s*(\w+)$")
_WORD_SYMBOLS = re.compile(r"(?<![\\a-zA-Z])(pi|infinity|sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp)(?![a-zA-Z])")
_SPACING = re.compile(r"\\[,;:> ]|~|\\\n|\s+|\\hspace\*?\{[^{}]*\}")
_EDGE = r"(?:[ \t\r\n,;~]|\\[,;:!> ]|\\\\(?![a-zA-Z])|\\q?quad(?![a-zA-Z])|\\(?:blacks|s)quare|\\checkmark)+"
_EDGES = re.compile(rf"^{_EDGE}|(?<![ \t\r\n,;~]){_EDGE}$")
_PRAISE = re.compile(r"(?:\s|[✅✔✓☑✨⭐🎉🎊🏆👍💯🔥🌟🙂😀😊😄])+$")  # at the end; a cross is left there and refused
_TEXT_COMMAND = re.compile(r"\\text(?=\s*\{)")
_AND_A_HALF = re.compile(r"(?<=\d) ?(?:\\text\{)? ?and a half\}?")
_PLAIN_JOINER = re.compile(r"(?<=[ )\]}])(and|or)(?=[ (\[])")
_SEVERAL_EACH = re.compile(r"=[^;=]*,[^;=]*=.* or .*=[^;=]*,[^;=]*=", re.DOTALL)  # x=1,y=2 or x=3,y=4
_NO_SPACE = re.compile(r"\\!\s*")
_THOUSANDS = re.compile(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))")
_INEQUALITY = re.compile(r"[<>]|\\[lgn]eq")
_ROW_SPACE = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]")  # \\[4pt]
_LAYOUT = re.compile(r"\\(?:textcolor|colorbox|color)\{[^{}]*\}|\\(?:left|right)\s*\.")
_DOUBLED = re.compile(r"(?<!\\)\\\\begin")
_NEGATED = re.compile(r"\\not\s*(?:=|\\in(?![a-z]))")
_DEGREE = re.compile(r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-zA-Z])|\^\s*o$")
_INFIX = re.compile(r"(\{)?([^{}]*)\\(over|choose)(?![a-zA-Z])([^{}]*)(?(1)\}|$)")
_RESPELLED = [(re.compile(pattern), spelling) for pattern, spelling in (
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(\d)\s*[xX]\s*(10\s*\^)", r"\1*\2"),
    (r"<=", r"\\leq "), (r">=", r"\\geq "), (r"(?<![\d)}\]!])!=", r"\\neq "),
    (r"\\mu\s*\\text\{ ?", r"\\text{μ"),
    (r"\\(sqrt|dot|bar|overline|mathbb|hat|vec|tilde)\s*([0-9a-zA-Z])", r"\\\1{\2}"),
)]  # fmt: skip
_RESPELLED_AT_LAST = [(re.compile(pattern), spelling) for pattern, spelling in (
    (r"(\d)\s*(?:\\text\{to\}|to)\s*(\d)", r"\1:\2"),  # 3 to 2
    (r"(\d)\s*\^?\{?(?:\\text\{)?(st|nd|rd|th)\}*$", r"\1\2"),  # 5th
    (r"([\^_])\s*(-?\d+|-?[a-zA-Z]|\\[a-zA-Z]+)(?!\{)", r"\1{\2}"),
    (r"(?<![\w}\\^_\])])\{(-?[\w.,]+)\}", r"\1"),  # {42}, what a dropped \bf leaves
    (r"(?<![\w})\]!|%])\+(?=\\infty|\d|\\frac)", ""),  # a plus sign that only says "positive"
)]  # fmt: skip
_MATHS_IN_TEXT = re.compile(
    r"\s*[-+\\$]|\s*\(?[-+]?\d[\d,.:/]*\)?%?(?:\s|$)|[^=\\]*[=\\]|\s*\d+[A-F]|\s*\(?[A-Za-z]\)?\s*$"
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AFTER_NUMBER = re.compile(r"[\w}%)][ ,]*$|\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?[*/ ]*$")
_LOOSE_BLANK = re.compile(r"(?<![\w.,]) |(?<=,) (?!\d{3}(?!\d))|(?<!\d,)(?<=,) | (?![\w.])")
_ROOT = re.compile(r"√(\d+)")
_UNIT_OUTSIDE = re.compile(r"^\$([^$]+)\$\s*([A-Za-z][A-Za-z ./]*)$")  # $5$ cm
_UNIT_FRACTION = re.compile(r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}(?:\^\{?(\d)\}?)?\}")
_LEAD = re.compile(  # what a sentence says before its value: "The value of $n$ is", "There are", "Domain:"
    r"(?i)(?:(?:so|thus|hence|therefore|then|finally)[,\s]+)?(?:there (?:are|is)(?=\s)"
    r"|(?:the|my|our|its|it|this|answer|result|solution)\b[^=<>.;?!]*?\s(?:is|are|equals)(?=[\s$:*]|\\)"
    r"|(?:(?:the|my|our|final)\s+)*(?:answer|result|solution)\s*[=:]|[a-z]{4,}\s*:(?=\s)):?\s*"
)
_SENTENCE = re.compile(r"[A-Za-z][a-z']*(?:,?\s+[A-Za-z'][a-z']*)+?\s+(?=[*$(\\-]*\d)")  # The class found
_ENDING = re.compile(  # 30 eggs in the garden
    r"(\\?\$?-?\d[\d,.]*%?(?: [a-z]+){0,3}?) (?:altogether |in total )?"
    r"(?:in|of|for|from|at|on|over|during|after|by) [A-Za-z ,']+"
)
_VERB = re.compile(
    r"\b(?:are|was|has|have|had|found|made|paid|spent|got|ate|won|sold|took|gave|will|can|need|should|must|would|to|[a-z]{2,}(?:ed|s))\b"
)
_DENIED = re.compile(
    r"(?i)n't\b|\b(?:not?|never|nor|neither|wrong\w*|incorrect\w*|false|or|either|maybe|perhaps|possibly|otherwise"
    r"|else|unless|if|might|(?<!that )could|may)\b"
)
_QUALIFIED = re.compile(
    r"(?i)\b(?:than|least|most|about|around|approximately|roughly|nearly|almost|over|under|below|above|between|half|twice"
    r"|double|triple|times|minus|negative|except|without|but|up to|another|extra|every|percent|by|from)\b"
)
_TEXT_WORDS = re.compile(r"[a-z][a-z ,.'&/\-]*")
_TEXT_COMMANDS = re.compile(r"\\(?:mbox|textrm|textbf|textit|mathrm|textnormal)(?=\s*\{)")
_KNOWN_WORDS = frozenset("yes no true false even odd none all dne max min never always both".split())
_SYNONYMS = re.compile(
    r"^((?:the \w+ )?does not exist$)|^(no (?:\w+ )?solution)s$|^((?:all |the )?real(?: number)?s(?: x)?)$"
)
_NOT_TEXT = FUNCTIONS | frozenset(("sqrt", "infinity", "frac"))
_PRICE = re.compile(r"\$\d[\d,.]*(?:/[a-z]+| [a-z].*)")  # $15/hour, whose sign closes no formula
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("$", "$"), ("*", "*"), ("`", "`"), ("__", "__"), ('"', '"'))


@lru_cache(maxsize=1 << 16)
def normalize(answer: str) -> str:
    """The one spelling of an answer (see the file's head); "" when nothing is left."""
    text = answer.strip().replace("\x00", " ").replace("US$", "\\$")
    if text.isdecimal() and text.isascii():
        return text
    text = _unwrap(text if text.isascii() else _PRAISE.sub("", _ROOT.sub(r"\\sqrt{\1}", text).translate(_TRANSLATION)))
    text = _UNIT_OUTSIDE.sub(r"\1\\text{\2}", text)
    if "\\\\" in text and ("\\begin" not in text or _DOUBLED.search(text)):  # as JSON writes one; no row separator
        text = _unwrap(text.replace("\\\\", "\\"))
    text = without_lead(text)
    words = _as_words(text)
    return "\\mathbb{R}" if words == "reals" else f"\\text{{{words}}}" if words else _normalize_math(text)


def without_lead(text: str) -> str:
    """The value that a sentence states (see _LEAD and _SENTENCE); any other text as it is."""
    plain = _TEXT.sub(r"\1", text) if text.startswith("\\text") else text
    lead = _LEAD.match(plain)
    if not lead:
        lead = _SENTENCE.match(plain)
        lead = lead if lead and _VERB.search(lead[0]) and not _QUALIFIED.search(lead[0]) else None
    if not lead or _DENIED.search(lead[0]):
        return text
    value = _unwrap(plain[lead.end() :])
    ending = _ENDING.fullmatch(value)
    return ending[1] if ending and not _DENIED.search(value) else value


def _unwrap(text: str) -> str:
    """Strip blanks, the final full stop, and delimiters that enclose the whole."""
    for _ in range(20):
        before, text = text, _EDGES.sub("", text).removesuffix("\\")
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            if inner and text.startswith(opening) and text.endswith(closing) and not inner.endswith("\\"):
                text = text if opening in inner.replace("\\$", "") else inner
        if text.replace("\\$", "").count("$") == 1:
            if text[0] == "$":
                text = f"\\{text}" if _PRICE.fullmatch(text) else text[1:]
            elif text.endswith("$"):
                text = text[:-1]
        if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


def closing_brace(text: str, opening: int, stop: int | None = None) -> int:
    """Index of the brace that closes the one at `opening`, -1 when none before `stop` does. Skips escaped ones."""
    depth = 0
    for token in _BRACE.finditer(text, opening, len(text) if stop is None else stop):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return token.start()
    return -1


def _as_words(text: str) -> str:
    """The text answer that `text` is, in lower case; "" when it is mathematics."""
    if any(map(str.isdigit, text)):
        return ""
    bare = _TEXT.sub(r"\1", _TEXT_COMMANDS.sub(r"\\text", text))
    plain = " ".join(_SPACING.sub(" ", bare).split()).strip(" .,").lower()
    words = re.findall("[a-z]+", plain)
    if not _TEXT_WORDS.fullmatch(plain) or _NOT_TEXT.intersection(words):
        return ""
    word_like = any(len(word) >= 4 or word in _KNOWN_WORDS for word in words)
    plain = _SYNONYMS.sub(lambda m: "dne" if m[1] else m[2] or "reals", plain)
    return plain if word_like or (bare != text and plain.isalpha() and len(plain) > 1) else ""


def _normalize_math(text: str) -> str:
    text = (
        _THOUSANDS.sub("", _NO_SPACE.sub("", text))
        .replace("{,}", ",")
        .replace("\\%", "%")
        .replace("**", "^")
        .replace("...", "\\ldots ")
    )
    text = _ROW_SPACE.sub(ROW, text).replace("\\\\", ROW) if "\\begin" in text else text
    text = text.replace("{:}", ":").replace("{=}", "=").replace("$", " ") if "\\$" not in text else text
    text = _LAYOUT.sub("", text) if "color" in text or "." in text else text
    text = _NEGATED.sub(r"\\neq ", text) if "\\not" in text else text
    text = _COMMAND.sub(_one_command, text) if "\\" in text else text
    text = _SPACING.sub(" ", _DEGREE.sub(r"\\degree ", text) if "^" in text else text)
    text = _MODULUS.sub(lambda m: f"\\pmod{{{m[m.lastindex or 0].strip()}}}", text) if "mod" in text else text
    if "\\text" in text:
        units = _UNIT_FRACTION.sub(r"\\text{\1/\2\3}", text)
        text = _rewritten(units, _TEXT_COMMAND, 1, lambda inner, before: _one_text(inner[0].strip(), before))
    text = _AND_A_HALF.sub(r"\\frac{1}{2}", text) if "half" in text else text
    both = " \\land " if _INEQUALITY.search(text) else " , "  # "and" between inequalities means both at once
    either = " ; " if " or " in text and _SEVERAL_EACH.search(text) else " , "
    text = _PLAIN_JOINER.sub(lambda m: both if m[1] == "and" else either, text)
    text = _WORD_SYMBOLS.sub(lambda m: "\\infty " if m[1] == "infinity" else f"\\{m[1]} ", text)
    if "\\over" in text or "\\choose" in text:
        text = _INFIX.sub(lambda m: f"\\{'frac' if m[3] == 'over' else 'binom'}{{{m[2]}}}{{{m[4]}}}", text)
    for pattern, spelling in _RESPELLED:
        text = pattern.sub(spelling, text)
    text = _in_braces(text) if "\\frac" in text or "\\binom" in text else text
    for pattern, spelling in _RESPELLED_AT_LAST:
        text = pattern.sub(spelling, text)
    text = _squeeze(text)
    if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    return "\\emptyset" if text in ("\\{\\}", "\\{\\emptyset\\}") else text


def _rewritten(text: str, commands: re.Pattern[str], count: int, rewrite: Callable[[list[str], str], str]) -> str:
    """Each command and its arguments replaced by `rewrite(arguments, text before)`. As TeX reads them, an argument is
    a group in braces or one token.
    """
    pieces, position = [""], 0
    for found in commands.finditer(text):
        arguments, end = [], found.end()
        while len(arguments) < count and (token := _TOKEN.match(text, end)):
            braces = token[1] == "{"
            end = closing_brace(text, token.end() - 1) + 1 if braces else token.end()
            if end == 0:
                return text
            arguments.append(text[token.end() : end - 1] if braces else token[1])
        if found.start() >= position and len(arguments) == count:
            before = text[position : found.start()]
            pieces += [before, rewrite([found[0], *arguments][-count - (count > 1) :], pieces[-1] + before)]
            position = end
    return "".join([*pieces, text[position:]])


def _in_braces(text: str) -> str:
    r"""`\frac12`, `\frac1{72}`, `\binom n2` with both arguments in braces."""
    return _rewritten(text, _ARGUMENTS, 2, lambda p, _: f"{p[0]}{{{_in_braces(p[1])}}}{{{_in_braces(p[2])}}}")


def _one_command(match: re.Match[str]) -> str:
    name, follows = match[1], match.string[match.end() : match.end() + 1]
    return _COMMANDS.get(name, f"\\{name} " if follows.isalpha() else f"\\{name}")


def _one_text(inner: str, before: str) -> str:
    r"""Mathematics leaves its `\text{}`, unless it follows a number, where it is a unit; words stay inside."""
    after_number = _AFTER_NUMBER.search(before) is not None
    if inner in FUNCTIONS and not (after_number and inner == "min"):
        return f"\\{inner} "
    if inner.strip(", ") in ("and", "or"):
        return f" {inner.strip(', ')} "
    if not inner.strip(".,;:"):
        return inner.strip(".:") or " "
    in_group = len(inner) == 1 and before.count("{") > before.count("}")  # \frac{3\mathrm{n}}{2}
    if inner in ("e", "i", "infinity") or in_group or (not after_number and _MATHS_IN_TEXT.match(inner)):
        return inner
    return f"\\text{{{re.sub(r'[{}^]', '', ' '.join(inner.split()))}}}"


def _squeeze(text: str) -> str:
    """Drop blanks that carry nothing. One stays between two letters or digits and in `2, 100`, a list of two numbers;
    none before `\\text{`.
    """
    text = re.sub(r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1", " ".join(text.split()))
    parts = re.split(r"(\\text\{[^{}]*\})", text)
    parts[::2] = [_LOOSE_BLANK.sub("", part) for part in parts[::2]]
    return "".join(parts).replace(" \\text", "\\text")
