"""What is logged of the answers: metrics of their rewards, and token by token runs/NAME/samples/step_000010.jsonl.

`python -m eval.report` makes a page of them (docs/report.md has the keys). Values per token were measured in the step.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.metrics import Stats
from trainer.run import Run
from trainer.types import MicroBatch, Sample

DIGITS = 5  # significant ones of a token's numbers: a row of 4,096 tokens then has some 300 kB


def log_samples(run: Run, samples: list[Sample], stats: Stats) -> None:
    """Log the first response of each of `samples_logged` groups of rank 0, and a histogram of bound widths; collective.

    The (T,) values are those of the sequence's latest update.
    """
    cfg = run.cfg
    widths = [(values["upper"] - values["lower"]).cpu() for _, values in stats.latest.values() if "upper" in values]
    if widths:
        run.tracker.histogram(run.step, "histogram/interval_width", torch.cat(widths))
    if cfg.samples_logged == 0:
        return
    shown = [sample for sample in samples if sample.index % cfg.samples_per_prompt == 0][: cfg.samples_logged]
    wanted = {(s.step, s.index) for s in run.ranks.gather(shown if run.ranks.is_main else [])}
    found = [
        ((sample.step, sample.index), {name: [_short(x) for x in part.tolist()] for name, part in of_sample.items()})
        for batch, values in stats.latest.values()
        for sample, of_sample in split_by_sequence(batch, values)
        if (sample.step, sample.index) in wanted
    ]
    of_tokens = dict(run.ranks.gather(found))
    rows = [_row(run, sample, of_tokens[sample.step, sample.index]) for sample in shown if run.ranks.is_main]
    run.tracker.samples(run.step, rows)


def split_by_sequence(batch: MicroBatch, values: Mapping[str, Tensor]) -> Iterator[tuple[Sample, dict[str, Tensor]]]:
    """Each sequence of a micro-batch with its part of (T,) values by name."""
    parts = {name: value.split(batch.lengths) for name, value in values.items()}
    for i, sample in enumerate(batch.samples):
        yield sample, {name: part[i] for name, part in parts.items()}


def _short(number: float) -> float | None:
    """JSON has no infinity: None, no bound."""
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _row(run: Run, sample: Sample, of_tokens: dict[str, list[Any]]) -> dict[str, Any]:
    completion = sample.completion
    return {
        "problem": sample.problem.problem,
        "answer": completion.text,
        "gold": sample.problem.gold,
        "extracted": sample.grade.extracted,
        "reason": sample.grade.reason,
        "correct": sample.grade.correct,
        "reward": sample.reward,
        "advantage": round(sum(sample.token_advantages) / max(1, len(completion.token_ids)), 4),  # mean over tokens
        "tokens": len(completion.token_ids),
        "truncated": sample.truncated,
        "prompt_id": hashlib.sha256(repr(sample.prompt).encode()).hexdigest()[:12],
        "token_ids": completion.token_ids,
        "token_texts": [token_text(run.task.tokenizer, token) for token in completion.token_ids],
        "rollout_logprobs": [_short(x) for x in completion.logprobs],
        **of_tokens,
    }


def token_text(tokenizer: Any, token: int) -> str:
    """Text of one token; of a token that is part of a character, its bytes in hex, such as "<F0 9F>"."""
    text = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE
    letters = tokenizer.convert_ids_to_tokens(token)
    known = all(letter in byte_of for letter in letters)
    return f"<{' '.join(f'{byte_of[letter]:02X}' for letter in letters)}>" if known else text
