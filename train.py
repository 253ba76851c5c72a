"""bandpo: GRPO with Band clipping, the whole algorithm in one file.

    accelerate launch train.py --config qwen3b_band.yaml [--key value ...]     # --help lists every key

BandPO (arXiv 2603.04918) replaces the fixed clip bounds of GRPO by the projection of an f-divergence trust region on
each token: wide for rare tokens, narrow for confident ones, with one radius delta. Differences from the paper: The
clipping rule is a function (`rule`). Groups of equal rewards have advantages of exactly 0. Loss denominators are those
of the whole minibatch over all processes. Backward passes are skipped where every gradient is 0.
Read `main`, then the phases of `train_step` in call order. Where to change what:

    another advantage         group_advantages         another clipping rule       rule: my_file.py:my_rule
    another loss              grpo_loss                another reward              reward: my_file.py:my_reward
    sample selection          rollout                  per-token metric            `stats` in grpo_loss
    another optimizer         trainer/start.py         state that a resume loads   trainer/types.py
    a new option              configs/schema.py        examples                    docs/tweaks.md

Not supported: critics, reward models, asynchronous rollouts, tensor parallelism of the trainer.

Shapes: B prompts of this process per step, G samples per prompt, T response tokens per micro-batch (concatenated).
Log-probs: `rollout_logprobs` (of the engine), `old_logprobs` (of the old policy), `logprobs` (of the current policy).
"""

import math
import sys
import time
from dataclasses import asdict, replace

import torch
from torch import Tensor

from bandpo.rule import MAX_LOG_RATIO, Rule, sequence_sum
from configs import load_or_exit
from configs.schema import Config, Plan
from data import next_problems
from eval.evaluate import evaluate_policy
from eval.plots import plot_run
from eval.report import write_report
from rewards import Grade, GraderError, Ticket, shape_reward
from trainer.batching import make_minibatches
from trainer.clock import Clock
from trainer.lora import StartModel
from trainer.metrics import (
    MAX_SKIPPED,
    Stats,
    TokenStats,
    check_rollout_logprobs,
    log_samples,
    raise_not_finite,
    step_metrics,
)
from trainer.policy import Policy
from trainer.resume import save
from trainer.rollout import Completion
from trainer.run import Run, learning_rate, seed_of
from trainer.start import start
from trainer.stopping import Interrupted, exit_on_error, hard_exit, set_parent_death_signal
from trainer.task import dry_run
from trainer.types import MicroBatch, Sample, State


def main(argv: list[str]) -> int:
    """Train with the configuration of `argv`.

    Returns exit code 0, 130 after Ctrl-C, or 1 if a launcher died. Invalid config or data: one line per error, code 2.
    A failure during training: exit code 1.
    """
    set_parent_death_signal()
    with exit_on_error(ValueError, OSError, code=2):
        cfg = load_or_exit(Config, argv)
        plan = Plan(cfg)

        def say(line: str) -> None:
            if plan.rank == 0:
                print(line, flush=True)

        say(plan.text(cfg))
        if cfg.dry_run:
            return dry_run(cfg, plan.processes, say)
    with start(cfg, plan, say, Clock()) as run:
        try:
            # Evaluate the initial policy, or repeat an interrupted evaluation.
            if run.step == 0 or run.state.pending_metrics:
                finish_step(run, run.state.pending_metrics)
            while run.step < cfg.max_steps:
                finish_step(run, train_step(run))
        except Interrupted:  # SIGTERM or Ctrl-C, on all ranks; an interrupted step is discarded
            pass
        save(run)
        if run.ranks.is_main and not run.signals.number:  # an interrupted run writes no report
            write_report([run.folder], run.folder / "report.html")
            run.tracker.artifact([run.folder / "report.html", *plot_run(run.folder)], "report")
        return run.exit_code()


