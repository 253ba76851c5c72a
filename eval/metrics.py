"""mean@k, unbiased pass@k and maj@k of a [problems, samples] table, each with its standard error over problems.

    estimate = pass_at_k(correct, k=8)      # correct: (P, n) of 0/1;  estimate.value, estimate.stderr

Pure functions on numpy arrays. The standard error covers the sampling of problems and of responses. It does not cover
the training seed, which eval/compare.py does.

Axes: P problems, n samples per problem.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Mean over problems with its standard error."""

    value: float  # mean over problems, in [0, 1]
    stderr: float  # standard error of that mean over problems; nan with one problem


def mean_at_k(correct: np.ndarray) -> Estimate:
    """Share of correct samples. `correct`: (P, n) of 0/1. The expectation is the same for every k, so all n count."""
    return over_problems(correct.mean(axis=1))


def pass_at_k(correct: np.ndarray, k: int) -> Estimate:
    """Probability that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k) for c correct samples of n.

    Unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1), which draws samples without replacement. The
    "best@k" of some trainers resamples k of n with replacement and is lower.
    `correct`: (P, n) of 0/1. 1 <= k <= n.
    """
    n = correct.shape[1]
    return over_problems(np.array([1 - comb(n - int(c), k) / comb(n, k) for c in correct.sum(axis=1)]))


def maj_at_k(correct: np.ndarray, votes: Sequence[Sequence[str | None]]) -> Estimate:
    """Share of problems whose most frequent answer among all k samples is correct.

    `correct`: (P, k) of 0/1. `votes`: (P, k), equal strings for equal answers (rewards.vote_key), None for no answer.
    - Samples without an answer do not vote. A problem without votes counts 0.
    - Ties: a problem counts the mean of `correct` over the samples with a most frequent answer.
    - The mean also covers samples with the same answer but different grades (a grader's timeout).
    """
    scores = []
    for row, row_votes in zip(correct, votes, strict=True):
        counts = Counter(vote for vote in row_votes if vote is not None)
        leaders = [vote for vote, count in counts.items() if count == max(counts.values())]
        scores.append(np.mean([c for c, vote in zip(row, row_votes, strict=True) if vote in leaders] or [0.0]))
    return over_problems(np.array(scores))


def over_problems(scores: np.ndarray) -> Estimate:
    """Mean and standard error over problems. scores: (P,), one per problem."""
    problems = len(scores)
    stderr = float(np.std(scores, ddof=1)) / sqrt(problems) if problems > 1 else float("nan")
    return Estimate(float(np.mean(scores)), stderr)
