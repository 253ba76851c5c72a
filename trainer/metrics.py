"""Metrics of a step (docs/metrics.md), and the logged samples.

    stats = Stats(skipped_in_a_row=0)
    stats.add(batch, loss, logprobs, entropy, token_stats)      # per micro-batch of an update
    metrics = step_metrics(run, samples, minibatches, stats)    # collective: means over all ranks
    log_samples(run, samples, stats)                            # runs/NAME/samples/step_000010.jsonl

Statistics stay on the device until `step_metrics` reads them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from configs.schema import Config
from data.prompts import token_text
from rewards import NOT_COMPARED, REASONS, GraderError
from trainer.ranks import Number, Pair
from trainer.rollout import EngineMismatch
from trainer.run import Run
from trainer.types import MicroBatch, Sample

# Per-token statistics of the loss by metric name: (T,) values, averaged over all tokens, or (values, mask).
TokenStats = dict[str, Tensor | tuple[Tensor, Tensor]]
BY_PROBABILITY = ("clip/up", "clip/down")  # also logged per bin of the old probability
BINS = ("", "/p<0.01", "/p<0.2", "/p<0.4", "/p<0.6", "/p<0.8", "/p<=1")  # all tokens; p < 0.01; five equal bins
REWARD_METRICS = {"mean", "accuracy", "solved_all", "solved_none", "zero_std", *REASONS}  # names of reward/...
DIGITS = 5  # significant digits of a logged token statistic: 4,096 tokens take about 300 kB
MAX_SKIPPED = 3  # consecutive updates without a finite gradient after which the run stops


@dataclass
class Stats:
    """Statistics of the updates of a step, on this rank."""

    skipped_in_a_row: int  # consecutive updates without a finite gradient, including earlier steps
    skipped: int = 0
    grad_norms: list[float] = field(default_factory=list)
    loss: float | Tensor = 0.0  # summed over updates
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # metric -> sum and count
    ratio_max: float | Tensor = 0.0
    rollout_gap: Tensor | None = None  # (T,) float64, trainer minus rollout log-probs before any update
    # By id of the micro-batch. entropy: (T,) of its first pass. latest: batch and (T,) values of its latest update.
    entropy: dict[int, Tensor] = field(default_factory=dict)
    latest: dict[int, tuple[MicroBatch, dict[str, Tensor]]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, batch: MicroBatch, loss: Tensor, logprobs: Tensor, entropy: Tensor, of_tokens: TokenStats) -> None:
        """Add the statistics of one micro-batch of an update. loss: scalar. logprobs, entropy: (T,)."""
        logprobs, entropy = logprobs.detach(), entropy.detach()
        old_logprobs = logprobs if batch.old_logprobs is None else batch.old_logprobs
        self.loss += loss.detach()
        self.entropy.setdefault(id(batch), entropy)
        p = old_logprobs.exp()
        fifth = (p * 5).floor().clamp(max=4)
        bins = torch.stack([torch.ones_like(p), p < 0.01, *(fifth == k for k in range(5))]).double()  # (bins, T)
        for name, value in of_tokens.items():
            values, mask = value if isinstance(value, tuple) else (value.detach(), torch.ones_like(p, dtype=torch.bool))
            if name in BY_PROBABILITY:
                events = torch.stack([values & mask, mask]).double()  # float64 counts are exact
                for suffix, total, count in zip(BINS, *(events @ bins.T), strict=True):
                    self._add(name + suffix, total, count)
            else:
                self._add(name, (values * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64))
        if len(p):
            ratio = of_tokens["ratio/mean"]
            self.ratio_max = torch.maximum(torch.as_tensor(self.ratio_max).to(p), ratio.amax())  # type: ignore[union-attr]
        named = {"lower": "band/lower_mean", "upper": "band/upper_mean", "weight": "clip/weight_mean"}
        shown = {key: of_tokens[name] for key, name in named.items() if name in of_tokens}
        (clipped, up), (_, down) = of_tokens["clip/up"], of_tokens["clip/down"]
        shown["clip"] = (clipped & up).float() - (clipped & down).float()
        values = {"old_logprobs": old_logprobs, "logprobs": logprobs, "entropy": entropy, **shown}
        self.latest[id(batch)] = (batch, values)  # type: ignore[assignment]

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        before = self.sums.get(name)
        self.sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def add_update(self, norm: float) -> None:
        """Record the gradient norm of an update. A norm that is not finite counts as a skipped update."""
        if math.isfinite(norm):
            self.grad_norms.append(norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def pairs(self) -> dict[str, Pair]:
        """Return (sum, count) per metric. The count is 0 if the sum is not finite, e.g. for infinite upper bounds."""
        return {
            n: (total.nan_to_num(posinf=0, neginf=0), count * total.isfinite())
            for n, (total, count) in self.sums.items()
        }


# ---- mismatch between rollout and trainer log-probs ----


def check_rollout_logprobs(run: Run, minibatches: list[list[MicroBatch]], before: list[Tensor]) -> Tensor:
    """Return trainer minus rollout log-probs of on-policy tokens, (T,) float64, before any update. Collective.

    Covers all minibatches if a forward pass recomputed old log-probs. Otherwise covers the first minibatch, with the
    log-probs `before` of its own forward pass. Raises EngineMismatch if KL(rollout, trainer) per token (k3 estimator)
    exceeds `max_rollout_kl`.
    """
    pairs = list(zip(minibatches[0], before, strict=True))
    if minibatches[0][0].entropy is not None:
        pairs = [(b, b.old_logprobs) for minibatch in minibatches for b in minibatch if b.old_logprobs is not None]
    gaps = [minibatches[0][0].rollout_logprobs[:0]]
    for batch, logprobs in pairs:
        # Select whole samples on the host: a mask of tokens would synchronize with the device.
        of_samples = zip(batch.samples, (logprobs - batch.rollout_logprobs).split(batch.lengths), strict=True)
        gaps += [gap for sample, gap in of_samples if sample.step == run.step]
    gap = torch.cat(gaps).double()
    total, count = run.ranks.all_reduce_sum({"kl": ((gap.expm1() - gap).sum(), len(gap))})["kl"]
    kl = total / count if count else 0.0  # no on-policy sample: nothing to compare
    if not kl <= run.cfg.max_rollout_kl:  # also for NaN
        raise EngineMismatch(
            f"max_rollout_kl: step {run.step + 1}: KL(rollout, trainer) is {kl:.3g} nats per token, above "
            f"{run.cfg.max_rollout_kl}: engine and trainer do not compute the same policy. Suspects: packing (try "
            "attention: sdpa, which pads), precision (try precision: float32), weight sync (try engine: hf)"
        )
    return gap


def raise_not_finite(run: Run, minibatch: list[MicroBatch], in_a_row: int) -> NoReturn:
    """Write the sequences of a minibatch to a file, then raise FloatingPointError: no finite gradient."""
    path = run.folder / f"not_finite_step_{run.step + 1:06d}_rank_{run.ranks.rank}.jsonl"
    sequences = [s.prompt + s.completion.token_ids for batch in minibatch for s in batch.samples]
    texts = run.task.tokenizer.batch_decode(sequences)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raise FloatingPointError(
        f"step {run.step + 1}: {in_a_row} updates in a row had no finite gradient; their sequences are in {path}; "
        "lower lr, tighten the clipping rule, or go back to an earlier checkpoint"
    )


# ---- the metrics of a step ----


def step_metrics(
    run: Run, samples: list[Sample], minibatches: list[list[MicroBatch]], stats: Stats
) -> dict[str, float]:
    """Compute the metrics of docs/metrics.md except times and evaluation. Collective."""
    once = 1 / run.plan.processes
    batches = [batch for minibatch in minibatches for batch in minibatch]
    entropy = torch.cat([stats.entropy[id(b)] if b.entropy is None else b.entropy for b in batches]).double()
    tokens = len(entropy)
    gap = stats.rollout_gap if stats.rollout_gap is not None else entropy[:0]
    ages = [(run.step - s.step, len(s.completion.token_ids)) for b in batches for s in b.samples]
    sums: dict[str, Pair] = {  # (sum, count) on this rank
        "train/entropy": (entropy.sum(), tokens),
        "train/staleness": (sum(age * length for age, length in ages), tokens),
        "train/loss": (stats.loss, run.cfg.updates_per_step * once),
        "train/tokens_seen": (tokens + run.state.tokens_seen * once, once),
        **response_metrics(run.cfg, samples),
        **reward_parts(run, samples),
        **stats.pairs(),
        "rollout/kl": ((gap.expm1() - gap).sum(), len(gap)),  # k3 of KL(rollout, trainer)
        "optim/grad_norm": (sum(stats.grad_norms) * once, len(stats.grad_norms) * once),
        "optim/skipped": (stats.skipped * once, once),
        "throughput/tokens_per_s": (tokens, sum(run.clock.times.values()) * once),
        "throughput/real_token_share": real_token_share(batches),
    }
    peaks: dict[str, Number] = {
        "ratio/max": stats.ratio_max,
        "rollout/logprob_diff_max": gap.abs().max() if len(gap) else 0.0,
        "memory/peak_gib": run.clock.peak_gib,
    }
    metrics = {name: total / count for name, (total, count) in run.ranks.all_reduce_sum(sums).items() if count}
    largest = run.ranks.all_reduce_max(peaks)
    if "rollout/kl" not in metrics:  # nothing to compare
        del largest["rollout/logprob_diff_max"]
    used = {"optim/lr": run.optimizer.param_groups[0]["lr"]}
    delta = run.rule.arguments.get("delta")
    return metrics | largest | used | ({"train/delta": float(delta)} if isinstance(delta, int | float) else {})


def response_metrics(cfg: Config, samples: list[Sample]) -> dict[str, Pair]:
    """Return (sum, count) of rewards and verifier results, per response and per group."""
    groups = [samples[i : i + cfg.samples_per_prompt] for i in range(0, len(samples), cfg.samples_per_prompt)]
    per_response = {
        "reward/mean": [s.reward for s in samples],
        "reward/accuracy": [s.grade.correct for s in samples],
        "response/length_mean": [len(s.completion.token_ids) for s in samples],
        "response/truncated": [s.truncated for s in samples],
        **{f"reward/{reason}": [s.grade.reason == reason for s in samples] for reason in NOT_COMPARED},
    }
    per_group = {
        "reward/solved_all": [all(s.grade.correct for s in group) for group in groups],
        "reward/solved_none": [not any(s.grade.correct for s in group) for group in groups],
        "reward/zero_std": [len({s.reward for s in group}) == 1 for group in groups],
    }
    return {name: (sum(values), len(values)) for name, values in {**per_response, **per_group}.items()}


def reward_parts(run: Run, samples: list[Sample]) -> dict[str, Pair]:
    """Return (sum, count) of the additional numbers of a user's reward, as reward/NAME. Collective.

    Raises GraderError for a name that reward/ already uses.
    """
    own = {name for sample in samples for name in sample.grade.parts}
    names = sorted(set(run.ranks.gather(sorted(own))))  # the same on every rank, in the same order
    if taken := REWARD_METRICS & set(names):
        raise GraderError(f"{run.cfg.reward} returned {sorted(taken)}, which reward/ has already; choose other names")
    values = {name: [s.grade.parts[name] for s in samples if name in s.grade.parts] for name in names}
    return {f"reward/{name}": (sum(numbers), len(numbers)) for name, numbers in values.items()}


def real_token_share(batches: Sequence[MicroBatch]) -> Pair:
    """Return (tokens, positions) of the model's input; positions include padding."""
    positions = [batch.input_ids.numel() for batch in batches]
    masks = [batch.attention_mask for batch in batches]
    return sum(n if mask is None else mask.sum() for n, mask in zip(positions, masks, strict=True)), sum(positions)


