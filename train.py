"""bandpo: group-relative policy optimisation (GRPO) with Band clipping, the whole loop in one file.

    accelerate launch train.py --config qwen3b_band.yaml [--key value ...]     # --help lists every key

BandPO (arXiv 2603.04918) replaces GRPO's fixed interval for the probability ratio by the projection of an f-divergence
trust region on each token: wide for rare tokens, narrow for confident ones, with one radius delta. Read `main`, then
the phases of `train_step` in the order in which it calls them. Where to change what:

    another advantage         group_advantages         another clip rule           rule: my_file.py:my_rule
    another loss              token_loss               another reward              reward: my_file.py:my_reward
    which samples are kept    rollout                  what is logged              token_loss, step_metrics
    another optimizer         trainer/start.py         what a resume remembers     trainer/state.py
    a new knob                configs/schema.py        examples of all             docs/tweaks.md

Left out: critics, reward models, asynchronous rollouts, tensor parallelism of the trainer.

Axes: B prompts a step, G samples a prompt, N = B*G sequences, T response tokens of a micro-batch, flat.
Three log-probs, three names: `sampler_logprobs` (the engine's), `old_logprobs` (the anchor of the ratio: the trainer's
before the step's first update, or the engine's), `logprobs` (now).
"""

import math
import sys
import time
from dataclasses import asdict, replace

import torch
from torch import Tensor

from bandpo.objective import kl_estimate
from bandpo.radius import token_radius
from bandpo.rule import ClippedLoss, View, clipped_loss
from configs import load_or_exit
from configs.schema import Config, Plan
from data import next_problems
from eval.evaluate import evaluate_policy
from eval.plots import plot_run
from eval.view import write_page
from rewards import Grade, Ticket, shape_reward
from trainer.batching import Tokens, collate, raise_not_finite, real_token_share
from trainer.checks import check_engine
from trainer.clock import Clock
from trainer.passes import (
    Anchor,
    Anchors,
    engine_gap,
    forward,
    has_gradient,
    minibatches_left,
    reference_pass,
    rule_totals,
    view_of,
    with_old_logprobs,
)
from trainer.ranks import Number, Pair
from trainer.resume import save, save_last
from trainer.rollout import Completion
from trainer.run import Run
from trainer.samples import answer_metrics, log_samples, reward_parts
from trainer.schedules import delta_at, learning_rate, seed_of
from trainer.start import start
from trainer.state import Sample
from trainer.stopping import Stopped, die_with_launcher, exit_with, one_clear_line
from trainer.task import dry_run
from trainer.updates import Updates


