r"""Parsing of a row of a published data set: (problem, gold, id, level), with cleaned golds.

Problem and gold are found by column name. Prompts are in data/prompts.py, the comparison of answers is in rewards/.
Figures are ignored, and units stay in the gold.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data.problem import Problem

# Column names by priority; a dot selects a field of a struct. `solution` is a worked solution with the answer in its
# last box; in a table with `prompt` it may be only the answer.
PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages")
ANSWER_COLUMNS = tuple(
    "answer gold final_answer expected_answer label ground_truth solution reward_model.ground_truth".split()
)
OTHER_COLUMNS = ("unique_id", "id", "extra_info", "level", "is_multiple_answer")

# DAPO's wrapper, as published with DAPO-Math-17k. Training sets have it inside the problem text, from which it is
# removed. data/prompts.py adds it to all prompts, so that training and evaluation prompts are the same.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
_FORMAT = re.compile(r"####|\\boxed|<answer>|\bAnswer:")  # an instruction inside a problem


def clean_gold(value: Any) -> str:
    r"""Convert a gold answer to text: trimmed, without outer `$`, integers without leading zeros, commas and ".0".

    >>> [clean_gold(g) for g in ("025", "1,000", 27.0, " $\\frac{14}{3}$ ", "-07", "0.50", "(3,4]", None)]
    ['25', '1000', '27', '\\frac{14}{3}', '-7', '0.50', '(3,4]', '']

    Raises ValueError if `value` is not text, a number or None.
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
    """Remove DAPO's wrapper from a prompt; other text is only trimmed.

    Uses `removeprefix`, because `lstrip` strips a set of characters and would remove the beginning of problems.
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
    r"""Return the answer of a solution: the content of its last \boxed{...} (or \fbox{...}), "" if there is none.

    Several answers are joined by commas: adjacent boxes, or all boxes if the problem asks for several values. A box in
    a closing note is ignored.

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
    answers = [boxes.pop()]
    while boxes and (several or _JOINING.fullmatch(text, boxes[-1][2], answers[0][1])):
        answers.insert(0, boxes.pop())
    return ", ".join(dict.fromkeys(content for content, _, _ in answers))


def _braced(text: str, start: int) -> tuple[str, int]:
    """Return (content, end) of the group in braces or the word at `start`: two rows of MATH write "\\boxed 2"."""
    if not text.startswith("{", start):
        bare = re.compile(r"[^\s$.]+").match(text, start)
        return (bare[0], bare.end()) if bare else ("", start)
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # "\{" is a literal brace, not a group
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[start + 1 : token.start()].strip(), token.end()
    return "", len(text)


def find_columns(where: str, columns: Sequence[str], prompt: str | None, answer: str | None) -> tuple[str, str]:
    """Return (problem column, answer column) of a table. prompt, answer: chosen columns; None: detect.

    Without an answer column, `messages` is both: its last turn is the reference response.
    Raises ValueError with the available columns and the two config keys.
    """
    names = filter(None, (*PROBLEM_COLUMNS, *ANSWER_COLUMNS, prompt, answer))
    present = {name for name in names if {name, name.partition(".")[0]} & set(columns)}
    query = prompt or next(filter(present.__contains__, PROBLEM_COLUMNS), "")
    gold = answer or next(filter(present.__contains__, ANSWER_COLUMNS), "messages" if query == "messages" else "")
    if not {query, gold} <= present:
        raise ValueError(
            f"{where}: columns {', '.join(columns) or '(none)'} hold no problem "
            f"({query or ', '.join(PROBLEM_COLUMNS)}) with an answer ({gold or ', '.join(ANSWER_COLUMNS)}); set "
            "prompt_column and answer_column"
        )
    return query, gold


def parse(row: Mapping[str, Any], problem_column: str, answer_column: str, worked: bool) -> tuple[Problem, Any, str]:
    """Parse one row; return (problem without id, source and row; published id or None; note to count and print or "").

    worked: the answer column has worked solutions, in which only a marked final answer counts.

    Raises ValueError with the column of an invalid value.
    """
    text, messages, note = _value(row, problem_column), [], ""
    response = None  # the reference response of a conversation
    if isinstance(text, list):
        messages = _messages(text, problem_column)
        if messages and answer_column == problem_column and messages[-1]["role"] == "assistant":
            response = messages.pop()["content"]
        users = [turn["content"] for turn in messages if turn["role"] == "user"]
        if not users:
            raise ValueError(f"column {problem_column!r} holds no user turn; at least one is expected")
        text = "\n\n".join(users)
        messages = [] if len(messages) == 1 else messages  # one user turn is an ordinary problem
    if not isinstance(text, str | None):
        raise ValueError(f"column {problem_column!r} holds {type(text).__name__} {str(text)[:60]!r}; text is expected")
    problem = strip_wrapper(text or "")
    if messages:
        note = "are conversations, rendered as they stand: prompt_template and system_prompt do not change them"
    elif _FORMAT.search(problem):
        note = "ask for an answer format themselves, to which prompt_template adds its own; plain adds none"
    try:
        answer = response if answer_column == problem_column else _value(row, answer_column)
        variants = answer if isinstance(answer, list) else [answer]
        if answer_column == "final_answer" and (row.get("is_multiple_answer") or len(variants) > 1):
            # OlympiadBench asks for all of them. "100,200" would be one number, and "$1$, $2$" has inner dollar signs.
            joined = ", ".join(str(each) for each in variants if each is not None)
            answer = re.sub(r"\s*,\s*", ", ", re.sub(r"(?<!\\)\$", "", joined))
        else:
            answer = next((each for each in variants if each not in (None, "")), None)
            note = f"with several variants in {answer_column!r}; the first is the gold" if len(variants) > 1 else note
        if isinstance(answer, str):
            short = boxed_answer(answer, problem) or answer.rpartition("####")[2]  # GSM8K ends in "#### 18"
            answer = "" if worked and short == answer else short
        gold = clean_gold(answer)
    except ValueError as error:
        raise ValueError(f"column {answer_column!r}: {error}") from None
    extra = row.get("extra_info")
    keys = [row.get("unique_id"), row.get("id"), extra.get("index") if isinstance(extra, dict) else None]
    key = next((key for key in keys if key is not None), None)
    return Problem("", problem, gold, "", _level(row.get("level")), tuple(messages)), key, note


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or of a field of a struct column ("reward_model.ground_truth")."""
    top, _, field = column.partition(".")
    if column in row or not field:
        return row.get(column)
    if not isinstance(row.get(top), dict) or field not in row[top]:
        raise ValueError(f"column {top!r} must be a struct with a field {field!r}")
    return row[top][field]


def _messages(turns: list[Any], column: str) -> list[dict[str, Any]]:
    """Return the turns of a conversation, with lists of text parts joined. Raises ValueError for other content."""
    messages = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("text") for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(turn.get("role"), str):
            raise ValueError(f"column {column!r} holds {str(turn)[:80]!r}; a turn with role and text is expected")
        messages.append({key: value for key, value in turn.items() if value is not None} | {"content": content})
    return messages


def _level(value: Any) -> int | None:
    """Parse a level: 5 for 5, "5" and "Level 5"; None for "Level ?" and other values."""
    digits = re.fullmatch(r"(?:Level )?(\d{1,9})(?:\.0)?", str(value).strip())
    return int(digits[1]) if digits else None