def train_step(run: Run) -> dict[str, float]:
    """Run one step of the algorithm, one line per phase; return its metrics.

    Raises Interrupted (before the first update only), GraderError, EngineError, EngineMismatch, FloatingPointError.
    """
    started_s = time.perf_counter()
    run.seed(seed_of(run.cfg.seed, run.step, run.plan.rank))  # reseed all global RNGs: checkpoints store none
    with run.phase("rollout"):  # grades responses while others are still sampled
        samples, state = rollout(run)
    with run.phase("advantage"):
        samples = add_advantages(run.cfg, samples)
    with run.phase("batch"):
        minibatches = make_minibatches(run, samples)
    with run.phase("old"), run.interruptible():
        run.engine.sleep()
        minibatches = add_old_logprobs(run, minibatches)
    with run.phase("update"):
        stats = update_policy(run, minibatches)
    with run.phase("sync"):
        run.sync_weights()
    metrics = step_metrics(run, samples, minibatches, stats)
    run.state = replace(
        state,
        step=run.step + 1,
        tokens_seen=round(metrics["train/tokens_seen"]),
        skipped_in_a_row=stats.skipped_in_a_row,
    )
    log_samples(run, samples, stats)
    times = run.clock.take() | {"time/step_s": time.perf_counter() - started_s}
    return metrics | {"train/epoch": run.epochs} | times


def finish_step(run: Run, metrics: dict[str, float]) -> None:
    """Evaluate, log and save if due. If the evaluation is interrupted, the checkpoint keeps the pending metrics."""
    cfg = run.cfg
    run.state = replace(run.state, pending_metrics=metrics, score=None)
    if run.is_due(cfg.eval_every) or (cfg.eval_every and run.step == cfg.max_steps):
        with run.phase("eval"):
            evaluation, score = evaluate_policy(run)
        run.state = replace(run.state, score=score)
        metrics = metrics | evaluation | run.clock.take()
    run.state = replace(run.state, pending_metrics={})
    if metrics:
        run.tracker.log(run.step, metrics)
    if run.step and run.is_due(cfg.save_every):
        save(run)


# ---- rollout and reward ----


def rollout(run: Run) -> tuple[list[Sample], State]:
    """Return this rank's training samples of this step, and the state after sampling. Raises Interrupted.

    Step t samples the batch of step t + `off_policy_steps`; the first step fills the queue.
    """
    state, batches = run.state, list(run.state.queue)
    while len(batches) <= run.cfg.off_policy_steps:
        samples, drawn = sample_batch(run, run.step + len(batches), state.prompts_drawn)
        state = replace(state, prompts_drawn=drawn)
        batches.append(samples)
    return batches[0], replace(state, queue=batches[1:])


def sample_batch(run: Run, step: int, drawn: int) -> tuple[list[Sample], int]:
    """Return this rank's samples for a step, group by group, and the updated number of prompts drawn.

    With dynamic sampling (DAPO), the next prompts of the training order replace groups with equal scores (before
    shaping), for up to `dynamic_sampling` rounds. Raises Interrupted.
    """
    cfg, order = run.cfg, {"n": len(run.task.train), "per_step": run.cfg.prompts_per_step, "seed": run.cfg.seed}
    slots = run.plan.slots(run.plan.rank)  # this rank's positions in the batch of prompts
    picks, drawn = next_problems(drawn, cfg.prompts_per_step, **order, taken=())
    used, wanted = set(picks), dict(enumerate(picks))  # slot -> problem index, on all ranks
    groups: dict[int, list[Sample]] = {}
    for refill in range(cfg.dynamic_sampling + 1):
        with run.interruptible():
            groups |= sample_groups(run, {slot: wanted[slot] for slot in slots if slot in wanted}, (step, refill))
        if refill == cfg.dynamic_sampling:
            break
        equal = [slot for slot in slots if len({sample.grade.score for sample in groups[slot]}) == 1]
        to_refill = sorted(run.ranks.gather(equal))
        if not to_refill:
            break
        picks, drawn = next_problems(drawn, len(to_refill), **order, taken=used)
        used |= set(picks)
        wanted = dict(zip(to_refill, picks, strict=True))
    return [sample for slot in slots for sample in groups[slot]], drawn


