r"""Extraction of the final answer of a completion, in time linear in its length.

- Only text after the last `</think>` is read. An open `<think>` means no answer.
- The answer is the last `\boxed{...}`, else the last "Answer:" line. GSM8K's `#### 19` and R1-Zero's
  `<answer>19</answer>` are such lines. The last number of a text is not an answer: it may echo the question.
- An empty or truncated last box means no answer, even after an earlier complete box.
- A sign, factor, power or unit next to the box belongs to the answer.
- Adjacent final answers (`\boxed{1} or \boxed{2}`, two successive "Answer:" lines, a box and then another "Answer:")
  all count, and must agree. A box that later text corrects, uses, or replaces by a final answer does not count.
"""

import re
from typing import NamedTuple

from .normalize import closing_brace, normalize, without_lead
from .units import split_unit

MAX_ANSWERS = 64  # limit of adjacent final answers; more are a hedge
MAX_GAP_CHARS = 100  # largest gap between adjacent answers
MAX_CASE_CHARS = 300  # the same if the second answer is introduced as another case

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_ANSWER = re.compile(
    r"\banswers?\b[ \t*_`]*[:：][ \t*_`]*|^####[ \t]+(?=[-+$]*\d[\d.,/]*%?(?:[ \t]+[a-z]+)?[ \t]*$)"
    r"|<answer>(?=(?:(?!<|\\boxed|answers?\b[ \t*_`]*[:：]).)*</answer>)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_CONTENT = re.compile(r"\s*(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$|([^\n]*))", re.DOTALL)  # displayed formula or line
_CHECK = re.compile(r"\b(?:check|verif|confirm|test|validat)\w*\b[^.!?\n]*$", re.I)  # We check our answer: 6*7=42
_STRAY = re.compile(  # </answer>, </s>, <|im_end|>; an unpaired **; the ending of Minerva's prompt
    r"<(?:/[a-z]{1,12}|\|[a-z_]{1,24}\|)>|(?<![\w)}\]])\*\*|\*\*(?![\w(\\{])|\bI hope (?:it|this) is correct\W*$"
)
_BLANK = re.compile(
    r"(?:\s|~|\$|\*|>|\\[,;:!> ]|\\q?quad|\\text\{\s*\}|\\+[()\[\]]|[?.…_{}]|\\[cl]?dots|\\(?:begin|end)\{[a-z]+\*?\})*"
)
_VALUE_LIKE = re.compile(r"(?:[\s*$([{+\-−]|\\[([{])*(?:\d|\\[a-zA-Z{]|[a-zA-Z](?![a-zA-Z]))")
_FACTOR = r"(?:\d+(?:\.\d+)?|\\frac\{?\d+\}?\{?\d+\}?|\\sqrt\{?\d+\}?)"
_BEFORE_BOX = re.compile(
    rf"(?:[=$]|\\[(\[]|\\equiv)\s*([-−]\s?{_FACTOR}?|{_FACTOR})\s?\Z|(?<![\w.)}}\-−])([-−]{_FACTOR}?|{_FACTOR})\Z"
    r"|((?:\\frac|\\sqrt|\}|\^)\{)\s?\Z"  # inside a larger formula
)
_AFTER_BOX = re.compile(
    r"\s?(?:\\?%|\^\{?\\circ\}?)|\^\{?-?\w+\}?|/\d+|\s?(?:\\pi(?![a-z])|\\sqrt\{?\w+\}?)|[a-z](?=[$^+=)\\-])"
    r"|((?:\s|\\[ ,;]|~)*\\(?:text|mathrm)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?)"
)
_PLAIN_UNIT = re.compile(r"^(-?\d[\d.,]*)(?: ?([gL])| ([NsmhJWV]))\.?$")  # alone on a line: a unit, not a product
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\b")
_CORRECTED = re.compile(
    r"(?i)\b(?:no|wait|actually|(?:in)?correct\w*|mistake\w*|errors?|wrong|instead|sorry|oops|rather)\b"
)
_HEDGED = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively|either|might|could|unsure|not sure)\b", re.I)
_OTHER_CASE = re.compile(r"\b(?:otherwise|else|alternative\w*|option|case|interpretation|scenario|if not)\b", re.I)
_CONCLUDED = re.compile(r"\b(?:total|sum|altogether|overall|in all|therefore|hence|final\w*)\b", re.I)
_AND_ANOTHER = re.compile(  # another answer after a box on its line: "or 43", "otherwise $6$"
    r"[\s$\\\])}*,;(]*\b(?:or|otherwise|else)\s+(?:(?!about|approx|around|rough|nearly)[a-z]+,?\s+){0,2}?"
    r"(\$[^$\n]+\$|-?\d[\d.,/]*)", re.I,
)  # fmt: skip
_JOINING = frozenset("and also both text quad qquad mathrm final the answer answers respectively boxed fbox".split())


class Found(NamedTuple):
    """Candidate answer with its position [start, end) in the searched text."""

    text: str
    start: int
    end: int