# ---- logged samples ----


def log_samples(run: Run, samples: list[Sample], stats: Stats) -> None:
    """Log the first response of `samples_logged` groups of rank 0, and a histogram of clip-interval widths. Collective.

    Per-token values are those of the latest update of the sequence.
    """
    cfg = run.cfg
    widths = [values["upper"] - values["lower"] for _, values in stats.latest.values() if "upper" in values]
    if widths:
        run.tracker.histogram("histogram/interval_width", torch.cat(widths).double().cpu().numpy())
    shown = [sample for sample in samples if sample.index % cfg.samples_per_prompt == 0][: cfg.samples_logged]
    wanted = {(s.step, s.index) for s in run.ranks.gather(shown if run.ranks.is_main else [])}
    values_by_sample = [
        ((sample.step, sample.index), {name: [_short(x) for x in part.tolist()] for name, part in of_sample.items()})
        for batch, values in stats.latest.values()
        for sample, of_sample in split_by_sequence(batch, values)
        if (sample.step, sample.index) in wanted
    ]
    of_tokens = dict(run.ranks.gather(values_by_sample))
    rows = [_row(run, sample, of_tokens[sample.step, sample.index]) for sample in shown if run.ranks.is_main]
    run.tracker.samples(run.step, rows)


def split_by_sequence(batch: MicroBatch, values: Mapping[str, Tensor]) -> Iterator[tuple[Sample, dict[str, Tensor]]]:
    """Yield each sample of a micro-batch with its slice of the (T,) values, by name."""
    parts = {name: value.split(batch.lengths) for name, value in values.items()}
    for i, sample in enumerate(batch.samples):
        yield sample, {name: part[i] for name, part in parts.items()}


def _short(number: float) -> float | None:
    """Round to DIGITS significant digits; None for infinity (no bound), which JSON lacks."""
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