def sample_groups(run: Run, wanted: dict[int, int], when: tuple[int, int]) -> dict[int, list[Sample]]:
    """Return a graded group per slot of `wanted` (slot -> problem index). when: step, refill. Raises Interrupted."""
    cfg, G, rows = run.cfg, run.cfg.samples_per_prompt, [run.task.train[i] for i in wanted.values()]
    seeds = [[seed_of(cfg.seed, *when, slot, j) for j in range(G)] for slot in wanted]
    about = [{"problem": asdict(problem), "prompt": run.task.tokenizer.decode(prompt)} for problem, prompt in rows]
    tickets: dict[tuple[int, int], Ticket | Grade] = {}

    def finished(i: int, j: int, completion: Completion) -> None:
        run.raise_if_interrupted()
        ids = completion.token_ids
        of_response = {"response_tokens": len(ids), "truncated": completion.finish_reason == "length"}
        of_response["completion_with_special_tokens"] = lambda: run.task.tokenizer.decode(ids)
        tickets[i, j] = run.verifier.submit(completion.text, rows[i][0].gold, about[i] | of_response)
        bar.update()

    with run.tracker.progress(len(rows) * G, f"step {run.step + 1} rollout", "responses") as bar:
        completions = run.engine.generate([prompt for _, prompt in rows], run.sampling, seeds=seeds, on_finish=finished)
    grades = run.verifier.collect([tickets[i, j] for i in range(len(rows)) for j in range(G)])
    groups: dict[int, list[Sample]] = {}
    for i, slot in enumerate(wanted):
        graded = zip(completions[i], grades[i * G : (i + 1) * G], strict=True)
        groups[slot] = [
            Sample(*rows[i], completion, grade, reward_of(cfg, completion, grade), run.step, slot * G + j)
            for j, (completion, grade) in enumerate(graded)
        ]
    return groups


def reward_of(cfg: Config, completion: Completion, grade: Grade) -> float:
    """Return the reward: score, scaled to reward_incorrect..reward_correct, minus the overlong penalty."""
    return shape_reward(
        grade,
        response_tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
        right=cfg.reward_correct,
        wrong=cfg.reward_incorrect,
        overlong_buffer_tokens=cfg.overlong_buffer_tokens,
        max_response_tokens=cfg.max_response_tokens,
    )


# ---- advantage ----


