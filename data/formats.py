r"""The published column layouts, one parser each: a row in, (problem, gold, id, level) out, golds cleaned.

To read another layout: write a parser and add it to LAYOUTS. Only the columns named there are ever read.
Left out on purpose: prompts (data/prompts.py adds them), comparing answers (rewards/), figures and units.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# DAPO's wrapper, as published with DAPO-Math-17k. Training copies carry it inside the problem text; data/prompts.py
# puts it back, so that training and evaluation prompts are the same.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


class Parsed(NamedTuple):
    """One row, read. `note` says what was odd about it (counted and printed), "" for nothing."""

    problem: str
    gold: str
    key: Any
    level: int | None
    note: str = ""


@dataclass(frozen=True)
class Layout:
    """A column layout: recognised by `needs` (all present), `may` are read when present."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Parsed]

    def columns(self, present: Sequence[str]) -> list[str]:
        """The columns to read, of those present."""
        return [column for column in present if column in self.needs + self.may]


def clean_gold(value: Any) -> str:
    r"""The gold answer as text: trimmed, outer `$` removed, plain integers without leading zeros, commas and ".0".

    >>> [clean_gold(g) for g in ("025", "1,000", 27.0, " $\\frac{14}{3}$ ", "-07", "0.50", "(3,4]", None)]
    ['25', '1000', '27', '\\frac{14}{3}', '-7', '0.50', '(3,4]', '']

    Raises ValueError when `value` is neither text nor a number nor None.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the gold answer is {type(value).__name__} {str(value)[:60]!r}; text or a number is expected")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # str(1e16) would be "1e+16"
    gold = str(value).strip()
    while inner := re.fullmatch(r"(\$\$?)([^$]*)(?<!\\)\1", gold):
        gold = inner[2].strip()
    integer = re.fullmatch(r"([+-]?)([0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.0*)?", gold)
    if integer:
        digits = integer[2].replace(",", "").lstrip("0")
        gold = ("-" if integer[1] == "-" and digits else "") + (digits or "0")
    return gold


def strip_wrapper(text: str) -> str:
    """The bare problem of a DAPO-wrapped prompt; other text comes back trimmed.

    `removeprefix`, not `lstrip`: the latter strips a set of characters and eats the beginning of problems.
    """
    return text.strip().removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()


_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_NOTE = re.compile(r"\b(?:Note|Remark)\b")
_SEVERAL = re.compile(r"(?i)\b(?:all|both|each|values|solutions|roots|pairs|answers|commas|respectively)\b")
_SINGLE = re.compile(r"(?i)\bhow many\b|\b(?:number|sum|product|average|mean|difference|probability|\w+est|m\w+mum) ")
_JOINING = re.compile(
    r"(?:[\s$,;.&]|\\[,; ()\[\]]|\\q?quad|\b(?:and|or|also)\b|\\text\{ ?(?:and|or) ?\}|[a-z](?:_\d)? ?=)*"
)


def boxed_answer(text: str, problem: str) -> str:
    r"""The answer of a solution: what its last \boxed{...} (or \fbox{...}) holds, "" when there is none.

    Several answers are joined by commas: boxes side by side, or all boxes of a problem that asks for several values. A
    box in a closing note is no answer.

    >>> solutions = r"\boxed{1}, so \boxed{\frac12}", r"$x=\boxed{-2}$ or $x=\boxed{1}$.", r"\boxed{3}. Note: \boxed{4}"
    >>> [boxed_answer(solution, "Find x.") for solution in solutions]
    ['\\frac12', '-2, 1', '3']
    >>> boxed_answer(r"First, $x=\boxed{5}$; if $y<0$, then $x=\boxed{7}$.", "Find all values of x.")
    '5, 7'
    """
    boxes: list[tuple[str, int, int]] = []
    for start in _BOX.finditer(text):
        content, end = _braced(text, start.end())
        if boxes and _NOTE.search(text, boxes[-1][2], start.start()):
            break
        boxes.append((content, start.start(), end))
    if not boxes or not boxes[-1][0]:
        return ""
    several = _SEVERAL.search(problem) and not _SINGLE.search(problem)
    found = [boxes.pop()]
    while boxes and (several or _JOINING.fullmatch(text, boxes[-1][2], found[0][1])):
        found.insert(0, boxes.pop())
    return ", ".join(dict.fromkeys(content for content, _, _ in found))


def _braced(text: str, start: int) -> tuple[str, int]:
    """(content, end) of the group in braces at `start`, or of the word there: two rows of MATH write "\\boxed 2"."""
    if not text.startswith("{", start):
        bare = re.compile(r"[^\s$.]+").match(text, start)
        return (bare[0], bare.end()) if bare else ("", start)
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # "\{" is a printed brace, not a group
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[start + 1 : token.start()].strip(), token.end()
    return "", len(text)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {type(value).__name__} {str(value)[:60]!r}; text is expected")
    return value.strip()


def _gold(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    """(gold, note). A list is read as variants of one answer: the first that is not empty counts."""
    value, note = row.get(column), ""
    if isinstance(value, list):
        note = f"with several variants in {column!r}; the first one is the gold" if len(value) > 1 else ""
        value = next((variant for variant in value if variant not in (None, "")), None)
    try:
        return clean_gold(value), note
    except ValueError as error:
        raise ValueError(f"column {column!r}: {error}") from error


def _level(value: Any) -> int | None:
    """5 of 5, "5", "Level 5"; None of "Level ?" and of no level."""
    digits = re.fullmatch(r"(?:Level )?(\d{1,9})(?:\.0)?", str(value).strip())
    return int(digits[1]) if digits else None


def _problem(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    """(problem, note), the wrapper stripped: copies of every set are about that carry it."""
    problem = strip_wrapper(_text(row, column))
    left = DAPO_PREFIX[:40] in problem or DAPO_SUFFIX.strip()[:40] in problem
    return problem, "with prompt wrapping left in the problem text" if left else ""


def _user_turn(row: Mapping[str, Any]) -> tuple[str, str]:
    """(problem, note) of column `prompt`: text, or a list of messages with one user turn."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        turns = [turn.get("content") for turn in prompt if isinstance(turn, dict) and turn.get("role") == "user"]
        if len(turns) != 1:
            raise ValueError(f"column 'prompt' holds {len(turns)} user turns; exactly one is expected")
        prompt = turns[0]
    return _problem({"prompt": prompt}, "prompt")