def main(argv: list[str]) -> int:
    """Train as `argv` says; returns the exit code: 0, 130 after Ctrl-C, 1 when a launcher died.

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
    with start(cfg, plan, say, clock) as run:
        try:
            if run.step == 0 or run.state.unlogged:  # the start policy, or a step whose evaluation was interrupted
                finish_step(run, run.state.unlogged)
            while not run.finished:
                finish_step(run, train_step(run))
        except Stopped:  # by SIGTERM or Ctrl-C, on all ranks; an interrupted step leaves no trace
            pass
        save_last(run)
        if run.ranks.is_main and cfg.plots and not run.signals.number:  # a stopped run does not wait for pictures
            write_page([run.folder], run.folder / "page.html")
            run.tracker.artifact([run.folder / "page.html", *plot_run(run.folder)], "page")
        return run.exit_code()


def train_step(run: Run) -> dict[str, float]:
    """One step of the algorithm, a line per phase; returns its metrics.

    Raises Stopped (before the first update only), GraderError, EngineError, FloatingPointError (`max_skipped` updates
    in a row without a finite gradient), and what check_engine raises.
    """
    started_s = time.perf_counter()
    run.seed(seed_of(run.cfg.seed, run.step, run.plan.rank))  # all global generators: a checkpoint needs none
    with run.phase("rollout"):  # answers are graded while others are still being sampled
        batches, prompts_drawn = rollouts(run)
    with run.phase("advantage"):
        samples = with_advantages(run.cfg, batches[0])
    with run.phase("collate"):
        minibatches = collate(run, samples)
    with run.phase("old"), run.may_stop():
        run.engine.sleep()
        queue = [with_old_logprobs(run, batch) for batch in batches[1:]]
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
        tokens_seen=round(metrics["train/tokens_seen"]),
        skipped_in_a_row=updates.skipped_in_a_row,
        queue=queue,
    )
    log_samples(run, samples, list(updates.measured.values()))
    times = run.clock.take() | {"time/step_s": time.perf_counter() - started_s}
    return metrics | {"train/epoch": run.epochs} | times


def finish_step(run: Run, metrics: dict[str, float]) -> None:
    """Evaluate when due, log, save when due. If the evaluation is interrupted, the metrics wait in the checkpoint."""
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


def rollouts(run: Run) -> tuple[list[list[Sample]], int]:
    """The samples of this step and of the `lag` steps after it, a list each, and how many prompts were drawn so far.

    A step samples what is trained on `lag` steps later; the first one samples for all steps up to then. Raises Stopped.
    """
    batches, drawn = list(run.state.queue), run.state.prompts_drawn
    while len(batches) <= run.cfg.lag:
        samples, drawn = rollout(run, run.step + len(batches), drawn)
        batches.append(samples)
    return batches, drawn


def rollout(run: Run, step: int, drawn: int) -> tuple[list[Sample], int]:
    """This rank's samples for a step, group after group in the order of `Plan.slots`, and how many prompts were drawn
    so far. Raises Stopped.

    With dynamic sampling a group whose answers all have one score (all right, or all wrong), before any shaping, gives
    its place to the next prompt in the order of training, in up to `max_refills` rounds. drawn: prompts drawn before.
    """
    cfg, order = run.cfg, {"n": len(run.task.train), "per_step": run.cfg.prompts_per_step, "seed": run.cfg.seed}
    slots = run.plan.slots(run.plan.rank)  # this rank's places in the batch of prompts
    picks, drawn = next_problems(drawn, cfg.prompts_per_step, **order, taken=())
    asked, wanted = set(picks), dict(enumerate(picks))  # slot -> index of its problem, of all ranks
    groups: dict[int, list[Sample]] = {}
    for refill in range(cfg.max_refills + 1 if cfg.dynamic_sampling else 1):
        with run.may_stop():
            groups |= sample_groups(run, {slot: wanted[slot] for slot in slots if slot in wanted}, (step, refill))
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


def sample_groups(run: Run, wanted: dict[int, int], when: tuple[int, int]) -> dict[int, list[Sample]]:
    """A graded group for every slot of `wanted` (slot -> index of its problem). when: step, refill. Raises Stopped."""
    cfg, rows = run.cfg, [run.task.train[i] for i in wanted.values()]  # problem, prompt ids
    seeds = [[seed_of(cfg.seed, *when, slot, j) for j in range(cfg.samples_per_prompt)] for slot in wanted]
    about = [{"problem": asdict(problem), "prompt": run.task.tokenizer.decode(prompt)} for problem, prompt in rows]
    tickets: dict[tuple[int, int], Ticket | Grade] = {}

    def finished(i: int, j: int, completion: Completion) -> None:
        run.check_stop()
        of_answer = {"response_tokens": len(completion.token_ids), "truncated": completion.finish_reason == "length"}
        tickets[i, j] = run.verifier.submit(completion.text, rows[i][0].gold, about[i] | of_answer)

    with run.tracker.progress(len(rows) * cfg.samples_per_prompt, f"step {run.step + 1} rollout", "answers") as bar:
        completions = run.engine.generate(
            [prompt for _, prompt in rows], run.sampling, seeds=seeds, on_finish=finished, progress=bar.update
        )
    order = [(i, j) for i in range(len(rows)) for j in range(cfg.samples_per_prompt)]
    grades = run.verifier.collect([tickets[key] for key in order])
    samples = [
        Sample(*rows[i], completions[i][j], grade, reward_of(cfg, completions[i][j], grade), run.step)
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
    maxrl:      (r - mean) / mean, 0 where the mean is 0, for rewards from 0 to 1: arXiv 2602.02710, algorithm 1
    """
    mean = rewards.mean(dim=1, keepdim=True)
    centred = rewards - mean
    if kind == "group_std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    if kind == "group_mean":
        return centred
    if kind == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    if kind == "maxrl":
        if (rewards < 0).any():
            raise ValueError(
                f"advantage: maxrl needs rewards from 0, a reward is {rewards.min():g}; use reward_wrong: 0"
            )
        return centred / mean.where(mean > 0, 1.0)
    raise ValueError(f"advantage: {kind!r} is not known; use group_std, group_mean, rloo or maxrl")


