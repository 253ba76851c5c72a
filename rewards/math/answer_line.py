"""The paper's own grader: the strict "Answer:" rule. Pure, microseconds, no mathematics.

Only the last 300 characters are read; the last "Answer:" in them (any case) announces the answer, which runs to the end
of its line; both sides are cleaned of LaTeX dressing, units and everything up to the last "="; then the strings must be
equal. So `Answer: 42.` and a box without "Answer:" are wrong, while `17=42` and `4,2` are paid as 42. Source: the rule
of DAPO (arXiv 2503.14476) after Minerva's clean-up (arXiv 2206.14858, appendix); the order of its steps is part of it.
"""

import re

from .grade import Grade

TAIL_CHARS = 300

_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_REWRITTEN = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""),
    ("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_DROPPED = (
    *"square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents".split(),
    *"degrees cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.}".split(),
    "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
    *'\\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots'.split(),
)  # fmt: skip
_UNWRAPPED = (  # one after another; only a box runs to the last brace
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def answer_line_reward(completion: str, gold: str) -> Grade:
    """The strict verdict; reason match, mismatch or no_answer. An empty gold is never matched."""
    lines = _LINE.findall(completion[-TAIL_CHARS:])
    if not lines:
        return Grade(False, None, "no_answer")
    answer, wanted = _cleaned(lines[-1]), _cleaned(gold)
    correct = bool(wanted) and answer == wanted
    return Grade(correct, answer, "match" if correct else "mismatch")


def _cleaned(text: str) -> str:
    text = text.rpartition("=")[2]
    for old, new in _REWRITTEN:
        text = text.replace(old, new)
    for word in _DROPPED:
        text = text.replace(word, "")
    for pattern, kept in _UNWRAPPED:
        text = pattern.sub(kept, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()
