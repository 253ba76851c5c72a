"""Fuzzing in seconds; `make fuzz` is the same for longer."""

import pytest
from fuzzing import FRAGMENTS, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Grade, Verifier, answer_line_reward, extract_answer, vote_key
from rewards.math.compare import UNDECIDED, compare
from rewards.math.extract import final_answers
from rewards.math.golds import Undecided, trouble_with

any_text = st.text(st.characters(codec=None), max_size=60)
latex = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
answers = st.one_of(any_text, latex)


@settings(max_examples=300, deadline=None)
@given(answer=answers, gold=answers)
def test_the_callers_part_never_raises(answer, gold):
    for completion in (answer, f"\\boxed{{{answer}}}", f"Answer: {answer}"):
        found = final_answers(completion)
        assert all(isinstance(item, str) for item in found)
        if found:
            verdict, reason = compare(found, gold, UNDECIDED)
            assert verdict in (True, False, None) and isinstance(reason, str)
        assert isinstance(vote_key(extract_answer(completion) or ""), str)
        assert isinstance(answer_line_reward(completion, gold), Grade)


@settings(max_examples=200, deadline=None)
@given(gold=answers)
def test_the_gold_check_never_raises(gold):
    try:
        assert isinstance(trouble_with(gold, UNDECIDED), (str, type(None)))
    except Undecided:
        pass


@settings(max_examples=200, deadline=None)
@given(answer=latex.filter(lambda text: bool(text.strip())))
def test_an_answer_equals_itself_or_is_no_answer(answer):
    found = final_answers(f"\\boxed{{{answer}}}")
    if found == (answer.strip(),):
        assert compare(found, answer, UNDECIDED)[0] is True


@pytest.mark.slow
def test_whole_verifier_on_some_batches():
    with Verifier(workers=2, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        reasons, trouble = fuzz(verifier, seed=20260101, batch=50, go_on=lambda items: items < 150)
    assert trouble is None and reasons.total() == 150
