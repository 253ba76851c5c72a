"""The verifier's judgement: extraction, comparison, the strict rule, golds, shaping. Processes:
test_pool.py.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sympy
from launching import ROOT

import rewards
from rewards import Grade, Verifier, shape_reward, vote_key
from rewards.check import read_cases
from rewards.math.compare import UNDECIDED, compare
from rewards.math.exact import number
from rewards.math.extract import final_answers
from rewards.math.normalize import normalize
from rewards.math.parts import statement
from rewards.math.regions import region

CASES = Path(__file__).parent / "verifier_cases.jsonl"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout_s=5.0, memory_gib=2.0, grader="math") as shared:
        yield shared


def grade(verifier: Verifier, answer: str, gold: str) -> Grade:
    return verifier.grade(f"so $\\boxed{{{answer}}}$", gold)


# ------------------------------------------------------------------------------------------------------ labelled set


def test_labelled_set_is_large_and_has_many_negatives():
    cases = read_cases(CASES)
    kinds = Counter(case.kind for case in cases)
    assert len(cases) >= 2300 and sum(not case.expected for case in cases) >= 1050
    assert len(kinds) >= 15 and min(kinds.values()) >= 10


@pytest.mark.slow
def test_labelled_set_has_no_mistake(verifier):
    cases = read_cases(CASES)
    grades = verifier.collect([verifier.submit(case.completion, case.gold, case.about()) for case in cases])
    assert [case for grade, case in zip(grades, cases, strict=True) if grade.correct != case.expected] == []


def test_labels_have_reasons_and_hold_when_computed():
    """A case's `check` is a statement in Python and sympy that its label stands or falls with."""
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    assert all(row["reason"] for row in rows) and len({(row["completion"], row["gold"]) for row in rows}) == len(rows)
    known = {**vars(sympy), "math": math, "Fraction": Fraction, **{name: sympy.Symbol(name) for name in "xyznktabm"}}
    checks = [row for row in rows if "check" in row]
    assert len(checks) >= 30
    assert [row for row in checks if not eval(row["check"], dict(known))] == []


@pytest.mark.slow
def test_labelled_golds_pass_the_gold_check(verifier):
    golds = sorted({case.gold for case in read_cases(CASES)})
    assert [gold for gold, why in zip(golds, verifier.check_golds(golds), strict=True) if why] == []


