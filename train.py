"""bandpo: group-relative policy optimisation (GRPO) with Band clipping, the whole loop in one file.

    accelerate launch train.py --config qwen3b_band.yaml [--key value ...]     # --help lists every key

BandPO (arXiv 2603.04918) replaces GRPO's fixed interval for the probability ratio by the projection of an f-divergence
trust region on each token: wide for rare tokens, narrow for confident ones, with one radius delta. Read `main`, then
the phases of `train_step` in the order in which it calls them. Where to change what:

    another advantage         group_advantages         another loss or clip rule   token_loss, bandpo/objective.py
    which samples are kept    rollout                  another reward              reward: my_file.py:my_function
    another optimizer         trainer/start.py         what is logged              token_loss, step_metrics
    a new knob                configs/schema.py        what a resume remembers     trainer/state.py

Left out: critics, reward models, asynchronous rollouts, tensor parallelism of the trainer.

Axes: B prompts a step, G samples a prompt, N = B*G sequences, T response tokens of a micro-batch, flat.
Three log-probs, three names: `sampler_logprobs` (the engine's), `old_logprobs` (the anchor of the ratio: the trainer's
before the step's first update, or the engine's), `logprobs` (now).
"""

import hashlib
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from bandpo.objective import (
    ClipStatistics,
    clip_bounds,
    clip_statistics,
    kl_estimate,
    policy_loss,
    sequence_logprobs,
)
from bandpo.radius import scheduled_delta, token_radius
from configs import load_or_exit
from configs.schema import Config, Plan
from data import next_problems
from eval.evaluate import Row, evaluate, in_order, summarize
from eval.plots import plot_run
from rewards import Grade, Ticket, shape_reward
from trainer.batching import Tokens, collate, raise_not_finite
from trainer.checks import check_engine
from trainer.clock import Clock
from trainer.policy import Policy
from trainer.ranks import Number, Pair
from trainer.resume import save
from trainer.rollout import Completion
from trainer.run import Run
from trainer.start import start
from trainer.state import Sample
from trainer.stopping import Stopped, die_with_launcher, one_clear_line
from trainer.task import dry_run, load_task


def main(argv: list[str]) -> int:
    """Train as `argv` says; the exit code: 0, 130 after Ctrl-C.

    Exits with 2 for a mistake in the configuration or the data, with 1 when a step or its checkpoint failed.
    """
    die_with_launcher()
    clock = Clock()
    clock.done("imports")
    with one_clear_line(ValueError, OSError, code=2):
        cfg = load_or_exit(Config, argv)
    plan = Plan(cfg)

    def say(line: str) -> None:
        if plan.rank == 0:
            print(line, flush=True)

    say(plan.text(cfg))
    with one_clear_line(ValueError, OSError, code=2):
        if cfg.dry_run:
            return dry_run(cfg, plan.processes, say)
        task = load_task(cfg, say)
    clock.done("data")
    with start(cfg, plan, task, say, clock) as run:
        try:
            if run.step == 0 or run.state.unlogged:  # the start policy, or a step whose evaluation was interrupted
                finish_step(run, run.state.unlogged)
            while not run.finished:
                finish_step(run, train_step(run))
        except Stopped:  # by SIGTERM or Ctrl-C, on all ranks; a step before its first update leaves no trace
            pass
        save(run)
        if run.ranks.is_main and cfg.plots and not run.signals.number:  # who asked to stop may not wait for pictures
            run.tracker.artifact(plot_run(run.folder), "plots")
        return run.exit_code()


