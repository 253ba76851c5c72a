"""Strict "Answer:" rule, the grader of the paper: compares strings after clean-up, in microseconds.

The answer is the rest of the line after the last "Answer:" (any case) in the last 300 characters. Answer and gold are
stripped of LaTeX formatting, units and everything up to the last "=". The results must be equal. So `Answer: 42.` and a
box without "Answer:" are incorrect, while `17=42` and `4,2` are graded as 42. Source: the rule of DAPO (arXiv
2503.14476) after Minerva's clean-up (arXiv 2206.14858, appendix). The order of the steps matters.
"""

import re

from .grade import Grade

TAIL_CHARS = 300

_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""),
    ("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
    *((word, "") for word in (
        *"square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents".split(),
        *"degrees cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.}".split(),
        "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
        *'\\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots'.split(),
    )),
)  # fmt: skip
_UNWRAPPED = (  # applied in this order; only a box extends to the last brace
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def answer_line_reward(completion: str, gold: str) -> Grade:
    """Grade with the strict rule; the reason is match, mismatch or no_answer. An empty gold matches nothing."""
    lines = _LINE.findall(completion[-TAIL_CHARS:])
    if not lines:
        return Grade(False, None, "no_answer")
    answer, wanted = _clean(lines[-1]), _clean(gold)
    correct = bool(wanted) and answer == wanted
    return Grade(correct, answer, "match" if correct else "mismatch")


def _clean(text: str) -> str:
    text = text.rpartition("=")[2]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for pattern, spelling in _UNWRAPPED:
        text = pattern.sub(spelling, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()