def test_report_counts_by_kind_and_lists_mistakes(tmp_path):
    file = tmp_path / "cases.jsonl"
    file.write_text(
        '{"completion": "\\\\boxed{1}", "gold": "1", "expected": true, "kind": "a"}\n'
        '{"completion": "\\\\boxed{1}", "gold": "1", "expected": false, "kind": "b"}\n'
        '{"completion": "1", "gold": "1", "expected": true}\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "rewards.check", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1  # there is a false positive
    assert ["a", "1", "1.0000", "0", "0"] in [line.split() for line in lines]
    assert ["b", "1", "0.0000", "1", "0"] in [line.split() for line in lines]
    assert ["all", "3", "0.3333", "1", "1"] in [line.split() for line in lines]
    assert [line[:2] for line in lines[-2:]] == ["FP", "FN"]


@pytest.mark.promise("malformed lines in labelled data, stored responses, metrics and samples")
def test_a_line_that_is_no_case_is_named(tmp_path):
    file = tmp_path / "cases.jsonl"
    file.write_text('{"completion": "x", "gold": "1"}\n')
    with pytest.raises(ValueError, match="line 1: completion and gold must be texts"):
        read_cases(file)
    file.write_bytes(b'\n{"completion": "\xff"}\n')
    with pytest.raises(ValueError, match=r"cases.jsonl line 2: not JSON \('utf-8' codec can't decode"):
        read_cases(file)


# --------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("completion", "answers"),
    [
        ("\\boxed{41}? No, it is \\boxed{42}", ("42",)),  # corrected
        ("\\boxed{41} or rather \\boxed{42}", ("42",)),
        ("The side is \\boxed{7}, so the area equals \\boxed{49}", ("49",)),  # built upon
        ("\\boxed{41} or \\boxed{42}", ("41", "42")),
        ("$\\boxed{1}$, $\\boxed{2}$, $\\boxed{3}$", ("1", "2", "3")),
        ("\\boxed{42}\n**Answer:** 43", ("42", "43")),
        ("Answer: 41\n\\boxed{42}", ("41", "42")),
        ("Answer: see the box\n\\boxed{42}", ("42",)),
        ("\\boxed{42}\nAnswer: see the box", ("42",)),
        ("\\boxed{42} \\boxed{42}", ("42",)),
        ("\\boxed{\\left\\{1,2\\right\\}}", ("\\left\\{1,2\\right\\}",)),
        ("\\boxed {42}", ("42",)),
        ("\\boxed 42$", ("42",)),
        ("\\fbox{42}", ("42",)),
        ("\\boxed{\\boxed{42}}", ("42",)),
        ("Answer: 1\nmany lines of doubt and then at last\nAnswer: 2", ("2",)),
        ("Answer: 1\nAnswer: 2", ("1", "2")),
        ("Answer:\n\n42", ("42",)),
        ("Answer: \\[\nx^2\n\\]", ("x^2",)),
        ("**Answer: 42**", ("42",)),
        ("\\boxed{1}</think>\\boxed{2}", ("2",)),
        ("Final Answer: The final answer is $25$. I hope it is correct.", ("The final answer is $25$.",)),
        ("**Answer: $18** per day", ("$18 per day",)),
        ("\\boxed{27}, otherwise \\boxed{6}.", ("27", "6")),
        ("Case 1: \\boxed{3}. Case 2: since $x$ is negative, \\boxed{-5}.", ("3", "-5")),
        ("Option A gives \\boxed{3}. Otherwise 4 more, so the total is \\boxed{7}.", ("7",)),
        ("\\boxed{42} or 43", ("42", "43")),
        ("\\boxed{0.33} or approximately 1/3", ("0.33",)),
        ("Answer:\n\\begin{align*}\n\\boxed{7}\n\\end{align*}", ("7",)),  # the label announces the box
        ("\\boxed{3/4}\n\n**Final answer:** $\\boxed{7}$", ("7",)),
        ("Final answer: \\boxed{3}\nFinal answer: \\boxed{7} or \\boxed{8}", ("7", "8")),
        ("\\boxed{44}. We check our answer: 17*44 = 748.", ("44",)),
        ("\\boxed{256}\nAnswer: The final answer is $128$.", ("256", "The final answer is $128$.")),
        ("$x=-\\boxed{5}$", ("-(5)",)),
        ("$2\\boxed{\\sqrt{3}}$", ("2(\\sqrt{3})",)),
        ("$\\boxed{5}\\text{ cm}$", ("(5)\\text{ cm}",)),
        ("$\\boxed{5}\\text{ is it}$", ("5",)),
        ("$9-\\boxed{5}$", ("5",)),  # a blank that is filled in
        ("1. \\boxed{5}\n\n- \\boxed{5}", ("5",)),  # an item's number, a bullet
        ("so it is\n#### 1,200", ("1,200",)),  # GSM8K
        ("#### Step 3\nso", ()),
        ("</think> <answer> 19 </answer>", ("19",)),  # R1-Zero
        ("<answer> 19", ()),
    ],
)
def test_final_answers(completion, answers):
    assert final_answers(completion) == answers


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "the answer is 42",
        "$42$",
        "\\boxed{}",
        "\\boxed{ ~ }",
        "\\boxed{\\phantom{42}}",
        "\\phantom{\\boxed{42}}",
        "\\boxed{42} \\boxed{}",
        "\\boxed{42} \\boxed{43",
        "\\boxed{42",
        "\\boxed",
        "<think>\\boxed{42}",
        "<think>\\boxed{42}</think>",
        "a</think><think>\\boxed{42}",
        "Answer:",
        "Answer: $ $",
        "\\boxedx{42}",
    ],
)
def test_no_answer(completion, verifier):
    assert final_answers(completion) == ()
    assert verifier.grade(completion, "42") == Grade(False, None, "no_answer")


