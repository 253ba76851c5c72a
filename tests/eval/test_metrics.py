"""mean@k, pass@k, maj@k: hand-worked numbers, brute force over every subset, a bootstrap, bad tables."""

from collections import Counter
from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import MAX_SAMPLES, maj_at_k, mean_at_k, pass_at_k

SAMPLE = st.tuples(st.integers(0, 1), st.sampled_from(["a", "b", "c", "d", None]))  # correct, vote


def majority_by_listing(correct: list[int], votes: list[str | None], k: int) -> float:
    """The definition, subset by subset: draw k, count the votes, draw lots among the leaders."""
    score = {v: np.mean([c for c, w in zip(correct, votes, strict=True) if w == v]) for v in votes if v is not None}
    subsets = list(combinations(range(len(votes)), k))
    total = 0.0
    for subset in subsets:
        counts = Counter(vote for i in subset if (vote := votes[i]) is not None)
        leaders = [v for v, count in counts.items() if count == max(counts.values())]
        total += float(np.mean([score[v] for v in leaders])) if leaders else 0.0
    return total / len(subsets)


def test_hand_worked_table() -> None:
    # Problem 1: one right of four; problem 2: all right; problem 3: none.
    correct = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert mean_at_k(correct).value == pytest.approx((0.25 + 1 + 0) / 3)
    # pass@2: 1 - C(3,2)/C(4,2) = 1 - 3/6 for problem 1.
    assert pass_at_k(correct, 2).value == pytest.approx((0.5 + 1 + 0) / 3)
    # sd of (.25, 1, 0): mean 5/12, squared deviations (1/36 + 49/144 + 25/144) = 78/144, over 2, root; over sqrt 3.
    assert mean_at_k(correct).stderr == pytest.approx(sqrt(78 / 144 / 2) / sqrt(3))
    # Two wrong "7" beat one right "5" when all four vote; the silent one has no vote.
    votes = [["5", "7", "7", None], ["1"] * 4, [None] * 4]
    assert maj_at_k(correct, votes, 4).value == pytest.approx((0 + 1 + 0) / 3)
    # k = 2 of problem 1: {5,7} x2 tie -> 1/2 each, {5,-} -> 1, {7,7}, {7,-} x2 -> 0: (0.5 + 0.5 + 1) / 6.
    assert maj_at_k(correct, votes, 2).value == pytest.approx((2 / 6 + 1 + 0) / 3)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(samples: int) -> None:
    for right in range(samples + 1):
        row = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            hits = [any(row[i] for i in subset) for subset in combinations(range(samples), k)]
            assert pass_at_k(np.array([row]), k).value == pytest.approx(np.mean(hits), abs=1e-12)


