"""One evaluation pass: sample K responses per problem, grade them, compute mean@K, pass@K and maj@K of each set.

    rows = evaluate(engine, verifier, prompts, sampling, samples=32, seed=0, rank=0, world=1, progress=None)
    summarize(in_order(rows, prompts), 32, ks=(32,))["eval/aime24/mean@32"]

Training calls `evaluate_policy` on every rank. `python -m eval.run` uses its three parts (`generate`, `Grading`,
`summarize`) in separate processes. The seed of a sample is a pure function of (seed, set, problem, sample). With an
engine that seeds each sample, metrics therefore depend neither on the number of ranks nor on the other sets.
There are two graders: `correct` is the verdict of the tolerant verifier, `strict` that of the paper's "Answer:" rule.

Axes: P problems of a set, K samples per problem.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import Problem
from eval.metrics import Estimate, maj_at_k, mean_at_k, over_problems, pass_at_k
from rewards import Grade, Ticket, Verifier, answer_line_reward, vote_key
from trainer.checkpoint import replace_file
from trainer.rollout import Completion, Engine, Sampling

if TYPE_CHECKING:
    from trainer.run import Run

Prompts = Mapping[str, Sequence[tuple[Problem, list[int]]]]  # set name -> its problems with their prompt's token ids
Row = dict[str, Any]  # one sample as JSON types, to be stored and sent between ranks


@dataclass(frozen=True)
class Job:
    """Samples to generate for one problem."""

    set: str
    problem: str  # the problem's id
    gold: str
    prompt: list[int]  # token ids
    samples: list[int]  # sample numbers, each in 0..K-1


def evaluate(
    engine: Engine,
    verifier: Verifier,
    prompts: Prompts,
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    rank: int,
    world: int,
    progress: Callable[[int], object] | None,
) -> list[Row]:
    """Sample and grade this rank's share. `summarize` takes the rows of all ranks.

    samples: K, responses per problem. progress: called with 1 as each response of this rank finishes. Grading runs in
    the verifier's processes while the engine is still sampling.
    """
    grading = Grading(verifier, prompts)
    generate(engine, share(jobs(prompts, samples), rank, world), sampling, seed, grading.submit, progress)
    return grading.collect()


def evaluate_policy(run: "Run") -> tuple[dict[str, float], float]:
    """Evaluate on every set with the sampling settings of training. Collective. Raises Interrupted after a signal.

    Returns mean@k, pass@k and maj@k of every set, and mean@k averaged over sets, which ranks checkpoints. Rank 0 writes
    the share of correct responses per problem to evals/step_000010.json: {set: {problem id: share}}.
    """
    cfg, sets, k = run.cfg, run.task.evals, run.cfg.eval_samples
    mine = {"rank": run.plan.rank, "world": run.plan.processes}
    rows: list[Row] = []
    answers = sum(map(len, sets.values())) * k // run.plan.processes
    with run.interruptible(), run.tracker.progress(answers, f"step {run.step} evaluation", "answers") as bar:

        def one_more(count: int) -> None:
            bar.update(count)
            run.raise_if_interrupted()

        rows = evaluate(
            run.engine, run.eval_verifier, sets, run.sampling, samples=k, seed=cfg.seed, progress=one_more, **mine
        )
    rows = in_order(run.ranks.gather(rows), sets)
    if run.ranks.is_main:
        write_scores(run.folder / "evals" / f"step_{run.step:06d}.json", rows, run.tracker.info)
    metrics = summarize(rows, k, (k,))
    return metrics, sum(metrics[f"eval/{name}/mean@{k}"] for name in sets) / len(sets)


def write_scores(path: Path, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Write {set: {problem id: share of correct samples}}. An OSError, such as a full disk, gives a warning."""
    correct: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        correct.setdefault(row["set"], {}).setdefault(row["problem"], []).append(row["correct"])
    shares = {name: {problem: sum(c) / len(c) for problem, c in of.items()} for name, of in correct.items()}
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, (json.dumps(shares) + "\n").encode())
    except OSError as error:
        say(f"warning: {path} is not written ({error.strerror}); training goes on")


def jobs(prompts: Prompts, samples: int) -> list[Job]:
    """Return a job with samples 0..K-1 for every problem of every set."""
    return [
        Job(name, problem.id, problem.gold, list(ids), list(range(samples)))
        for name, pairs in prompts.items()
        for problem, ids in pairs
    ]


def share(every: Sequence[Job], rank: int, world: int) -> list[Job]:
    """Return every `world`-th sample. Each rank samples nearly all problems, which balances long responses."""
    before, mine = 0, []
    for job in every:
        numbers = job.samples[(rank - before) % world :: world]
        before += len(job.samples)
        mine += [replace(job, samples=numbers)] if numbers else []
    return mine