def test_several_answers_must_agree_or_together_be_the_list(verifier):
    assert verifier.grade("\\boxed{42} and \\boxed{43}", "42").reason == "contradiction"
    assert verifier.grade("\\boxed{0.5}, that is \\boxed{\\frac12}", "1/2").reason == "match"
    assert verifier.grade("$\\boxed{3}$ and $\\boxed{-3}$", "\\pm 3").reason == "match"
    assert verifier.grade("$\\boxed{\\sqrt8}$ and $\\boxed{3}$", "3, 2\\sqrt2").reason == "match"
    hedge = ", ".join(f"$\\boxed{{{n}}}$" for n in range(30, 43))
    assert verifier.grade(hedge, "42").reason == "contradiction"


def test_vote_key():
    assert vote_key("0.50") == vote_key("\\frac{1}{2}") == vote_key("$1/2$.") == "1/2"
    assert vote_key("\\dfrac{\\pi}{6}") == vote_key("\\frac\\pi6") != vote_key("\\frac{\\pi}{3}")
    assert vote_key("x" * 10**6) == "x" * 10**6


# --------------------------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48\\,250", "48250"), ("1{,}000", "1000"), ("4 2", None), ("4,2", None), (".5", "1/2"), ("57.", "57"), ("025",
        "25"),
        ("2\\frac12", "5/2"), ("-1\\frac{1}{2}", "-3/2"), ("3\\frac52", None), ("8.7 \\times 10^8", "870000000"),
        ("1e-7", "1/10000000"),
        ("42\\%", "21/50"), ("0.\\overline{3}", "1/3"), ("0.1\\bar 6", "1/6"), ("0.\\dot14\\dot2", "142/999"),
        ("0.333...", "1/3"),
        ("3.14\\ldots", None), ("0.(27)", "3/11"), ("\\frac{1}{0}", None), ("9" * 401, None), ("1e999999", None), ("½",
        "1/2"), ("−3", "-3"),
    ],
)  # fmt: skip
def test_exact_numbers(text, value):
    found = number(normalize(text))
    assert (None if found is None else str(found)) == value


def test_control_characters_do_not_join_digits(verifier):
    assert not grade(verifier, "4\x002", "42").correct


def test_numbers_words_and_lists_need_no_process():
    pairs = [
        ("a1b5c3\\boxed{3}", "3"),
        ("\\boxed{\\frac{14}{3}}", "14/3"),
        ("\\boxed{\\text{Evelyn}}", "evelyn"),
        ("\\boxed{(B)}", "B"),
    ]
    pairs += [("\\boxed{3, 0.5}", "1/2, 3"), ("\\boxed{(-\\infty,2)}", "(-\\infty, 2)"), ("\\boxed{5\\text{ cm}}", "5")]
    with Verifier(workers=1, timeout_s=1.0, memory_gib=1.0, grader="math") as fresh:
        tickets = [fresh.submit(completion, gold) for completion, gold in pairs]
        assert all(isinstance(ticket, Grade) and ticket.correct for ticket in tickets)
        assert not fresh._threads


def test_the_fast_path_does_not_guess():
    assert compare(("\\sqrt8",), "2\\sqrt2", UNDECIDED) == (None, "mismatch")
    assert compare(("42", "\\sqrt{1764}"), "42", UNDECIDED)[0] is None