def test_pass_at_k_closed_form_at_paper_size() -> None:
    correct = np.zeros((1, 32), dtype=bool)
    correct[0, :3] = True
    assert pass_at_k(correct, 8).value == pytest.approx(1 - comb(29, 8) / comb(32, 8), abs=1e-14)
    assert pass_at_k(correct, 32).value == 1.0
    assert pass_at_k(correct, 1).value == pytest.approx(mean_at_k(correct).value, abs=1e-14)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["a", "b", "c", "d", None])), min_size=1, max_size=8),
    st.data(),
)
def test_maj_at_k_is_the_mean_over_all_subsets(row: list[tuple[int, str | None]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    correct, votes = [c for c, _ in row], [v for _, v in row]
    found = maj_at_k(np.array([correct]), [votes], k).value
    assert found == pytest.approx(majority_by_listing(correct, votes, k), abs=1e-12)


@pytest.mark.slow
def test_maj_at_k_with_32_samples_and_with_the_most() -> None:
    # 20 right against 12 wrong: more samples make the majority surer, and all of them certain.
    correct, votes = np.array([[1] * 20 + [0] * 12]), [["r"] * 20 + ["w"] * 12]
    scores = [maj_at_k(correct, votes, k).value for k in (1, 3, 9, 31)]
    assert scores[0] == pytest.approx(20 / 32)
    assert scores == sorted(scores) and scores[-1] == pytest.approx(1.0)
    # Hypergeometric by hand: two or three right ones of three.
    assert scores[1] == pytest.approx((comb(20, 3) + comb(20, 2) * 12) / comb(32, 3))
    half = MAX_SAMPLES // 2
    big = maj_at_k(np.array([[1] * half + [0] * half]), [["r"] * half + ["w"] * half], half)
    assert big.value == pytest.approx(0.5, abs=1e-9)


def test_standard_errors_agree_with_a_bootstrap_over_problems() -> None:
    generator = np.random.default_rng(0)
    correct = generator.random((60, 9)) < generator.beta(0.5, 1.0, size=(60, 1))
    votes: list[list[str | None]] = [
        [("right" if c else f"wrong{generator.integers(3)}") for c in row] for row in correct
    ]
    draws = generator.integers(0, 60, size=(4000, 60))
    majority = [majority_by_listing(list(c), v, 5) for c, v in zip(correct, votes, strict=True)]
    for estimate, scores in (
        (mean_at_k(correct), correct.mean(axis=1)),
        (pass_at_k(correct, 4), np.array([pass_at_k(row[None], 4).value for row in correct])),
        (maj_at_k(correct, votes, 5), np.array(majority)),
    ):
        bootstrap = scores[draws].mean(axis=1).std()
        # The bootstrap divides by P, not P - 1, and 4000 draws leave about 1.1 %.
        assert estimate.stderr == pytest.approx(bootstrap / sqrt(59 / 60), rel=0.05)


def test_standard_error_covers_new_problems() -> None:
    """Many benchmarks of 30 problems from one known population: the errors made are as large as the errors stated."""
    generator = np.random.default_rng(1)
    ability = generator.beta(0.5, 1.0, size=(2000, 30, 1))
    tables = generator.random((2000, 30, 8)) < ability
    estimates = [mean_at_k(table) for table in tables]
    made = np.std([e.value for e in estimates])
    assert sqrt(np.mean([e.stderr**2 for e in estimates])) == pytest.approx(made, rel=0.06)


def test_order_of_samples_does_not_matter() -> None:
    generator = np.random.default_rng(2)
    correct = generator.integers(0, 2, (5, 9))
    votes = [[str(v) for v in row] for row in generator.integers(0, 3, (5, 9))]
    order = generator.permutation(9)
    shuffled = [[row[i] for i in order] for row in votes]
    for k in (2, 5, 9):
        assert pass_at_k(correct, k) == pass_at_k(correct[:, order], k)
        assert maj_at_k(correct, votes, k).value == pytest.approx(maj_at_k(correct[:, order], shuffled, k).value)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: mean_at_k(np.zeros(3)), r"\[problems, samples\]"),
        (lambda: mean_at_k(np.zeros((0, 4))), "at least one"),
        (lambda: mean_at_k(np.array([[0.0, 0.5]])), "0 and 1 alone"),
        (lambda: mean_at_k(np.array([[0.0, np.nan]])), "0 and 1 alone"),
        (lambda: mean_at_k(np.array([["1", "0"]])), "0 and 1 alone"),
        (lambda: pass_at_k(np.zeros((2, 4)), 5), r"1\.\.4"),
        (lambda: pass_at_k(np.zeros((2, 4)), 0), r"1\.\.4"),
        (lambda: pass_at_k(np.zeros((1, MAX_SAMPLES + 1)), 2), f"at most {MAX_SAMPLES}"),
        (lambda: maj_at_k(np.zeros((1, 2)), [["a"]], 1), "shape of correct"),
        (lambda: maj_at_k(np.zeros((2, 1)), [["a"]], 1), "shape of correct"),
        (lambda: maj_at_k(np.zeros((1, 2)), [["a", None]], 3), r"1\.\.2"),
    ],
)
def test_bad_tables_are_refused(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_one_problem_has_no_standard_error() -> None:
    assert np.isnan(mean_at_k(np.array([[1, 0]])).stderr)
