"""Metrics by hand and by brute force; one evaluation pass with a real engine, its figures computed from its rows."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb, sqrt
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from data import Problem, PromptBuilder, load_problems
from eval.evaluate import Job, Row, evaluate, in_order, sample_seed, share, summarize
from eval.metrics import maj_at_k, mean_at_k, pass_at_k
from rewards import Verifier
from trainer.rollout import EngineOptions, HfEngine, Sampling

SAMPLES = 6
OPTIONS = EngineOptions(
    engine="hf",
    dtype="float32",
    vocab_size=22,
    max_model_tokens=64,
    max_sequences=1,  # every sample its own batch, so that this engine too seeds each sample
    memory_share=0.5,
    cpu_cache_bytes=2**27,
    tensor_parallel=1,
    arguments={},
    trust_remote_code=False,
)


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout_s=3.0, memory_gib=2.0, grader="math") as verifier:
        yield verifier


def prompts_of(engine: HfEngine, *parts: slice) -> dict[str, list[tuple[Problem, list[int]]]]:
    builder = PromptBuilder(engine.tokenizer, template="plain", system_prompt="none", chat_template=False)
    problems = load_problems("toy_eval").problems
    return {f"part{i}": [(p, builder.build(p)) for p in problems[part]] for i, part in enumerate(parts)}


@pytest.fixture(scope="module")
def setting(tiny_model: Path) -> tuple[HfEngine, Sampling]:
    engine = HfEngine(str(tiny_model), OPTIONS, rank=0, world=1, device="cpu")
    return engine, Sampling(1.0, 1.0, 0, 12, (engine.tokenizer.eos_token_id,))


@dataclass
class EvalResult:
    metrics: dict[str, float]
    rows: list[Row]


@pytest.fixture(scope="module")
def result(setting: tuple[HfEngine, Sampling], verifier: Verifier) -> EvalResult:
    finished: list[int] = []
    prompts = prompts_of(setting[0], slice(0, 6), slice(6, 9))
    common = {"samples": SAMPLES, "seed": 7, "rank": 0, "world": 1}
    rows = evaluate(setting[0], verifier, prompts, setting[1], progress=finished.append, **common)
    assert sum(finished) == 9 * SAMPLES
    rows = in_order(rows, prompts)
    return EvalResult(summarize(rows, SAMPLES, (1, 2, SAMPLES)), rows)


def test_a_stop_text_that_begins_in_the_prompt_stops_nothing(setting: tuple[HfEngine, Sampling]) -> None:
    engine, sampling = setting
    (ids,) = [ids for _, ids in prompts_of(engine, slice(0, 1))["part0"]]
    own = {"seeds": [[5]], "on_finish": lambda i, j, completion: None}
    ((free,),) = engine.generate([ids], sampling, **own)
    across = engine.tokenizer.decode(ids)[-1] + free.text[0]
    ((stopped,),) = engine.generate([ids], replace(sampling, stop=(across,)), **own)
    assert stopped == free and len(free.token_ids) > 2


def test_metrics_are_those_of_the_rows(result: EvalResult) -> None:
    assert 0 < fmean(row["correct"] for row in result.rows) < 1, (
        "the model must be sometimes right, or this shows little"
    )
    for name, problems in (("part0", 6), ("part1", 3)):
        rows = [row for row in result.rows if row["set"] == name]
        groups = [rows[i : i + SAMPLES] for i in range(0, len(rows), SAMPLES)]
        assert len(groups) == problems and all(len({row["problem"] for row in group}) == 1 for group in groups)
        assert all([row["sample"] for row in group] == list(range(SAMPLES)) for group in groups)
        right = [sum(row["correct"] for row in group) for group in groups]
        expected = {
            f"mean@{SAMPLES}": fmean(c / SAMPLES for c in right),
            f"pass@{SAMPLES}": fmean(c > 0 for c in right),
            "pass@2": fmean(1 - comb(SAMPLES - c, 2) / comb(SAMPLES, 2) for c in right),
            f"strict_mean@{SAMPLES}": 0.0,  # this model never writes "Answer:"
            "response_length_mean": fmean(row["tokens"] for row in rows),
            "truncated": fmean(row["finish_reason"] == "length" for row in rows),
        }
        for metric, value in expected.items():
            assert result.metrics[f"eval/{name}/{metric}"] == pytest.approx(value), metric
        deviations = [(c / SAMPLES - expected[f"mean@{SAMPLES}"]) ** 2 for c in right]
        stderr = (sum(deviations) / (problems - 1) / problems) ** 0.5
        assert result.metrics[f"eval/{name}/mean@{SAMPLES}_stderr"] == pytest.approx(stderr)


def test_a_row_says_all_about_its_answer(result: EvalResult, verifier: Verifier) -> None:
    golds = {p.id: p.gold for p in load_problems("toy_eval").problems}
    for row in result.rows:
        assert row["gold"] == golds[row["problem"]]
        grade = verifier.grade(row["text"], row["gold"])
        assert (row["correct"], row["extracted"], row["reason"]) == (grade.correct, grade.extracted, grade.reason)
        assert (row["reason"] == "no_answer") == (row["extracted"] is None)
        assert row["tokens"] <= 12 and row["finish_reason"] in ("stop", "length")
        assert row["finish_reason"] == "stop" or row["tokens"] == 12


def test_share_of_ranks_changes_nothing(
    result: EvalResult, setting: tuple[HfEngine, Sampling], verifier: Verifier
) -> None:
    """Three ranks, each with its share: their rows together, in whatever order they come, are those of one rank."""
    prompts = prompts_of(setting[0], slice(0, 6), slice(6, 9))
    shares = [
        evaluate(setting[0], verifier, prompts, setting[1], samples=SAMPLES, seed=7, rank=rank, world=3, progress=None)
        for rank in range(3)
    ]
    assert [len(rows) for rows in shares] == [18, 18, 18]
    rows = in_order([row for number in (2, 0, 1) for row in shares[number]], prompts)
    assert rows == result.rows and summarize(rows, SAMPLES, (1, 2, SAMPLES)) == result.metrics


def test_samples_depend_on_their_problem_and_seed_alone(
    result: EvalResult, setting: tuple[HfEngine, Sampling], verifier: Verifier
) -> None:
    """The same problems under the same set name, in another order and without the rest: the same answers."""
    prompts = {"part0": prompts_of(setting[0], slice(0, 6))["part0"][4:1:-1]}
    common = {"samples": 3, "rank": 0, "world": 1, "progress": None}
    again = evaluate(setting[0], verifier, prompts, setting[1], seed=7, **common)
    texts = {(row["problem"], row["sample"]): row["text"] for row in result.rows}
    assert [row["text"] for row in again] == [texts[row["problem"], row["sample"]] for row in again]
    other = evaluate(setting[0], verifier, prompts, setting[1], seed=8, **common)
    assert [row["text"] for row in other] != [row["text"] for row in again]


def test_seeds_of_all_samples_differ() -> None:
    seeds = [sample_seed(s, name, f"p/{i}", j) for s in (0, 1) for name in "ab" for i in range(20) for j in range(32)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    # A fixed point: a changed formula would quietly change every published number.
    assert sample_seed(0, "aime24", "aime24/60", 0) == 1839272947890875216
    assert Counter(seed % 2 for seed in seeds)[0] == pytest.approx(len(seeds) / 2, rel=0.1)


def test_shares_cover_every_sample_once_and_evenly() -> None:
    every = [Job("s", f"p{i}", "1", [1], list(range(n))) for i, n in enumerate([5, 1, 7, 0, 3])]
    for world in (1, 2, 3, 5):
        shares = [share(every, rank, world) for rank in range(world)]
        found = [(job.problem, number) for jobs in shares for job in jobs for number in job.samples]
        assert sorted(found) == [(job.problem, number) for job in every for number in job.samples]
        sizes = [sum(len(job.samples) for job in jobs) for jobs in shares]
        assert max(sizes) - min(sizes) <= 1


def test_summary_by_hand() -> None:
    def row(problem: str, correct: bool, vote: str | None, strict: bool, tokens: int, finish: str) -> Row:
        verdicts = {"correct": correct, "vote": vote, "strict": strict}
        return {"set": "s", "problem": problem, "tokens": tokens, "finish_reason": finish, **verdicts}

    rows = [
        row("p", True, "5", True, 10, "stop"),
        row("p", False, "7", False, 20, "stop"),
        row("p", False, "7", False, 30, "length"),
        row("q", True, "1", False, 40, "stop"),
        row("q", True, "1", True, 40, "stop"),
        row("q", False, None, False, 40, "length"),
    ]
    metrics = summarize(rows, 3, (3,))
    assert metrics["eval/s/mean@3"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert metrics["eval/s/pass@3"] == 1.0
    assert metrics["eval/s/maj@3"] == 0.5
    assert metrics["eval/s/strict_mean@3"] == pytest.approx(1 / 3)
    assert metrics["eval/s/response_length_mean"] == pytest.approx(30)
    assert metrics["eval/s/truncated"] == pytest.approx(1 / 3)
    assert metrics["eval/s/response_length_mean_stderr"] == pytest.approx(10)  # problem means 20 and 40
    alone = summarize(rows[:3], 3, (3,))
    assert alone["eval/s/mean@3"] == pytest.approx(1 / 3) and not [key for key in alone if key.endswith("_stderr")]


# ---- metrics ----


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
    assert maj_at_k(correct, votes).value == pytest.approx((0 + 1 + 0) / 3)
    # "5" and "7" tie: a half. Of two samples that say "5", one timed out in the grader: a half of a half, and a half.
    assert maj_at_k(np.array([[1, 0, 0]]), [["5", "7", None]]).value == pytest.approx(1 / 2)
    assert maj_at_k(np.array([[1, 0, 0, 0]]), [["5", "5", "7", "7"]]).value == pytest.approx(1 / 4)
    assert maj_at_k(np.array([[1, 0, 0]]), [["5", "5", "7"]]).value == pytest.approx(1 / 2)


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


def test_standard_errors_agree_with_a_bootstrap_over_problems() -> None:
    generator = np.random.default_rng(0)
    correct = generator.random((60, 9)) < generator.beta(0.5, 1.0, size=(60, 1))
    votes = [[("right" if c else f"wrong{generator.integers(3)}") for c in row] for row in correct]
    draws = generator.integers(0, 60, size=(4000, 60))
    majority = [maj_at_k(c[None], [v]).value for c, v in zip(correct, votes, strict=True)]
    for estimate, scores in (
        (mean_at_k(correct), correct.mean(axis=1)),
        (pass_at_k(correct, 4), np.array([pass_at_k(row[None], 4).value for row in correct])),
        (maj_at_k(correct, votes), np.array(majority)),
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


def test_one_problem_has_no_standard_error() -> None:
    assert np.isnan(mean_at_k(np.array([[1, 0]])).stderr)
