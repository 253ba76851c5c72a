r"""Find the final answer of a completion: string code only, linear in the length of the text.

Only what follows the last `</think>` is read; a `<think>` left open has no answer. The last `\boxed{...}` is the
answer, else the last "Answer:" line (GSM8K's `#### 19` and R1-Zero's `<answer>19</answer>` are such lines). Nothing
else counts: no "last number in the text", which would pay for an echoed question. An empty or cut-off last box is no
answer, even after an earlier complete one. A sign, factor, power or unit next to the box belongs to the answer.
Several final answers side by side (`\boxed{1} or \boxed{2}`, two "Answer:" lines in a row, a box and then another
"Answer:") all count, and must agree. A box that the text later corrects, builds upon or replaces by a box announced as
the final answer does not.
"""

import re
from typing import NamedTuple

from .normalize import closing_brace, normalize, without_lead
from .units import split_unit

MAX_ANSWERS = 64  # final answers read side by side; more than this is a hedge, not an answer
MAX_GAP_CHARS = 100  # two answers with more text than this between them do not stand side by side
MAX_CASE_CHARS = 300  # unless the second is introduced as the other case

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE_BOX = re.compile(r"[^\s$]+")
_ANSWER = re.compile(
    r"\banswers?\b[ \t*_`]*[:：][ \t*_`]*|^####[ \t]+(?=[-+$]*\d[\d.,/]*%?(?:[ \t]+[a-z]+)?[ \t]*$)"
    r"|<answer>(?=(?:(?!<|\\boxed|answers?\b[ \t*_`]*[:：]).)*</answer>)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_CHECK = re.compile(r"\b(?:check|verif|confirm|test|validat)\w*\b[^.!?\n]*$", re.I)  # We check our answer: 6*7=42
_STRAY = re.compile(  # </answer>, </s>, <|im_end|>; half of a bold pair; the ending that Minerva's prompt teaches
    r"<(?:/[a-z]{1,12}|\|[a-z_]{1,24}\|)>|(?<![\w)}\]])\*\*|\*\*(?![\w(\\{])|\bI hope (?:it|this) is correct\W*$"
)
_PHANTOM = re.compile(r"\\[hv]?phantom\s*\{")
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
_PLAIN_UNIT = re.compile(r"(-?\d[\d.,]*)(?: ?([gL])| ([NsmhJWV]))\.?")  # no product, since nothing else is mathematics
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\b")
_CORRECTED = re.compile(
    r"(?i)\b(?:no|wait|actually|(?:in)?correct\w*|mistake\w*|errors?|wrong|instead|sorry|oops|rather)\b"
)
_HEDGED = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively|either|might|could|unsure|not sure)\b", re.I)
_OTHER_CASE = re.compile(r"\b(?:otherwise|else|alternative\w*|option|case|interpretation|scenario|if not)\b", re.I)
_CONCLUDED = re.compile(r"\b(?:total|sum|altogether|overall|in all|therefore|hence|final\w*)\b", re.I)
_AND_ANOTHER = re.compile(  # what follows a box on its line: "or 43", "otherwise $6$"
    r"[\s$\\\])}*,;(]*\b(?:or|otherwise|else)\s+(?:(?!about|approx|around|rough|nearly)[a-z]+,?\s+){0,2}?"
    r"(\$[^$\n]+\$|-?\d[\d.,/]*)", re.I,
)  # fmt: skip
_FINAL = re.compile(r"\bfinal\s+answers?\b", re.I)
_JOINING = frozenset("and also both text quad qquad mathrm final the answer answers respectively boxed fbox".split())


class Found(NamedTuple):
    """A candidate answer and where it stands, [start, end) in the text that was searched."""

    text: str
    start: int
    end: int


def final_answers(completion: str) -> tuple[str, ...]:
    """The final answers of a completion in reading order, usually one; () when there is none."""
    text = completion.rpartition("</think>")[2]
    text = _without_phantoms(text) if "phantom" in text else text
    boxes = _last_boxes(text)
    if boxes is None or "<think>" in text:  # the last box is cut off or empty, or the thinking did not end
        return ()
    found = boxes or _last_answer_lines(text, 0)
    if boxes:
        other = _AND_ANOTHER.match(text, boxes[-1].end)
        beside = [Found(other[1].rstrip(".,"), other.start(), other.end())] if other else []
        after = [line for line in _last_answer_lines(text, boxes[-1].end) if _VALUE_LIKE.match(without_lead(line.text))]
        found = [*_answer_line_above(text, boxes[0].start), *boxes, *beside, *after]
    elif found and _BLANK.fullmatch(found[-1].text):
        return ()
    return tuple(dict.fromkeys(item.text for item in found))


