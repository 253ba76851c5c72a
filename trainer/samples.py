"""What is logged of the answers: metrics of their rewards, and token by token runs/NAME/samples/step_000010.jsonl.

`python -m eval.view` makes a page of them (docs/view.md has the keys). What is measured of a token was measured in the
step: nothing is computed for the page.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.schema import Config
from rewards import REASONS, GraderError
from trainer.batching import Tokens
from trainer.passes import by_row
from trainer.ranks import Pair
from trainer.run import Run
from trainer.state import Sample

TAKEN = {"mean", "accuracy", "solved_all", "solved_none", "no_signal", *REASONS}  # names of reward/...
DIGITS = 5  # significant ones of a token's numbers: a row of 4,096 tokens then has some 300 kB


def log_samples(run: Run, samples: list[Sample], measured: Sequence[tuple[Tokens, Mapping[str, Tensor]]]) -> None:
    """Log the first answer of each of `samples_logged` groups of the first rank, and a histogram of interval widths.

    measured: of each micro-batch, (T,) values by name. Collective.
    """
    cfg = run.cfg
    widths = [(values["upper"] - values["lower"]).cpu() for _, values in measured if "upper" in values]
    if widths:
        run.tracker.histogram(run.step, "histogram/interval_width", torch.cat(widths))
    if cfg.samples_logged == 0:
        return
    shown = range(0, len(samples), cfg.samples_per_prompt)[: cfg.samples_logged]  # numbers of the first rank's samples
    found = [
        (number, {name: [_short(x) for x in numbers] for name, numbers in lists.items()})
        for tokens, values in measured
        for number, lists in by_row(tokens, values, wanted=shown)
    ]
    of_tokens = dict(run.ranks.gather(found))
    rows = [_row(run, samples[number], of_tokens[number]) for number in shown if run.ranks.is_main]
    run.tracker.samples(run.step, rows)


def answer_metrics(cfg: Config, samples: list[Sample]) -> dict[str, Pair]:
    """(sum, count) of what the verifier says of the answers and their groups."""
    groups = [samples[i : i + cfg.samples_per_prompt] for i in range(0, len(samples), cfg.samples_per_prompt)]
    of_answers = {
        "reward/mean": [s.reward for s in samples],
        "reward/accuracy": [s.grade.correct for s in samples],
        "response/length_mean": [len(s.completion.token_ids) for s in samples],
        "response/truncated": [s.completion.finish_reason == "length" for s in samples],
    }
    for reason in ("timeout", "crash", "guard", "no_answer", "contradiction"):
        of_answers[f"reward/{reason}"] = [s.grade.reason == reason for s in samples]
    of_groups = {
        "reward/solved_all": [all(s.grade.correct for s in group) for group in groups],
        "reward/solved_none": [not any(s.grade.correct for s in group) for group in groups],
        "reward/no_signal": [len({s.reward for s in group}) == 1 for group in groups],
    }
    return {name: (sum(values), len(values)) for name, values in {**of_answers, **of_groups}.items()}


def reward_parts(run: Run, samples: list[Sample]) -> dict[str, tuple[float, int]]:
    """(sum, count) of what a reward of the user's gave beside its score, as reward/NAME; collective.

    Raises GraderError for a name that is taken.
    """
    if ":" not in run.cfg.reward:
        return {}
    own = {name for sample in samples for name in sample.grade.parts}
    names = sorted(set(run.ranks.gather(sorted(own))))  # the same on every rank, in the same order
    if taken := TAKEN & set(names):
        raise GraderError(f"{run.cfg.reward} returned {sorted(taken)}, which reward/ has already; choose other names")
    values = {name: [s.grade.parts[name] for s in samples if name in s.grade.parts] for name in names}
    return {f"reward/{name}": (sum(numbers), len(numbers)) for name, numbers in values.items()}


def _short(number: float) -> float | None:
    """JSON has no infinity: None, no bound."""
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _row(run: Run, sample: Sample, of_tokens: dict[str, list[Any]]) -> dict[str, Any]:
    completion, decode = sample.completion, run.task.tokenizer.decode
    return {
        "problem": sample.problem.problem,
        "answer": completion.text,
        "gold": sample.problem.gold,
        "extracted": sample.grade.extracted,
        "reason": sample.grade.reason,
        "correct": sample.grade.correct,
        "reward": sample.reward,
        "advantage": round(sample.advantage, 4),
        "tokens": len(completion.token_ids),
        "truncated": completion.finish_reason == "length",
        "prompt_id": hashlib.sha256(repr(sample.prompt).encode()).hexdigest()[:12],
        "token_ids": completion.token_ids,
        "token_texts": [decode([token]) for token in completion.token_ids],
        "sampler_logprobs": [_short(x) for x in completion.logprobs],
        **of_tokens,
    }