def train_step(run: Run) -> dict[str, float]:
    """One step of the algorithm, a line per phase; its metrics. Raises Stopped, before the first update."""
    started_s = time.perf_counter()
    set_seed(draw(run.cfg.seed, run.step, run.plan.rank))  # whatever draws from a global generator: nothing to resume
    with run.phase("rollout"):  # answers are graded while others are still being sampled
        samples, prompts_drawn = rollout(run)
    with run.phase("advantage"):
        samples = with_advantages(run.cfg, samples)
    with run.phase("collate"):
        minibatches = collate(run, samples)
    with run.phase("old"), run.may_stop():
        run.engine.sleep()
        minibatches = reference_pass(run, minibatches)
        anchors = old_policy_pass(run, minibatches)
    with run.phase("optimize"):
        updates = optimize(run, minibatches, anchors)
    with run.phase("sync"):
        run.sync()
    metrics = step_metrics(run, samples, minibatches, updates)
    check_engine(run.cfg, metrics, step=run.step + 1)
    run.state = replace(
        run.state,
        step=run.step + 1,
        prompts_drawn=prompts_drawn,
        tokens_seen=int(metrics["train/tokens_seen"]),
        skipped_in_a_row=updates.skipped_in_a_row,
    )
    show_samples(run, samples, updates)
    times = run.clock.take() | {"time/step_s": time.perf_counter() - started_s}
    return metrics | {"train/epoch": run.epochs} | times


def finish_step(run: Run, metrics: dict[str, float]) -> None:
    """Evaluate when due, log, save when due. Interrupted while evaluating, the metrics wait in the checkpoint."""
    cfg = run.cfg
    run.state = replace(run.state, unlogged=metrics)
    if run.is_due(cfg.eval_every) or (cfg.eval_every and run.finished):
        with run.phase("eval"):
            evaluation, score = evaluate_policy(run)
        run.state = replace(run.state, score=score, score_step=run.step)
        metrics = metrics | evaluation | run.clock.take()
    run.state = replace(run.state, unlogged={})
    if metrics:
        run.log(metrics)
    if run.step and run.is_due(cfg.save_every):
        save(run)


# ---- rollout and reward ----


def rollout(run: Run) -> tuple[list[Sample], int]:
    """This rank's samples of the step, group after group, in the order of the plan, and how many prompts were drawn so
    far. Raises Stopped.

    With dynamic sampling a group that is all right or all wrong, before any shaping of its rewards, gives its place to
    the next prompt in the order of training, `max_refills` times.
    """
    cfg, order = run.cfg, {"n": len(run.task.train), "per_step": run.cfg.prompts_per_step, "seed": run.cfg.seed}
    slots = run.plan.slots(run.plan.rank)  # this rank's places in the batch of prompts
    picks, drawn = next_problems(run.state.prompts_drawn, cfg.prompts_per_step, **order, taken=())
    asked, wanted = set(picks), dict(enumerate(picks))  # slot -> index of its problem, of all ranks
    groups: dict[int, list[Sample]] = {}
    for refill in range(cfg.max_refills + 1 if cfg.dynamic_sampling else 1):
        with run.may_stop():
            groups |= sample_groups(run, {slot: wanted[slot] for slot in slots if slot in wanted}, refill)
        if not cfg.dynamic_sampling or refill == cfg.max_refills:
            break
        without_signal = [slot for slot in slots if len({sample.grade.score for sample in groups[slot]}) == 1]
        to_refill = sorted(run.ranks.gather(without_signal))
        if not to_refill:
            break
        picks, drawn = next_problems(drawn, len(to_refill), **order, taken=asked)
        asked |= set(picks)
        wanted = dict(zip(to_refill, picks, strict=True))
    return [sample for slot in slots for sample in groups[slot]], drawn


