r"""Answers copied from the problem: what is an echo, and that no correct answer of a generated problem is one."""

import json
import math
import random
from pathlib import Path

import pytest

from data.toy import toy_problems
from rewards import Verifier
from rewards.math.echo import is_echo


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout_s=5.0, memory_gib=2.0, grader="math") as shared:
        yield shared


def graded(verifier: Verifier, answer: str, gold: str, problem: str) -> str:
    return verifier.grade(f"so $\\boxed{{{answer}}}$", gold, {"problem": {"problem": problem}}).reason


def surd(rng: random.Random) -> tuple[str, str, str, list[str]]:
    p, q = rng.randint(2, 12), rng.choice([2, 3, 5, 7])
    copy = f"\\sqrt{{{p * p * q}}}"
    return f"Simplify ${copy}$.", copy, f"{p}\\sqrt{{{q}}}", [f"{p}\\sqrt {q}", f"\\sqrt{{{q}}}\\cdot {p}"]


def square(rng: random.Random) -> tuple[str, str, str, list[str]]:
    p = rng.randint(2, 30)
    copy = f"(x+{p})^2"
    expanded = [f"x^2+{p * p}+{2 * p}x", f"{p * p}+{2 * p}x+x^2", f"y=x^2+{2 * p}x+{p * p}"]
    return f"Expand \\[f(x) = {copy}.\\]", copy, f"x^2+{2 * p}x+{p * p}", expanded


def difference(rng: random.Random) -> tuple[str, str, str, list[str]]:
    p = rng.randint(2, 30)
    copy = f"x^2-{p * p}"
    return f"Factor ${copy}$.", copy, f"(x-{p})(x+{p})", [f"(x+{p})(x-{p})"]


def fraction(rng: random.Random) -> tuple[str, str, str, list[str]]:
    p, q = rng.sample([2, 3, 5, 7, 11, 13], 2)
    k = rng.randint(2, 9)
    copy = f"\\frac{{{k * p}}}{{{k * q}}}"
    return f"Write ${copy}$ in lowest terms.", copy, f"\\frac{{{p}}}{{{q}}}", [f"{p}/{q}", f"\\dfrac{{{p}}}{{{q}}}"]


def angle(rng: random.Random) -> tuple[str, str, str, list[str]]:
    turns = rng.randint(1, 9)
    copy = f"\\cos {360 * turns + 30}^\\circ"
    return f"Find ${copy}$.", copy, "\\frac{\\sqrt3}{2}", ["\\frac{1}{2}\\sqrt{3}", "\\sqrt{3}/2"]


def logarithm(rng: random.Random) -> tuple[str, str, str, list[str]]:
    base, exponent = rng.randint(2, 9), rng.randint(2, 5)
    copy = f"\\log_{{{base}}} {base**exponent}"
    return f"Evaluate ${copy}$.", copy, str(exponent), [f"x={exponent}", f"{exponent}.0"]


def factorial(rng: random.Random) -> tuple[str, str, str, list[str]]:
    n = rng.randint(3, 9)
    return f"What is {n}!?", f"{n}!", str(math.factorial(n)), [f"{math.factorial(n):,}"]


def chosen(rng: random.Random) -> tuple[str, str | None, str, list[str]]:
    """The problem names its answer: a number, a symbol, a choice."""
    p, q = rng.sample(range(2, 99), 2)
    return rng.choice([
        (f"Which is prime, {p} or {q}?", None, str(p), [f"{p}.0", f"x={p}"]),
        (f"Which is less, $\\frac{{1}}{{{p}}}$ or ${q}$?", None, f"1/{p}", [f"\\frac{{1}}{{{p}}}", f"\\frac1{{{p}}}"]),
        (f"Choose (A) $\\sqrt{{{p}}}$ or (B) ${q}$.", None, "B", ["(B)", "\\text{B}"]),
        (f"If $x={p}$ and $y={q}$, what is $(x,y)$?", None, f"({p},{q})", [f"({p}, {q})", f"x={p}, y={q}"]),
        ("Which of $\\pi$ and $\\sqrt{7}$ is larger?", None, "\\pi", ["x=\\pi"]),
        (f"Which is larger, $\\sqrt{{{p}}}$ or ${q}$?", None, f"\\sqrt{{{p}}}", [f"\\sqrt {{{p}}}"]),
        (f"The set is $\\{{{p},{q}\\}}$. Which is it?", None, f"{p}, {q}", [f"\\{{{q},{p}\\}}", f"{q}, {p}"]),
        (f"A car drives {p} km in 2 hours and {q}% slower.", None, f"{p}\\text{{ km}}", [f"{p}", f"{p} km"]),
        (f"What is ${p}\\pi/2$ in degrees?", None, f"\\frac{{{p}\\pi}}{{2}}", [f"{p}\\pi/2"]),
    ])  # fmt: skip


KINDS = (surd, square, difference, fraction, angle, logarithm, factorial, chosen)


def test_a_copied_formula_is_an_echo_and_no_correct_answer_is(verifier):
    rng = random.Random(20260107)
    touched = []
    for index in range(400):
        problem, copy, gold, answers = KINDS[index % len(KINDS)](rng)
        if copy is not None:
            assert graded(verifier, copy, gold, problem) == "echo", (problem, copy)
            assert graded(verifier, f"A={copy}", gold, problem) == "echo", (problem, copy)
            assert graded(verifier, copy, gold, "Find it.") == "match", (problem, copy)
        touched += [(problem, a) for a in [gold, *answers] if graded(verifier, a, gold, problem) != "match"]
    assert touched == []


def test_no_reference_answer_of_the_labelled_set_or_of_a_task_is_an_echo():
    """Written as the gold, whatever the problem says."""
    labelled = Path(__file__).parent / "verifier_cases.jsonl"
    rows = [json.loads(line) for line in labelled.read_text(encoding="utf-8").splitlines()]
    asked = [(row["gold"], row["problem"]) for row in rows if "problem" in row]
    asked += [(row["gold"], f"Find ${row['gold']}$.") for row in rows]
    asked += [
        (problem.gold, problem.problem) for name in ("toy_eval", "toy_hard_eval") for problem in toy_problems(name)
    ]
    assert len(asked) > 2400 and [pair for pair in asked if is_echo((pair[0],), *pair)] == []


def test_without_a_problem_nothing_is_an_echo(verifier):
    assert verifier.grade("\\boxed{5!}", "120").correct
    assert verifier.grade("\\boxed{5!}", "120", {"problem": {"problem": ""}}).correct
