"""mean@k, unbiased pass@k and maj@k of a [problems, samples] table, each with its standard error over problems.

    estimate = pass_at_k(correct, k=8)      # correct: (P, n) of 0/1;  estimate.value, estimate.stderr

Pure functions on numpy arrays. The standard error is over PROBLEMS: how far the figure would move with other problems
of the same kind and other samples. It does not contain the training seed; eval/compare.py does that.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np


@dataclass(frozen=True)
class Estimate:
    value: float  # mean over problems, in [0, 1]
    stderr: float  # standard error of that mean over problems; nan with one problem


def mean_at_k(correct: np.ndarray) -> Estimate:
    """Share of correct samples. `correct`: (P, n) of 0/1. Every k <= n has the same expectation, so all n are used."""
    return over_problems(correct.mean(axis=1))


def pass_at_k(correct: np.ndarray, k: int) -> Estimate:
    """Probability that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k) for c correct ones of n.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1), samples drawn without replacement. The
    "best@k" of some trainers resamples k of n with replacement and reads lower.
    `correct`: (P, n) of 0/1; 1 <= k <= n.
    """
    n = correct.shape[1]
    return over_problems(np.array([1 - comb(n - int(c), k) / comb(n, k) for c in correct.sum(axis=1)]))


def maj_at_k(correct: np.ndarray, votes: Sequence[Sequence[str | None]]) -> Estimate:
    """Share of problems whose most frequent answer among all k samples is correct.

    `correct`: (P, k) of 0/1; `votes`: the same shape, equal strings for equal answers (rewards.vote_key), None where a
    sample gave no answer.
    - No answer, no vote; if none of the k votes, the problem counts 0.
    - Each of several most frequent answers counts alike.
    - If samples of one answer were graded differently (a grader's timeout), that answer counts their mean.
    """
    scores = []
    for row, row_votes in zip(correct, votes, strict=True):
        counts = Counter(vote for vote in row_votes if vote is not None)
        leaders = [vote for vote, count in counts.items() if count == max(counts.values())]
        scores.append(np.mean([c for c, vote in zip(row, row_votes, strict=True) if vote in leaders] or [0.0]))
    return over_problems(np.array(scores))


def over_problems(scores: np.ndarray) -> Estimate:
    """Mean and standard error over problems of one score per problem, (P,)."""
    problems = len(scores)
    stderr = float(np.std(scores, ddof=1)) / sqrt(problems) if problems > 1 else float("nan")
    return Estimate(float(np.mean(scores)), stderr)