def sample_groups(run: Run, wanted: dict[int, int], refill: int) -> dict[int, list[Sample]]:
    """A graded group for every slot of `wanted` (slot -> index of its problem). Raises Stopped."""
    cfg, rows = run.cfg, [run.task.train[i] for i in wanted.values()]  # problem, prompt
    seeds = [[draw(cfg.seed, run.step, refill, slot, j) for j in range(cfg.samples_per_prompt)] for slot in wanted]
    tickets: dict[tuple[int, int], Ticket | Grade] = {}

    def finished(i: int, j: int, completion: Completion) -> None:
        run.check_stop()
        tickets[i, j] = run.verifier.submit(completion.text, rows[i][0].gold)

    with run.tracker.progress(len(rows) * cfg.samples_per_prompt, f"step {run.step + 1} rollout", "answers") as bar:
        completions = run.engine.generate(
            [prompt for _, prompt in rows], run.sampling, seeds=seeds, on_finish=finished, progress=bar.update
        )
    order = [(i, j) for i in range(len(rows)) for j in range(cfg.samples_per_prompt)]
    grades = run.verifier.collect([tickets[key] for key in order])
    samples = [
        Sample(*rows[i], completions[i][j], grade, reward_of(cfg, completions[i][j], grade))
        for (i, j), grade in zip(order, grades, strict=True)
    ]
    return {slot: samples[k * cfg.samples_per_prompt :][: cfg.samples_per_prompt] for k, slot in enumerate(wanted)}


def reward_of(cfg: Config, completion: Completion, grade: Grade) -> float:
    """The number that the policy is trained on."""
    return shape_reward(
        grade,
        response_tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
        right=cfg.reward_right,
        wrong=cfg.reward_wrong,
        format_bonus=cfg.reward_format,
        overlong_buffer_tokens=cfg.overlong_buffer_tokens,
        overlong_penalty=cfg.overlong_penalty,
        max_response_tokens=cfg.max_response_tokens,
    )


def draw(*key: object) -> int:
    """A seed of 31 bits that is a pure function of `key`: nothing to restore when a run is resumed."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


# ---- advantage ----


def with_advantages(cfg: Config, samples: list[Sample]) -> list[Sample]:
    """The samples with their advantages; a group is `samples_per_prompt` samples in a row."""
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64).view(-1, cfg.samples_per_prompt)  # (B, G)
    values = group_advantages(rewards, cfg.advantage).flatten().tolist()
    return [replace(sample, advantage=value) for sample, value in zip(samples, values, strict=True)]


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    """(B, G) advantages of (B, G) rewards, each row a group. Raises ValueError for an unknown kind.

    group_std:  (r - mean) / (std + 1e-6), std with G - 1: GRPO, arXiv 2402.03300
    group_mean: r - mean: Dr. GRPO, arXiv 2503.20783
    rloo:       r - mean of the others: arXiv 2402.14740
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "group_std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    if kind == "group_mean":
        return centred
    if kind == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    raise ValueError(f"advantage: {kind!r} is not known; use group_std, group_mean or rloo")


# ---- old policy ----


@dataclass(frozen=True)
class Anchor:
    """What the policy is held to at the tokens of a micro-batch, (T,) each: made once in a step, before the first
    update that uses the tokens."""

    old_logprobs: Tensor  # under the old policy
    trainer_logprobs: Tensor  # of the pass that made it; old_logprobs, unless old_policy is the sampler
    entropy: Tensor  # of that pass
    lower: Tensor  # interval of the ratio r = exp(logprobs - old_logprobs)
    upper: Tensor


Anchors = list[list[Anchor | None]]  # as the micro-batches of minibatches; None: the first update's own pass makes it


@torch.no_grad()
def reference_pass(run: Run, minibatches: list[list[Tokens]]) -> list[list[Tokens]]:
    """The micro-batches with the log-probs of the model started from; as they are when kl_coef is 0."""
    if not run.reference:
        return minibatches
    run.reference.to(run.ranks.device)
    passes = forward(run, run.reference, minibatches, "reference")
    if run.cfg.reference_offload:
        run.reference.to("cpu")
    return [
        [replace(tokens, ref_logprobs=logprobs) for tokens, (logprobs, _) in zip(minibatch, row, strict=True)]
        for minibatch, row in zip(minibatches, passes, strict=True)
    ]