# ---- old policy ----


@torch.no_grad()
def old_policy_pass(run: Run, minibatches: list[list[Tokens]]) -> Anchors:
    """The anchors of all micro-batches, from a pass of the policy before its first update; None where a minibatch's
    first update makes them (minibatches_left). Samples that waited bring theirs (with_old_logprobs).
    """
    kept = [[tokens.kept for tokens in minibatch if tokens.kept] for minibatch in minibatches]
    left = 0 if kept[0] else minibatches_left(run, minibatches)
    passes = kept if kept[0] else forward(run, run.policy, minibatches[left:], "old log-probs")
    by_entropy = run.cfg.radius == "entropy"
    mean_entropy = run.ranks.mean([entropy for row in passes for _, entropy in row]) if by_entropy else math.nan
    of_step = {"mean_entropy": mean_entropy, "before_updates": True}
    none: Anchors = [[None] * len(minibatch) for minibatch in minibatches[:left]]
    return none + [
        [anchor(run, tokens, *seen, **of_step) for tokens, seen in zip(minibatch, row, strict=True)]
        for minibatch, row in zip(minibatches[left:], passes, strict=True)
    ]


def anchor(
    run: Run, tokens: Tokens, logprobs: Tensor, entropy: Tensor, *, mean_entropy: float, before_updates: bool
) -> Anchor:
    """The anchor of a micro-batch. logprobs, entropy: (T,), detached, of a forward pass of the trainer; mean_entropy:
    over the step's tokens, read for a radius by entropy alone."""
    cfg, delta = run.cfg, delta_at(run.cfg, run.step)
    old_logprobs = tokens.sampler_logprobs if cfg.old_policy == "sampler" else logprobs
    radius = {"delta": token_radius(entropy, delta=delta, radius=cfg.radius, mean_entropy=mean_entropy)}
    has_radius = "delta" in run.rule.defaults and not cfg.rule
    return Anchor(old_logprobs, logprobs, entropy, radius if has_radius else {}, before_updates)


# ---- optimize ----


def optimize(run: Run, minibatches: list[list[Tokens]], anchors: Anchors) -> Updates:
    """`updates_per_step` optimizer steps on the clipped objective."""
    cfg, updates = run.cfg, Updates([list(row) for row in anchors], run.state.skipped_in_a_row)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, run.step)
    first, order = run.step * cfg.updates_per_step, list(range(len(minibatches))) * cfg.epochs_per_step
    for update, m in enumerate(order, start=first):  # the update's number in the run
        minibatch, olds = minibatches[m], updates.anchors[m]
        totals = rule_totals(run, minibatch, olds, update)
        for k, tokens in enumerate(minibatch):
            with run.policy.accumulating(last=k == len(minibatch) - 1):
                logprobs, entropy = run.policy(tokens.batch)  # (T,), (T,)
                made = {"mean_entropy": math.nan, "before_updates": update == first}
                old = olds[k] = olds[k] or anchor(run, tokens, logprobs.detach(), entropy.detach(), **made)
                view = view_of(run, tokens, old, logprobs, update, totals)
                losses, clipped, means = token_loss(run, tokens, old, view, entropy)  # (T,)
                loss = (tokens.weights * losses).sum()
                if has_gradient(run, tokens, loss, logprobs, entropy):
                    # DDP and FSDP average gradients over processes; the weights already divide by global counts.
                    (loss * run.plan.processes).backward()
            updates.add((m, k), tokens, loss.detach(), view, clipped, means)
            del logprobs, entropy, view, losses, clipped, means, loss  # activations that no backward pass has freed
        apply_update(run, updates, minibatch)
    return updates