def final_answers(completion: str) -> tuple[str, ...]:
    """Return the final answers of a completion in reading order, usually one; () if there is none."""
    text = completion.rpartition("</think>")[2]
    text = _without_phantoms(text) if "phantom" in text else text
    boxes = _last_boxes(text)
    candidates = boxes or _last_answer_lines(text, 0)
    if not candidates or _BLANK.fullmatch(candidates[-1].text) or "<think>" in text:  # the thinking did not end
        return ()
    if boxes:
        first, last = boxes[0].start, boxes[-1].end
        lines = _last_answer_lines(text[: text.rfind("\n", 0, first) + 1], max(0, first - 3 * MAX_GAP_CHARS))
        stated = [line for line in lines if _VALUE_LIKE.match(line.text) and not _BLANK.fullmatch(line.text)]
        above = [line for line in stated[-1:] if _BLANK.fullmatch(text, line.end, first)]
        other = _AND_ANOTHER.match(text, last)
        beside = [Found(other[1].rstrip(".,"), other.start(), other.end())] if other else []
        below = [line for line in _last_answer_lines(text, last) if _VALUE_LIKE.match(without_lead(line.text))]
        candidates = [*above, *boxes, *beside, *below]
    return tuple(dict.fromkeys(item.text for item in candidates))


def _without_phantoms(text: str) -> str:
    """Remove invisible text: every phantom group, and everything after an unclosed one."""
    pieces, position = [], 0
    for opening in re.finditer(r"\\[hv]?phantom\s*\{", text):
        if opening.start() >= position:  # not inside a removed phantom
            pieces.append(text[position : opening.start()])
            position = closing_brace(text, opening.end() - 1) + 1 or len(text)
    return "".join(pieces) + text[position:]


def _box_at(text: str, command: re.Match[str], stop: int) -> Found:
    """Return the box of a command, with an empty text if it does not end before `stop`."""
    if not text.startswith("{", command.end()):  # `\boxed 2`, as in some MATH solutions
        bare = re.split(r"[\s$]", text[command.end() : stop], maxsplit=1)[0]
        return Found(bare.rstrip(".,;"), command.start(), command.end() + len(bare))
    closing = closing_brace(text, command.end(), stop)
    inner = text[command.end() + 1 : closing].strip() if closing >= 0 else ""
    near = text[max(0, command.start() - 40) : command.start()]
    before = None if near.endswith("$") else _BEFORE_BOX.search(near)  # $ is the most frequent case
    after = _AFTER_BOX.match(text, closing + 1)
    unit_or_power = after and (not after[1] or split_unit(normalize(f"1{after[1]}")).unit) and after[0]
    if (before or unit_or_power) and inner and "=" not in inner:
        inner = f"{before[before.lastindex or 0] if before else ''}({inner}){unit_or_power or ''}"
    return Found(inner, command.start(), closing + 1)


def _last_boxes(text: str) -> list[Found]:
    """Return the last box and those adjacent to it, in reading order."""
    boxes: list[Found] = []
    for command in reversed(list(_BOX.finditer(text))):
        box = _box_at(text, command, boxes[0].start if boxes else len(text))
        if boxes and (not box.text or len(boxes) > MAX_ANSWERS or not _side_by_side(text[box.end : boxes[0].start])):
            break
        boxes.insert(0, box)
    return boxes


def _last_answer_lines(text: str, start: int) -> list[Found]:
    """Return the last "Answer:" line at or after `start` and those adjacent to it, in reading order."""
    lines: list[Found] = []
    for label in reversed(list(_ANSWER.finditer(text, start))[-MAX_ANSWERS:]):
        if start and _CHECK.search(text, max(start, label.start() - MAX_GAP_CHARS), label.start()):
            continue
        line = _line_after(text, label)
        if lines and not _side_by_side(text[line.end : lines[0].start]):
            break
        lines.insert(0, line)
    return lines


def _line_after(text: str, label: re.Match[str]) -> Found:
    """Return the answer of a label: the rest of its line, or the next non-empty line if the rest is empty."""
    content = next(_CONTENT.finditer(text, label.end()))
    if content[3] is None:
        return Found((content[1] or content[2] or "").strip(), label.start(), content.end())
    answer = _STRAY.sub("", content[3]).strip(" \t\r*_`")
    return Found(_PLAIN_UNIT.sub(r"\1\\text{ \2\3}", answer), label.start(), content.end())


def _side_by_side(gap: str) -> bool:
    """Return True if two answers with this text between them are alternatives, and the second does not replace one."""
    last_sentence = re.split(r"[.!?;]\s|\n", gap[-MAX_CASE_CHARS:])[-1]
    if len(gap) <= MAX_CASE_CHARS and _OTHER_CASE.search(last_sentence) and not _CONCLUDED.search(last_sentence):
        return True
    announced = re.search(r"\bfinal\s+answers?\b", gap, re.I) and not _HEDGED.search(last_sentence)
    if len(gap) > MAX_GAP_CHARS or _CORRECTED.search(gap) or announced:
        return False
    return bool(_HEDGED.search(gap)) or all(word.lower() in _JOINING for word in _WORD.findall(gap))