@torch.no_grad()
def old_policy_pass(run: Run, minibatches: list[list[Tokens]]) -> Anchors:
    """Anchors from a pass of the policy about to be updated.

    The first minibatch is left to the first update, whose own forward pass is still under the old policy: the same
    numbers, one pass less. With `old_policy: sampler` the engine's log-probs are the anchor, and no pass is needed at
    all. A radius by entropy needs its mean over the whole step before any interval.
    """
    cfg = run.cfg
    by_entropy = cfg.radius == "entropy"
    left = 0 if by_entropy else 1 if cfg.old_policy == "trainer" else len(minibatches)  # minibatches without a pass
    passes = forward(run, run.policy, minibatches[left:], "old log-probs")
    mean_entropy = mean_over_tokens(run, [entropy for row in passes for _, entropy in row]) if by_entropy else math.nan
    none: Anchors = [[None] * len(minibatch) for minibatch in minibatches[:left]]
    return none + [
        [anchor(run, tokens, *seen, mean_entropy) for tokens, seen in zip(minibatch, row, strict=True)]
        for minibatch, row in zip(minibatches[left:], passes, strict=True)
    ]


def anchor(run: Run, tokens: Tokens, logprobs: Tensor, entropy: Tensor, mean_entropy: float) -> Anchor:
    """From a forward pass of the trainer, detached: the old log-probs, and the interval that they allow."""
    cfg, delta = run.cfg, delta_at(run.cfg, run.step)
    old_logprobs = tokens.sampler_logprobs if cfg.old_policy == "sampler" else logprobs
    lower, upper = clip_bounds(
        old_logprobs,
        clip=cfg.clip,
        delta=token_radius(entropy, delta=delta, radius=cfg.radius, mean_entropy=mean_entropy),
        divergence=cfg.divergence,
        ratio_cap=cfg.ratio_cap,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
    )
    return Anchor(old_logprobs, logprobs, entropy, lower, upper)


def delta_at(cfg: Config, step: int) -> float:
    """The Band's radius in the step after `step` completed ones."""
    final = cfg.delta if cfg.delta_final is None else cfg.delta_final
    return scheduled_delta(step, cfg.max_steps, delta=cfg.delta, delta_final=final, schedule=cfg.delta_schedule)


def mean_over_tokens(run: Run, values: list[Tensor]) -> float:
    """Mean over the step's response tokens, of all ranks."""
    total, count = run.ranks.add({"": (sum(v.double().sum() for v in values), sum(map(len, values)))})[""]
    return total / count


def forward(run: Run, policy: Policy, minibatches: list[list[Tokens]], phase: str) -> list[list[tuple[Tensor, Tensor]]]:
    """(log-probs, entropy) of every micro-batch, behind a progress bar."""
    with run.tracker.progress(sum(map(len, minibatches)), f"step {run.step + 1} {phase}", "micro-batches") as bar:
        return [[(policy(tokens.batch), bar.update())[0] for tokens in minibatch] for minibatch in minibatches]


# ---- optimize ----


@dataclass
class Updates:
    """What the updates of a step did; numbers stay on the device until the step's metrics are read."""

    anchors: Anchors  # complete
    logprobs: dict[int, list[Tensor]] = field(default_factory=dict)  # minibatch -> (T,) each, of its latest update
    clip: ClipStatistics | None = None
    means: dict[str, tuple[float | Tensor, int]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0)))
    loss: float | Tensor = 0.0  # of this rank's share, summed over updates
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0  # earlier steps included