def token_loss(
    run: Run, tokens: Tokens, old: Anchor, view: View, entropy: Tensor
) -> tuple[Tensor, ClippedLoss, dict[str, Tensor]]:
    """(T,) loss of every response token; what the rule made of it; (T,) values by name, to be logged as their means.

    With r = exp(logprobs - old_logprobs), A the advantage and [lower, upper] the interval that the rule gives to the
    token, the policy's loss is max(-r A, -clip(r, lower, upper) A), at most -dual_clip A where A < 0; other surrogates:
    bandpo/objective.py. A rule that gives a weight w in place of an interval has the loss -w A logprobs.
    `view.logprobs` and `entropy` carry gradients.
    """
    cfg, means = run.cfg, dict[str, Tensor]()
    clipped = clipped_loss(run.rule, view, surrogate=cfg.surrogate, dual_clip=cfg.dual_clip, **old.parameters)
    losses = clipped.losses
    if cfg.mismatch_correction == "token_truncate":
        losses = losses * (old.old_logprobs - tokens.sampler_logprobs).exp().clamp(max=cfg.mismatch_cap)
    if tokens.ref_logprobs is not None:
        means["kl/reference"] = kl_estimate(view.logprobs, tokens.ref_logprobs, estimator=cfg.kl_estimator)
        losses = losses + cfg.kl_coef * means["kl/reference"]
    return losses, clipped, means


def apply_update(run: Run, updates: Updates, minibatch: list[Tokens]) -> None:
    """One optimizer step; skipped when the gradient is not finite, on all ranks alike since they share its norm.

    Raises FloatingPointError after `max_skipped` in a row.
    """
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


# ---- metrics ----


def step_metrics(
    run: Run, samples: list[Sample], minibatches: list[list[Tokens]], updates: Updates
) -> dict[str, float]:
    """All of docs/metrics.md but train/epoch, times and evaluation: sums and counts of all ranks, divided once."""
    cfg, once = run.cfg, 1 / run.plan.processes
    pairs = [pair for rows in zip(minibatches, updates.anchors, strict=True) for pair in zip(*rows, strict=True)]
    seen = [(tokens, old) for tokens, old in pairs if old]
    entropy = torch.cat([old.entropy for _, old in seen]).double()
    gap = engine_gap(seen)
    tokens = len(entropy)
    sums: dict[str, Pair] = {  # of this rank
        "train/entropy": (entropy.sum(), tokens),
        "train/lag": (sum(t.ages.double().sum() for t, _ in seen), tokens),
        "train/loss": (updates.loss, cfg.updates_per_step * once),
        "train/tokens_seen": (tokens + run.state.tokens_seen * once, once),
        **answer_metrics(cfg, samples),
        **reward_parts(run, samples),
        **(updates.clip.means() if updates.clip else {}),
        **updates.means,
        "mismatch/kl": ((gap.expm1() - gap).sum(), len(gap)),  # k3 of KL(sampler, trainer)
        "optim/grad_norm": (sum(updates.grad_norms) * once, len(updates.grad_norms) * once),
        "optim/skipped": (updates.skipped * once, once),
        "throughput/tokens_per_s": (tokens, sum(run.clock.times.values()) * once),
        "throughput/real_token_share": real_token_share([t.batch for t, _ in seen]),
    }
    peaks: dict[str, Number] = {
        "ratio/max": updates.clip.ratio_max if updates.clip else 0.0,
        "mismatch/max": gap.abs().max() if len(gap) else 0.0,
        "memory/peak_gib": run.clock.peak_gib,
    }
    metrics = {name: total / count for name, (total, count) in run.ranks.add(sums).items() if count}
    used = {"train/delta": delta_at(cfg, run.step), "optim/lr": learning_rate(cfg, run.step)}
    largest = run.ranks.largest(peaks)
    if "mismatch/kl" not in metrics:  # nothing to compare
        del largest["mismatch/max"]
    return metrics | largest | used


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    exit_with(lambda: record(main)(sys.argv[1:]))  # a launcher's summary shows the first error of several processes