def add_advantages(cfg: Config, samples: list[Sample]) -> list[Sample]:
    """Add advantages to the samples; a group is `samples_per_prompt` consecutive samples."""
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64).view(-1, cfg.samples_per_prompt)  # (B, G)
    values = group_advantages(rewards, cfg.advantage).flatten().tolist()
    return [replace(sample, advantage=value) for sample, value in zip(samples, values, strict=True)]


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    """Return (B, G) advantages of (B, G) rewards, one group per row; exactly 0 in a group of equal rewards.

    group_std:  (r - mean) / (std + 1e-6), std with G - 1: GRPO, arXiv 2402.03300
    group_mean: r - mean: Dr. GRPO, arXiv 2503.20783
    rloo:       r - mean of the others: arXiv 2402.14740
    maxrl:      (r - mean) / mean, 0 if the mean is 0; rewards must not be negative: arXiv 2602.02710, algorithm 1

    Raises ValueError for an unknown kind, GraderError for maxrl with a reward below 0.
    """
    mean, equal = rewards.mean(dim=1, keepdim=True), (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = (rewards - mean).masked_fill(equal, 0.0)  # rounding of the mean would leave advantages of 1e-10
    if kind == "group_std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    if kind == "group_mean":
        return centred
    if kind == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    if kind == "maxrl":
        if (rewards < 0).any():
            raise GraderError(
                f"advantage: maxrl needs rewards from 0 (got {rewards.min():g}); use group_std or group_mean"
            )
        return centred / mean.where(mean > 0, 1.0)
    raise ValueError(f"advantage: {kind!r} is not known; use group_std, group_mean, rloo or maxrl")


# ---- old policy and reference ----


@torch.no_grad()
def add_old_logprobs(run: Run, minibatches: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
    """Add log-probs of the old policy, and of reference model and teacher if any, to the micro-batches.

    old_policy: trainer recomputes them with the current policy. With one update per step, the forward pass of the
    update provides them (`old_logprobs` stays None). old_policy: rollout uses those of the engine.
    """
    if run.cfg.old_policy == "rollout":
        minibatches = [[replace(b, old_logprobs=b.rollout_logprobs) for b in minibatch] for minibatch in minibatches]
    elif run.cfg.updates_per_step > 1:
        minibatches = forward_all(run, run.policy, minibatches, "old_logprobs", "entropy")
    for frozen, name in ((run.reference, "ref_logprobs"), (run.teacher, "teacher_logprobs")):
        if frozen:
            with frozen.on_device():
                minibatches = forward_all(run, frozen, minibatches, name)
    return minibatches


def forward_all(
    run: Run, policy: Policy | StartModel, minibatches: list[list[MicroBatch]], *names: str
) -> list[list[MicroBatch]]:
    """Add the policy's log-probs and, with two names, its entropy to the micro-batches as `names`."""
    with run.tracker.progress(sum(map(len, minibatches)), f"step {run.step + 1} {names[0]}", "micro-batches") as bar:

        def forward(batch: MicroBatch) -> MicroBatch:
            values = policy(batch)  # (T,), (T,)
            bar.update()
            return replace(batch, **dict(zip(names, values, strict=False)))

        return [[forward(batch) for batch in minibatch] for minibatch in minibatches]


# ---- loss and update ----


def grpo_loss(
    cfg: Config, rule: Rule, batch: MicroBatch, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, TokenStats]:
    """Return the scalar loss of a micro-batch and token statistics: (T,) values to average, or (values, mask).

    logprobs, entropy: (T,), of the current policy, with gradient. The policy term of a token is the PPO clip with the
    rule's bounds, max(-r A, -clip(r, lower, upper) A), at most -dual_clip A for A < 0 (arXiv 1912.09729). For a
    gradient weight w, the term is -w A logprob, but 0 for A < 0 and w > dual_clip. Neither has a gradient if
    |ln r| > 20.
    """
    A = batch.advantages
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    if batch.teacher_logprobs is not None:
        A = A + cfg.teacher_coef * (batch.teacher_logprobs - old_logprobs)
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # r
    inputs = {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "old_logprobs": old_logprobs, "advantages": A}
    bounds = rule(**inputs, sequence_ids=batch.sequence_ids)  # (lower, upper), or a gradient weight

    weight = ratio.detach() if isinstance(bounds, tuple) else bounds
    dual_clip = math.inf if cfg.dual_clip is None else cfg.dual_clip
    no_gradient = (log_ratio.abs() > MAX_LOG_RATIO) | ((A < 0) & (weight > dual_clip))
    if isinstance(bounds, tuple):
        lower, upper = bounds
        clipped = ((A > 0) & (ratio > upper)) | ((A < 0) & (ratio < lower))
        weight = weight.masked_fill(clipped | no_gradient, 0.0)
        loss = torch.maximum(-ratio * A, -ratio.clamp(lower, upper) * A)
        if cfg.dual_clip is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -cfg.dual_clip * A), loss)
        stats: TokenStats = {"band/lower_mean": lower, "band/upper_mean": upper}
    else:
        clipped = bounds == 0
        weight = bounds.masked_fill(no_gradient, 0.0)
        loss, stats = -weight * A * logprobs, {}
    stats |= {"clip/up": (clipped, A > 0), "clip/down": (clipped, A < 0), "clip/fraction": (weight == 0) & (A != 0)}
    stats |= {"clip/weight_mean": weight, "ratio/mean": ratio}

    if cfg.tis != "none":
        stats["rollout/tis_mean"] = importance_weight(cfg, old_logprobs, batch)
        loss = loss * stats["rollout/tis_mean"]
    if batch.teacher_logprobs is not None:
        stats["kl/teacher"] = old_logprobs - batch.teacher_logprobs
    if batch.ref_logprobs is not None:
        stats["kl/reference"] = kl_estimate(logprobs, batch.ref_logprobs)
        loss = loss + cfg.kl_coef * stats["kl/reference"]
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * entropy
    return (batch.loss_weights * loss).sum(), stats