def _without_phantoms(text: str) -> str:
    """Invisible text is no answer: drop every phantom group, and everything after an unclosed one."""
    kept, position = [], 0
    for opening in _PHANTOM.finditer(text):
        if opening.start() >= position:  # not inside a phantom already dropped
            kept.append(text[position : opening.start()])
            position = closing_brace(text, opening.end() - 1) + 1 or len(text)
    return "".join(kept) + text[position:]


def _box_at(text: str, command: re.Match[str], stop: int) -> Found | None:
    if not text.startswith("{", command.end()):  # `\boxed 2`, as some MATH solutions have it
        bare = _BARE_BOX.match(text, command.end(), stop)
        return Found(bare[0].rstrip(".,;"), command.start(), bare.end()) if bare else None
    closing = closing_brace(text, command.end(), stop)
    inner = text[command.end() + 1 : closing].strip()
    before = _BEFORE_BOX.search(text[max(0, command.start() - 40) : command.start()])
    after = _AFTER_BOX.match(text, closing + 1)
    unit_or_power = after and (not after[1] or split_unit(normalize(f"1{after[1]}")).unit) and after[0]
    if (before or unit_or_power) and inner and "=" not in inner:
        inner = f"{before[before.lastindex or 0] if before else ''}({inner}){unit_or_power or ''}"
    return Found(inner, command.start(), closing + 1) if closing >= 0 else None


def _last_boxes(text: str) -> list[Found] | None:
    """The last box and those beside it, in reading order; [] without a box, None when the last is cut off or empty."""
    boxes: list[Found] = []
    for command in reversed(list(_BOX.finditer(text))):
        box = _box_at(text, command, boxes[0].start if boxes else len(text))
        if not boxes and (box is None or _BLANK.fullmatch(box.text)):
            return None
        if box is None or len(boxes) > MAX_ANSWERS or (boxes and not _side_by_side(text[box.end : boxes[0].start])):
            break
        boxes.insert(0, box)
    return boxes


def _last_answer_lines(text: str, start: int) -> list[Found]:
    """The last "Answer:" line at or after `start` and those directly above it, in reading order."""
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
    """What the label announces: the rest of its line, or when that is empty the next line with something on it."""
    start = label.end() + len(text[label.end() :]) - len(text[label.end() :].lstrip())
    for opening, closing in (("\\[", "\\]"), ("$$", "$$")):  # a displayed formula may run over several lines
        end = text.find(closing, start + 2) if text.startswith(opening, start) else -1
        if end >= 0:
            return Found(text[start + 2 : end].strip(), label.start(), end + 2)
    line = text[start:].partition("\n")[0]
    said = _STRAY.sub("", line).strip(" \t\r*_`")
    unit = _PLAIN_UNIT.fullmatch(said)
    return Found(f"{unit[1]}\\text{{ {unit[2] or unit[3]}}}" if unit else said, label.start(), start + len(line))


def _answer_line_above(text: str, start: int) -> list[Found]:
    """An "Answer: 41" line directly above the first box, if it states a value of its own."""
    above, newline, beside = text[max(0, start - 3 * MAX_GAP_CHARS) : start].rpartition("\n")
    labels = list(_ANSWER.finditer(above)) if newline and _BLANK.fullmatch(beside) else []
    stated = above[labels[-1].end() :].strip() if labels else ""
    value = stated.partition("\n")[0]
    own = not _BLANK.fullmatch(value) and _BLANK.fullmatch(stated[len(value) :]) and _VALUE_LIKE.match(value)
    return [Found(value, 0, 0)] if own else []


def _side_by_side(gap: str) -> bool:
    """Whether two answers with this text between them are offered together, rather than one after the other."""
    last_sentence = re.split(r"[.!?;]\s|\n", gap[-MAX_CASE_CHARS:])[-1]
    if len(gap) <= MAX_CASE_CHARS and _OTHER_CASE.search(last_sentence) and not _CONCLUDED.search(last_sentence):
        return True
    announced = _FINAL.search(gap) and not _HEDGED.search(last_sentence)
    if len(gap) > MAX_GAP_CHARS or _CORRECTED.search(gap) or announced:
        return False
    return bool(_HEDGED.search(gap)) or all(word.lower() in _JOINING for word in _WORD.findall(gap))