def _parse_dapo(row: Mapping[str, Any]) -> Parsed:
    problem, note = _user_turn(row)
    reward_model = row["reward_model"]
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise ValueError("column 'reward_model' must be a struct with a field 'ground_truth'")
    gold, gold_note = _gold(reward_model, "ground_truth")
    extra = row.get("extra_info")
    return Parsed(problem, gold, extra.get("index") if isinstance(extra, dict) else None, None, note or gold_note)


def _parse_processed(row: Mapping[str, Any]) -> Parsed:
    problem, note = _user_turn(row)
    gold, gold_note = _gold(row, "solution")  # here "solution" is the final answer only
    return Parsed(problem, gold, None, None, note or gold_note)


def _parse_olympiad(row: Mapping[str, Any]) -> Parsed:
    answers = row["final_answer"]
    answers = answers if isinstance(answers, list) else [answers]
    if row.get("is_multiple_answer") or len(answers) > 1:
        # All of them are asked for. "100,200" would read as one number, and "$1$, $2$" has dollars inside.
        joined = ", ".join(str(answer) for answer in answers if answer is not None)
        gold = re.sub(r"\s*,\s*", ", ", re.sub(r"(?<!\\)\$", "", joined)).strip()
    else:
        gold, _ = _gold(row, "final_answer")
    problem, note = _problem(row, "question")
    return Parsed(problem, gold, row.get("id"), None, note)


def _parse_plain(row: Mapping[str, Any]) -> Parsed:
    gold, note = _gold(row, "answer" if "answer" in row else "gold")
    key = row.get("unique_id") if row.get("unique_id") is not None else row.get("id")
    problem, problem_note = _problem(row, "problem")
    return Parsed(problem, gold, key, _level(row.get("level")), problem_note or note)


def _parse_question(row: Mapping[str, Any]) -> Parsed:
    answer = row["answer"]
    if isinstance(answer, str) and "####" in answer:  # GSM8K: the worked solution, then "#### 18"
        row = {**row, "answer": answer.rpartition("####")[2]}
    gold, note = _gold(row, "answer")
    problem, problem_note = _problem(row, "question")
    return Parsed(problem, gold, row.get("id"), None, problem_note or note)


def _parse_solution(row: Mapping[str, Any]) -> Parsed:
    problem, note = _problem(row, "problem")
    gold = clean_gold(boxed_answer(_text(row, "solution"), problem))
    return Parsed(problem, gold, row.get("unique_id"), _level(row.get("level")), note)


# The first layout whose needed columns are all there is taken, so richer ones come first.
LAYOUTS: tuple[Layout, ...] = (
    Layout("DAPO-Math-17k-Processed", ("prompt", "solution"), (), _parse_processed),
    Layout("DAPO-Math-17k", ("prompt", "reward_model"), ("extra_info",), _parse_dapo),
    Layout("OlympiadBench", ("question", "final_answer"), ("id", "is_multiple_answer"), _parse_olympiad),
    Layout("plain, MATH-500, AIME", ("problem", "answer"), ("id", "unique_id", "level"), _parse_plain),
    Layout("plain", ("problem", "gold"), ("id", "unique_id", "level"), _parse_plain),
    Layout("GSM8K, AMC23, Minerva", ("question", "answer"), ("id",), _parse_question),
    Layout("MATH", ("problem", "solution"), ("unique_id", "level"), _parse_solution),
)


def find_layout(columns: Sequence[str]) -> Layout:
    """The layout of a table with these columns. Raises ValueError naming the columns and what would be recognised."""
    for layout in LAYOUTS:
        if set(layout.needs) <= set(columns):
            return layout
    known = "; ".join(f"{' + '.join(layout.needs)} ({layout.name})" for layout in LAYOUTS)
    raise ValueError(
        f"columns {', '.join(columns) or '(none)'} fit no known layout. Rename or add columns to fit one: {known}."
    )