def importance_weight(cfg: Config, old_logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """Return (T,) importance weights old policy / rollout policy, per token, or per sequence repeated for its tokens.

    *_truncate: at most tis_cap (TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). token_mask: 0 outside [tis_floor, tis_cap] (IcePop, arXiv 2510.18855). sequence_mask: likewise per
    sequence (MIS, Liu et al. 2025, "When speed kills stability").
    """
    log_weight = old_logprobs - batch.rollout_logprobs
    if cfg.tis.startswith("sequence"):
        log_weight = sequence_sum(log_weight, batch.sequence_ids)
    weight = log_weight.exp()
    if cfg.tis.endswith("mask"):
        return weight.masked_fill((weight < cfg.tis_floor) | (weight > cfg.tis_cap), 0.0)
    return weight.clamp(max=cfg.tis_cap)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (T,) k3 estimates of KL(policy || reference), nats: e^d - 1 - d (at most 10), d = ref_logprobs - logprobs.

    Below the cap unbiased for tokens sampled from the policy; never negative (J. Schulman, "Approximating KL
    Divergence", 2020).
    """
    d = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(d) - d).clamp(max=10)


def update_policy(run: Run, minibatches: list[list[MicroBatch]]) -> Stats:
    """Train for `epochs` passes over the minibatches, with one optimizer update per minibatch.

    Raises EngineMismatch before the first update, FloatingPointError after MAX_SKIPPED non-finite gradients in a row.
    """
    cfg, stats = run.cfg, Stats(run.state.skipped_in_a_row)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, run.step)
    for minibatch in minibatches * cfg.epochs:
        before = []  # log-probs of the minibatch before its update
        for batch in minibatch:
            last = batch is minibatch[-1]
            with run.policy.accumulating(last):
                logprobs, entropy = run.policy(batch)  # (T,), (T,)
                loss, of_tokens = grpo_loss(cfg, run.rule, batch, logprobs, entropy)
                # DDP and FSDP average gradients over processes; loss_weights already use global counts.
                run.policy.backward(loss * run.plan.processes, logprobs, entropy, always=last)
            stats.add(batch, loss, logprobs, entropy, of_tokens)
            before.append(logprobs.detach())
            del logprobs, entropy, loss, of_tokens  # frees the activations of a skipped backward pass
        if stats.rollout_gap is None:
            stats.rollout_gap = check_rollout_logprobs(run, minibatches, before)
        apply_update(run, stats, minibatch)
    return stats


def apply_update(run: Run, stats: Stats, minibatch: list[MicroBatch]) -> None:
    """Apply one optimizer update; skip it on all ranks if the all-reduced gradient norm is not finite."""
    norm = run.policy.clip_gradients(run.cfg.grad_clip).item()
    if math.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad()
    stats.add_update(norm)
    if stats.skipped_in_a_row >= MAX_SKIPPED:
        raise_not_finite(run, minibatch, stats.skipped_in_a_row)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    hard_exit(lambda: record(main)(sys.argv[1:]))  # lets the launcher report the first error
