"""A reward of the user's: what it is given, what it may return, and that a mistake in it is no wrong answer."""

import re
import textwrap

import pytest
from launching import ROOT
from verifiers import own_verifier

from rewards import Grade, GraderError, Verifier

PROBLEM = {"id": 7, "level": 5, "row": {"tests": "6*7"}}
ABOUT = {"problem": PROBLEM, "prompt": "What is 6*7?", "response_tokens": 9, "truncated": False}


def test_bools_and_numbers_are_scores(tmp_path, capfd):
    body = """
        def reward(completion, gold):
            print("to stderr, not into the protocol", flush=True)
            if completion == "bool":
                return gold == "yes"
            return len(completion) / 10
        """
    with own_verifier(tmp_path, body) as verifier:
        assert verifier.grade("bool", "yes") == Grade(True, None, "match", 1.0, {})
        assert verifier.grade("bool", "no") == Grade(False, None, "mismatch", 0.0, {})
        assert verifier.grade("abc\x00\ud800", "") == Grade(True, None, "match", 0.5, {})
        assert verifier.grade("bool", "yes").score == 1.0
    assert "to stderr" in capfd.readouterr().err


def test_the_documented_example_runs(tmp_path):
    body = (ROOT / "docs" / "verifier.md").read_text().split("```python\n")[1].split("```")[0]
    with own_verifier(tmp_path, body.replace("hard_and_short", "reward")) as verifier:
        grade = verifier.grade("Answer: 42", "42", ABOUT)
        assert grade == Grade(True, None, "match", 2.1, {"correct": 1.0, "short": 1.0})


@pytest.mark.promise("a reward that returns NumPy numbers")
def test_numbers_of_other_kinds_are_numbers(tmp_path):
    body = """
        from fractions import Fraction
        import numpy as np
        kinds = {"f32": np.float32(0.5), "bool": np.bool_(True), "int": np.int64(3), "0d": np.array(0.25),
                 "third": Fraction(1, 4)}
        def reward(completion, gold):
            return kinds[completion]
        """
    with own_verifier(tmp_path, body) as verifier:
        scores = [verifier.grade(kind, "").score for kind in ("f32", "bool", "int", "0d", "third")]
    assert scores == [0.5, 1.0, 3.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        ("None", "returned NoneType None as score; a finite number"),
        ("'1'", "returned str '1' as score"),
        ("float('nan')", "returned float nan as score"),
        ("10**400", "returned int 1"),
        ("10**5000", r"my_rewards.py:?\d*: TypeError: returned int \(too long to be shown\) as score"),
        ("{'score': 1, 'big': 10**5000}", "as big; a finite number"),
        ("[10**5000]", "returned list"),
        ("1j", "returned complex 1j as score"),
        ("{'right': 1}", "a dict needs names, and 'score' among them"),
        ("{'score': 1, 'short': None}", "returned NoneType None as short"),
        ("{'score': 1, 2: 3}", "a dict needs names"),
        ("{}['no such thing']", r"my_rewards.py:3: KeyError: 'no such thing'"),
        ("helper()", r"my_rewards.py:5: ZeroDivisionError: division by zero"),
        ("(_ for _ in ()).throw(__import__('asyncio').CancelledError)", r"my_rewards.py:3: CancelledError"),
    ],
)
@pytest.mark.promise("a reward that returns no number or raises")
@pytest.mark.promise("a reward's number or text that is too long to show")
def test_a_reward_that_fails_ends_the_grading(tmp_path, returns, told):
    body = f"\ndef reward(completion, gold):\n    return {returns}\ndef helper():\n    return 1 / 0\n"
    with own_verifier(tmp_path, body) as verifier:
        with pytest.raises(GraderError) as error:
            verifier.grade("so the answer is 42", "42")
    assert re.search(told, str(error.value)) and str(error.value).startswith(str(tmp_path / "my_rewards.py"))
    assert str(error.value).endswith("the completion begins 'so the answer is 42'")


def test_a_reward_that_hangs_or_dies_costs_its_item_only(tmp_path):
    body = """
        import os
        def reward(completion, gold):
            if completion == "leave":
                os._exit(3)
            while completion == "hang":
                pass
            return 1
        """
    with own_verifier(tmp_path, body, timeout_s=0.5) as verifier:
        reasons = [verifier.grade(item, "").reason for item in ("leave", "hang", "fine")]
    assert reasons == ["crash", "timeout", "match"]


# ---- what it is given ----