def sample_seed(seed: int, set: str, problem: str, sample: int) -> int:
    """Return the seed of one sample, in 0..2**63-1: a hash, so that neighbouring samples are independent."""
    digest = blake2b(repr((seed, set, problem, sample)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generate(
    engine: Engine,
    wanted: Sequence[Job],
    sampling: Sampling,
    seed: int,
    on_row: Callable[[Row], None],
    progress: Callable[[int], object] | None,
) -> None:
    """Sample every response of `wanted`. `on_row` receives each ungraded row as it finishes."""

    def on_finish(i: int, j: int, completion: Completion) -> None:
        job = wanted[i]
        on_row(
            {
                "set": job.set,
                "problem": job.problem,
                "sample": job.samples[j],
                "gold": job.gold,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "text": completion.text,
            }
        )
        if progress:
            progress(1)

    seeds = [[sample_seed(seed, job.set, job.problem, sample) for sample in job.samples] for job in wanted]
    engine.generate([job.prompt for job in wanted], sampling, seeds=seeds, on_finish=on_finish)


class Grading:
    """Both graders over a stream of rows: submit rows during sampling, collect the grades at the end."""

    def __init__(self, verifier: Verifier, prompts: Prompts):
        self.verifier = verifier
        self.about = {
            (name, problem.id): {"problem": asdict(problem)} for name, pairs in prompts.items() for problem, _ in pairs
        }
        self.pending: list[tuple[Row, Ticket | Grade]] = []

    def submit(self, row: Row) -> None:
        about = self.about[row["set"], row["problem"]]
        self.pending.append((row, self.verifier.submit(row["text"], row["gold"], about)))

    def collect(self) -> list[Row]:
        """Return every submitted row with its verdicts: correct, extracted, reason, vote (None: no answer), strict."""
        pending, self.pending = self.pending, []
        grades = self.verifier.collect([ticket for _, ticket in pending])
        graded = []
        for (row, _), grade in zip(pending, grades, strict=True):
            verdicts = {
                "correct": grade.correct,
                "extracted": grade.extracted,
                "reason": grade.reason,
                "vote": None if grade.extracted is None else vote_key(grade.extracted),
                "strict": answer_line_reward(row["text"], row["gold"]).correct,
            }
            graded.append(row | verdicts)
        return graded


def in_order(rows: Sequence[Row], prompts: Prompts) -> list[Row]:
    """Sort rows by set, problem and sample, so that sums do not depend on the number of ranks, not even by rounding."""
    order = {(name, problem.id): i for name, pairs in prompts.items() for i, (problem, _) in enumerate(pairs)}
    sets = list(prompts)
    return sorted(rows, key=lambda row: (sets.index(row["set"]), order[row["set"], row["problem"]], row["sample"]))


def summarize(rows: Sequence[Row], samples: int, ks: Sequence[int]) -> dict[str, float]:
    """Compute eval/<set>/mean@K, strict_mean@K, maj@K, pass@k, length and truncation, with _stderr over problems.

    rows: graded, exactly K = `samples` per problem. ks: the values of k for pass@k.
    """
    sets: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        sets.setdefault(row["set"], {}).setdefault(row["problem"], []).append(row)
    metrics: dict[str, float] = {}
    for name, problems in sets.items():
        table = list(problems.values())  # (P, K)
        counts = {len(group) for group in table}
        assert counts == {samples}, f"{name}: {counts} samples a problem, not {samples}"
        correct = np.array([[row["correct"] for row in group] for group in table])
        strict = np.array([[row["strict"] for row in group] for group in table])
        votes = [[row["vote"] for row in group] for group in table]
        lengths = np.array([[row["tokens"] for row in group] for group in table], dtype=float)
        truncated = np.array([[row["finish_reason"] == "length" for row in group] for group in table])
        estimates: dict[str, Estimate] = {f"mean@{samples}": mean_at_k(correct)}
        estimates |= {f"pass@{k}": pass_at_k(correct, k) for k in ks}
        estimates |= {
            f"maj@{samples}": maj_at_k(correct, votes),
            f"strict_mean@{samples}": mean_at_k(strict),
            "response_length_mean": over_problems(lengths.mean(axis=1)),
            "truncated": over_problems(truncated.mean(axis=1)),
        }
        for metric, estimate in estimates.items():
            metrics[f"eval/{name}/{metric}"] = estimate.value
            if np.isfinite(estimate.stderr):
                metrics[f"eval/{name}/{metric}_stderr"] = estimate.stderr
    return metrics