@pytest.mark.parametrize(
    ("answer", "gold", "differ"),
    [
        ("x^2+1", "x^2+2", True), ("2\\sqrt2", "\\sqrt7", True), ("xy^2", "x^2y", True), ("3-2i", "3+2i", True),
        ("(x+1)^2", "x^2+2x+1", False), ("\\frac{3\\pi}{2}", "3\\pi/2", False), ("xy^2", "y^2x", False),
        ("e^xe^y", "e^{x+y}", False), ("\\frac{x+2}7", "\\frac x7+\\frac27", False), ("(3-2i)^2", "5-12i", False),
        ("x^2+C", "x^2+K", False), ("(-8)^{1/3}", "-2", False), ("2\\frac12x", "\\frac52x", False),
        ("2^{99}\\pi", "2^{99}\\pi+1", False), ("f(x)", "fx", False), ("1/2x", "x/2", False),
        ("\\frac12^2x", "\\frac x4", False),
    ],
)  # fmt: skip
def test_simple_expressions_are_refuted_at_one_point_only_when_that_is_certain(answer, gold, differ):
    verdict = compare((answer,), gold, UNDECIDED)[0]
    assert verdict is False if differ else verdict is not False


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("\\frac{1}{30!}", "\\frac{1}{31!}"), ("2^{-99}", "2^{-98}"), ("\\sqrt{10^{40}+1}", "10^{20}"), ("x+10^{-20}",
        "x"),
        ("\\cos(10^{300})", "\\frac{\\pi}{6}"), ("\\lfloor 10^{1000}\\pi\\rfloor", "42"), ("3.14159265358979", "\\pi"),
        ("2^{-70}\\pi", "2^{-71}\\pi"), ("e^{-40}", "e^{-41}"),
    ],
)  # fmt: skip
def test_close_numbers_are_not_equal(answer, gold, verifier):
    assert not grade(verifier, answer, gold).correct


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("\\sqrt{3+2\\sqrt2}", "1+\\sqrt2"), ("\\cos 60°", "\\frac12"), ("i^2", "-1"), ("e^{i\\pi/3}",
        "\\frac12+\\frac{\\sqrt3}{2}i"),
        ("\\sqrt[3]{-8}", "-2"), ("2(x)", "2x"), ("2ba", "2ab"), ("\\log_2 8", "3"),
        ("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", "-2"),
        ("2x-y+3=0", "y=2x+3"), ("0.1x+0.2x", "0.3x"),
    ],
)  # fmt: skip
def test_algebra(answer, gold, verifier):
    assert grade(verifier, answer, gold).correct


def test_verify_is_not_called_the_wrong_way_round(verifier):
    """An interval may answer an inequality; the pair that math-verify itself treats asymmetrically."""
    assert grade(verifier, "(1,2)", "1<x<2").correct and grade(verifier, "1<x<2", "(1,2)").correct


@pytest.mark.parametrize(
    ("text", "names", "links", "value", "solved"),
    [
        ("x=5", ("x",), (), "5", True), ("5=x", ("x",), (), "5", True), ("x=10-x", ("x",), (), "10-x", False),
        ("2x+3=13", (), ("2x+3",), "13", True), ("xx=42", (), ("xx",), "42", True),
        ("x^2=42", (), ("x^{2}",), "42", True), ("x^{-1}=42", (), ("x^{-1}",), "42", True),
        ("x=\\frac{10}2=5", ("x",), ("\\frac{10}{2}",), "5", True), ("m+n=5", ("m+n",), (), "5", True),
        ("P(X=7)=0.3", ("P(X=7)",), (), "0.3", True), ("7!=5040", (), ("7!",), "5040", True),
        ("\\text{not }=42", (), ("\\text{not}",), "42", True), ("n=2,500", ("n",), (), "2,500", True),
        ("x\\in\\{1,2\\}", ("x",), (), "\\{1,2\\}", True),
    ],
)  # fmt: skip
def test_what_is_said_of_what(text, names, links, value, solved):
    found = statement(normalize(text))
    assert found and (found.names, found.links, found.value, found.solved) == (names, links, value, solved)