def optimize(run: Run, minibatches: list[list[Tokens]], anchors: Anchors) -> Updates:
    """`updates_per_step` optimizer steps on the clipped objective."""
    cfg = run.cfg
    updates = Updates([list(row) for row in anchors], skipped_in_a_row=run.state.skipped_in_a_row)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, run.step)
    for _ in range(cfg.epochs_per_step):
        for m, minibatch in enumerate(minibatches):
            updates.logprobs[m] = []
            for k, tokens in enumerate(minibatch):
                with run.policy.accumulating(last=k == len(minibatch) - 1):
                    logprobs, entropy = run.policy(tokens.batch)  # (T,), (T,)
                    now = logprobs.detach()
                    old = updates.anchors[m][k] or anchor(run, tokens, now, entropy.detach(), math.nan)
                    losses, means = token_loss(cfg, tokens, old, logprobs, entropy)  # (T,)
                    loss = (tokens.weights * losses).sum()
                    # DDP and FSDP average gradients over processes; the weights already divide by global counts.
                    (loss * run.plan.processes).backward()
                updates.anchors[m][k] = old
                updates.logprobs[m].append(now)
                updates.loss += loss.detach()
                for name, values in means.items():
                    total, count = updates.means[name]
                    updates.means[name] = (total + values.detach().double().sum(), count + len(values))
                statistics = clip_statistics(
                    judged(cfg, tokens, old, now),
                    old.old_logprobs,
                    tokens.advantages,
                    old.lower,
                    old.upper,
                    cfg.dual_clip,
                )
                updates.clip = updates.clip.merge(statistics) if updates.clip else statistics
            apply_update(run, updates, minibatch)
    return updates


