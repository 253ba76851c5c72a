"""The generated problems in English: their answers, their splits, and the solved examples of the prompt."""

import re

import pytest

from data import load_problems
from data.arithmetic import SETS, arithmetic_problems
from data.prompts import FEW_SHOT

GAIN, LOSS = ("buys", "finds", "gets"), ("gives", "loses", "sells")


def answer_of(text: str) -> int:
    """The answer, worked out from the text alone."""
    if " has " not in text:
        expression = re.search(r"\d+ [+*-] \d+", text)
        assert expression
        return eval(expression[0])
    a, b = map(int, re.findall(r"\d+", text))
    if " each" in text:
        return a * b
    verb = text.split(". ")[1].split()[1]
    assert verb in GAIN + LOSS
    return a + b if verb in GAIN else a - b


@pytest.mark.parametrize("name", SETS)
def test_every_answer_follows_from_the_text(name: str) -> None:
    problems = load_problems(name).problems
    assert len(problems) == SETS[name][2] == len({problem.problem for problem in problems})
    assert [answer_of(problem.problem) for problem in problems] == [int(problem.gold) for problem in problems]
    assert all(int(problem.gold) >= 0 for problem in problems)
    assert len({" has " in problem.problem for problem in problems}) == 2, "stories and plain questions"


def test_no_evaluation_problem_is_trained_on_or_shown_solved() -> None:
    sets = {name: {problem.problem for problem in arithmetic_problems(name)} for name in SETS}
    evaluated = sets["arith_eval"] | sets["arith_hard"]
    assert not evaluated & (sets["arith_train"] | {problem for problem, _ in FEW_SHOT})


def test_the_problems_are_the_same_on_every_machine() -> None:
    first = arithmetic_problems("arith_train")[0]
    arithmetic_problems.cache_clear()
    assert arithmetic_problems("arith_train")[0] == first
    assert (first.id, first.problem, first.gold) == FIRST


FIRST = ("arith_train/0", "Eva has 6 apples. She sells 5 apples. How many apples does Eva have now?", "1")


def test_the_solved_examples_are_correct() -> None:
    for problem, response in FEW_SHOT:
        boxed = re.search(r"\\boxed\{(\d+)\}$", response)
        assert boxed and int(boxed[1]) == answer_of(problem)
        assert eval(response.partition(" = ")[0]) == int(boxed[1])


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(ValueError, match="'arith_trian' is not a generated set; use one of arith_train"):
        load_problems("arith_trian")