@pytest.mark.parametrize("text", ["5", "1,2", "x=1,y=2", "x\\neq5", "x!=24", "(1,2)", "x\\leq5"])
def test_what_is_no_statement(text):
    assert statement(normalize(text)) is None


def test_sets_of_reals_in_any_form_are_one_region():
    unions = "(-\\infty,1)\\cup(1,2)\\cup(2,\\infty)"
    forms = ["\\mathbb R\\setminus\\{1,2\\}", "x\\ne1\\text{ and }x\\ne2", unions]
    found = [region(normalize(form)) for form in forms]
    assert all(part and len(part.spans) == 1 and set(part.holes) == {"1", "2"} for part in found)
    touching = region(normalize("(-\\infty,1]\\cup(1,2)"))
    assert touching and touching.holes == () and len(touching.spans) == 1
    assert region("x^{2}<4") is None and region("(1,2,3)") is None


@pytest.mark.parametrize(
    "answer",
    ["9^{9^9}", "10^6!", "((9!)!)!", "42!!", "(10^{3})!", "2501!", "x^{10^9}",
    "x^{" * 6 + "x" + "}" * 6, "(" * 30 + "1" + ")" * 30, "1" * 401 + "x", "x+" * 200 + "x",
    "\\binom{1000000}{5}x", "x" * 2001],
)  # fmt: skip
def test_guards_refuse_without_a_process(answer):
    assert compare((answer,), "42", UNDECIDED) == (False, "guard")


def test_small_powers_are_not_guarded(verifier):
    assert grade(verifier, "2^{3^2}", "512").correct
    assert grade(verifier, "2^{1000}", "4^{500}").correct
    assert grade(verifier, "e^{2x^2}", "e^{x^2+x^2}").correct
    assert grade(verifier, "\\frac{9!}{3!}", "60480").correct


# -------------------------------------------------------------------------------------------------------------- golds


def test_golds_that_cannot_be_matched_are_named(verifier):
    bad = ["", "$$", "\\frac{1}{", "{a", "\\boxed{3", "\\frac10", "9^{9^9}", "\\foo{x}+", "?"]
    good = [
        "42",
        "025",
        "\\text{Evelyn}",
        "5\\text{ cm}",
        "$3$",
        "(3,4]",
        "x^2+1",
        "\\{1,2\\}",
        "52_8",
        "75^\\circ",
        "1,2",
        "y=2x+3",
    ]
    assert all(verifier.check_golds(bad))
    assert verifier.check_golds(good) == [None] * len(good)
    assert rewards.check_golds(["", "7"]) == ["empty", None]


# ------------------------------------------------------------------------------------------------------------ shaping


def shaped(grade: Grade, tokens: int, truncated: bool = False, **changes: Any) -> float:
    knobs = dict(right=1.0, wrong=-1.0, overlong_buffer_tokens=0, max_response_tokens=100)
    return shape_reward(grade, tokens, truncated, **{**knobs, **changes})


def test_shaping_by_hand():
    right, wrong, none = Grade(True, "1", "match"), Grade(False, "2", "mismatch"), Grade(False, None, "no_answer")
    assert shaped(right, 50) == 1.0 and shaped(wrong, 50) == -1.0
    assert shaped(none, 50) == -1.0
    assert shaped(Grade(True, None, "match", own_score=0.25), 50) == -0.5  # a quarter of the way from -1 to 1
    soft: dict[str, Any] = {"overlong_buffer_tokens": 20}
    assert [shaped(right, n, **soft) for n in (80, 85, 90, 100)] == [1.0, 0.75, 0.5, 0.0]
    assert shaped(right, 50, True, **soft) == 0.0 and shaped(right, 100, True) == 1.0


# ------------------------------------------------------------------------------------------------------------- import


def test_import_is_light():
    heavy = ("torch", "sympy", "math_verify", "numpy", "data", "train")
    code = f"import sys, rewards; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