def token_loss(
    cfg: Config, tokens: Tokens, old: Anchor, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(T,) loss of every response token; and values of tokens, (T,) each, whose means over the step are logged.

    `logprobs` and `entropy` carry gradients.
    """
    means: dict[str, Tensor] = {}
    losses = policy_loss(
        judged(cfg, tokens, old, logprobs),
        old.old_logprobs,
        tokens.advantages,
        old.lower,
        old.upper,
        dual_clip=cfg.dual_clip,
        surrogate=cfg.surrogate,
    )
    if cfg.mismatch_correction == "token_truncate":
        losses = losses * (old.old_logprobs - tokens.sampler_logprobs).exp().clamp(max=cfg.mismatch_cap)
    if tokens.ref_logprobs is not None:
        kl = means["kl/reference"] = kl_estimate(logprobs, tokens.ref_logprobs, estimator=cfg.kl_estimator)
        losses = losses + cfg.kl_coef * kl
    return losses, means


def judged(cfg: Config, tokens: Tokens, old: Anchor, logprobs: Tensor) -> Tensor:
    """(T,) log-probs whose ratio to the old ones the interval judges: each token's own, or its sequence's (GSPO)."""
    return sequence_logprobs(logprobs, old.old_logprobs, tokens.lengths) if cfg.surrogate == "gspo" else logprobs


def apply_update(run: Run, updates: Updates, minibatch: list[Tokens]) -> None:
    """One optimizer step; skipped when the gradient is not finite, on all ranks alike since they share its norm."""
    norm = run.policy.clip_gradients(run.cfg.grad_clip).item()
    if math.isfinite(norm):
        run.optimizer.step()
        updates.grad_norms.append(norm)
        updates.skipped_in_a_row = 0
    else:
        updates.skipped += 1
        updates.skipped_in_a_row += 1
    run.optimizer.zero_grad()
    if updates.skipped_in_a_row >= run.cfg.max_skipped:
        raise_not_finite(run, minibatch, updates.skipped_in_a_row)


def learning_rate(cfg: Config, step: int) -> float:
    """Of the step after `step` completed ones: a pure function of it."""
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    done = (step - cfg.lr_warmup_steps) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
    return (
        cfg.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.lr_schedule]
    )


# ---- metrics and evaluation ----


def step_metrics(
    run: Run, samples: list[Sample], minibatches: list[list[Tokens]], updates: Updates
) -> dict[str, float]:
    """Everything of docs/metrics.md but evaluation and times: sums and counts of all ranks, divided once."""
    cfg = run.cfg
    pairs = [pair for rows in zip(minibatches, updates.anchors, strict=True) for pair in zip(*rows, strict=True)]
    flat = [(tokens, old) for tokens, old in pairs if old]
    # Log of trainer over sampler, both of the same policy: answers of this step, at passes before the first update.
    by_old = flat if cfg.old_policy == "trainer" or cfg.radius == "entropy" else flat[: len(minibatches[0])]
    gap = torch.cat([(old.trainer_logprobs - t.sampler_logprobs)[t.ages == 0] for t, old in by_old]).double()
    entropy = torch.cat([old.entropy for _, old in flat]).double()
    positions = [tokens.batch.input_ids.numel() for tokens, _ in flat]
    masks = [tokens.batch.attention_mask for tokens, _ in flat]  # None: no padding
    groups = [samples[i : i + cfg.samples_per_prompt] for i in range(0, len(samples), cfg.samples_per_prompt)]
    tokens, answers, once = len(entropy), len(samples), 1 / run.plan.processes
    sums: dict[str, Pair] = {  # of this rank
        "train/entropy": (entropy.sum(), tokens),
        "train/loss": (updates.loss, cfg.updates_per_step * once),
        "train/tokens_seen": (tokens + run.state.tokens_seen * once, once),
        "reward/mean": (sum(s.reward for s in samples), answers),
        "reward/accuracy": (sum(s.grade.correct for s in samples), answers),
        "reward/solved_all": (sum(all(s.grade.correct for s in group) for group in groups), len(groups)),
        "reward/solved_none": (sum(not any(s.grade.correct for s in group) for group in groups), len(groups)),
        "reward/no_signal": (sum(len({s.reward for s in group}) == 1 for group in groups), len(groups)),
        **{
            f"reward/{reason}": (sum(s.grade.reason == reason for s in samples), answers)
            for reason in ("timeout", "crash", "guard", "no_answer", "contradiction")
        },
        **(updates.clip.means() if updates.clip else {}),
        **updates.means,
        "mismatch/kl": ((gap.expm1() - gap).sum(), len(gap)),  # k3 of KL(sampler, trainer)
        "optim/grad_norm": (sum(updates.grad_norms) * once, len(updates.grad_norms) * once),
        "optim/skipped": (updates.skipped * once, once),
        "response/length_mean": (tokens, answers),
        "response/truncated": (sum(s.completion.finish_reason == "length" for s in samples), answers),
        "throughput/tokens_per_s": (tokens, sum(run.clock.times.values()) * once),
        "throughput/real_token_share": (
            sum(n if mask is None else mask.sum() for n, mask in zip(positions, masks, strict=True)),
            sum(positions),
        ),
    }
    peaks: dict[str, Number] = {
        "ratio/max": updates.clip.ratio_max if updates.clip else 0.0,
        "mismatch/max": gap.abs().max() if len(gap) else 0.0,
        "memory/peak_gib": run.clock.peak_gib,
    }
    metrics = {name: total / count for name, (total, count) in run.ranks.add(sums).items() if count}
    used = {"train/delta": delta_at(cfg, run.step), "optim/lr": learning_rate(cfg, run.step)}
    return metrics | run.ranks.largest(peaks) | used


def evaluate_policy(run: Run) -> tuple[dict[str, float], float]:
    """mean@k, pass@k, maj@k on every evaluation set, at the sampling settings of training; and the mean over sets of
    mean@k, which ranks checkpoints. Raises Stopped."""
    cfg, answers = run.cfg, sum(map(len, run.task.evals.values())) * run.cfg.eval_samples
    rows: list[Row] = []
    with (
        run.may_stop(),
        run.tracker.progress(answers // run.plan.processes, f"step {run.step} evaluation", "answers") as bar,
    ):

        def one_more(count: int) -> None:
            bar.update(count)
            run.check_stop()

        rows = evaluate(
            run.engine,
            run.eval_verifier,
            run.task.evals,
            run.sampling,
            samples=cfg.eval_samples,
            seed=cfg.seed,
            rank=run.plan.rank,
            world=run.plan.processes,
            progress=one_more,
        )
    metrics = summarize(in_order(run.ranks.gather(rows), run.task.evals), cfg.eval_samples, (cfg.eval_samples,))
    scores = [metrics[f"eval/{name}/mean@{cfg.eval_samples}"] for name in run.task.evals]
    return metrics, sum(scores) / len(scores)


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))  # so that a launcher's summary shows the first error of several processes