@pytest.mark.parametrize(
    ("signature", "returns", "score"),
    [
        ("completion, gold", "len(completion) * 10 + len(gold)", 32),
        ("answer, completion", "len(completion) * 10 + len(answer)", 32),
        ("gold, completion", "len(completion) * 10 + len(gold)", 32),
        ("completion", "len(completion)", 3),
        ("completion, threshold=7", "threshold", 7),
        ("row", "eval(row['tests'])", 42),
        ("completion, **others", "len(others)", 0),
        ("completion_with_special_tokens", "len(completion_with_special_tokens)", 7),
        ("response_tokens", "response_tokens", 9),
        ("prompt", "len(prompt)", 12),
        ("completion, gold, *, truncated, problem", "problem['id'] if truncated is False else -1", 7),
        ("completion, gold, response_tokens=1", "response_tokens", 9),
    ],
)
def test_a_reward_gets_what_its_parameters_name(tmp_path, signature, returns, score):
    with own_verifier(tmp_path, f"def reward({signature}):\n    return {returns}\n") as verifier:
        about = {**ABOUT, "completion_with_special_tokens": lambda: "abc<eos>"[:7]}
        assert verifier.grade("abc", "de", about).score == score


def test_a_default_holds_where_nothing_is_given_and_what_is_required_is_missed(tmp_path):
    with own_verifier(tmp_path, "def reward(completion, gold, response_tokens=1):\n    return response_tokens\n") as v:
        assert v.grade("abc", "de").score == 1
    with own_verifier(tmp_path, "def reward(completion, gold, prompt, problem):\n    return 1\n") as verifier:
        with pytest.raises(ValueError, match="has the parameters prompt, problem, not available here"):
            verifier.submit("abc", "de")


def test_further_numbers_come_back_in_parts(tmp_path):
    body = "def reward(completion, gold):\n    return {'score': 0.5, 'short': True, 'steps': 3}\n"
    with own_verifier(tmp_path, body) as verifier:
        grade = verifier.grade("abc", "de")
    assert (grade.score, grade.parts) == (0.5, {"short": 1.0, "steps": 3.0}) and hash(grade)
    assert Grade(True, "42", "match").parts == {}


@pytest.mark.parametrize(
    ("grader", "told"),
    [
        ("maths", "allowed are"),
        ("nowhere.py:reward", "no file"),
        ("FILE:nothing", "AttributeError"),
        ("FILE:1x", "allowed are"),
        ("BROKEN:reward", "SyntaxError"),
        ("RAISES:reward", r"raises.py:2: ZeroDivisionError"),
        ("FILE:number", "number is not a function but int"),
        ("FILE:three", r"three has unknown or ambiguous parameters \(got level\); use completion, gold, .*default$"),
        ("FILE:one", r"one has unknown or ambiguous parameters \(got text\)"),
        ("FILE:places", r"places has unknown or ambiguous parameters \(got completion, gold\)"),
        ("FILE:starred", r"starred has unknown or ambiguous parameters \(got texts\)"),
        ("FILE:mixed", r"mixed has unknown or ambiguous parameters \(got gold\)"),
        ("FILE:both", r"both has unknown or ambiguous parameters \(got answer\)"),
        ("FILE:alone", r"alone has unknown or ambiguous parameters \(got answer\)"),
        ("FILE:useless", r"useless has unknown or ambiguous parameters \(got none that is known\)"),
        ("FILE:swapped", r"swapped has unknown or ambiguous parameters \(got first\)"),
    ],
)
@pytest.mark.promise("a reward that is not callable, or whose file fails")
def test_a_reward_that_cannot_be_used_is_refused_at_once(tmp_path, grader, told):
    (tmp_path / "good.py").write_text(
        textwrap.dedent(
            """
            number = 3
            def reward(completion, gold):
                return True
            def three(completion, gold, level):
                return True
            def one(text):
                return True
            def swapped(first, completion):
                return True
            def places(completion, gold, /):
                return True
            def starred(*texts):
                return True
            def mixed(completions, gold):
                return [True]
            def both(answer, gold):
                return answer == gold
            def alone(answer):
                return True
            def useless(limit=3):
                return True
            """
        )
    )
    (tmp_path / "broken.py").write_text("def reward(:\n")
    (tmp_path / "raises.py").write_text("\n1 / 0\n")
    for name in ("good", "broken", "raises"):
        grader = grader.replace({"good": "FILE"}.get(name, name.upper()), str(tmp_path / f"{name}.py"))
    with pytest.raises(ValueError, match=told):
        Verifier(workers=1, timeout_s=1.0, memory_gib=2.0, grader=grader)
