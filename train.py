"""bandpo: group-relative policy optimisation (GRPO) with Band clipping, the whole loop in one file.

    accelerate launch train.py --config qwen3b_band.yaml [--key value ...]     # --help lists every key

BandPO (arXiv 2603.04918) replaces GRPO's fixed interval for the probability ratio by the projection of an f-divergence
trust region on each token: wide for rare tokens, narrow for confident ones, with one radius delta. Read `main`, then
the phases of `train_step` in the order in which it calls them. Where to change what:

    another advantage         group_advantages         another loss or clip rule   token_loss, bandpo/objective.py
    which samples are kept    rollout                  another reward              reward: my_file.py:my_function
    another optimizer         run.py, _load_policy     what is logged              step_metrics
    a new knob                configs/schema.py

Left out: critics, reward models, asynchronous rollouts, tensor parallelism of the trainer, LoRA.

Axes: B prompts a step, G samples a prompt, N = B*G sequences, T response tokens of a micro-batch, flat.
Three log-probs, three names: `sampler_logprobs` (the engine's), `old_logprobs` (the trainer's before the step's first
update), `logprobs` (now).
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed
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
from configs import load_or_exit, to_yaml
from configs.memory import memory_text
from configs.schema import Config, Plan
from data import next_problems
from eval.evaluate import Row, evaluate
from eval.plots import plot_run
from rewards import Grade, Ticket, shape_reward
from trainer.batching import Sample, Tokens, collate
from trainer.rollout import Completion
from trainer.run import Run, StartUp, Stopped, StoppedTogether, one_clear_line, start
from trainer.task import load_task, look_at_task


def main(argv: list[str]) -> int:
    """Train as `argv` says; the exit code: 0, 130 after Ctrl-C.

    Exits with 2 for a mistake in the configuration or the data, with 1 when a step or its checkpoint failed.
    """
    clock = StartUp()
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
            return dry_run(cfg, plan, say)
        task = load_task(cfg, say)
    clock.done("data")
    with start(cfg, plan, task, say, clock) as run:
        if run.step == 0 or run.unlogged:  # the start policy, or a step whose evaluation was interrupted
            finish_step(run, run.unlogged)
        while not run.finished and not run.agreed_to_stop():
            metrics = train_step(run)
            if metrics is None:  # asked to stop before the first update: the unfinished step leaves no trace
                break
            finish_step(run, metrics)
        run.save()
        if run.is_main and cfg.plots and not run.signal:  # whoever asked to stop may not wait for pictures
            run.tracker.artifact(plot_run(run.folder), "plots")
        return run.exit_code()


def dry_run(cfg: Config, plan: Plan, say: Callable[[str], None]) -> int:
    """Everything that can be told without loading a model, then the configuration; the exit code, 0."""
    size, missing = look_at_task(cfg, say)
    if size:
        say(memory_text(cfg, size, plan.processes))
    say(to_yaml(cfg))
    for line in missing:
        say(f"not looked at, since the hub is not within reach: {line}")
    return 0


def train_step(run: Run) -> dict[str, float] | None:
    """One step of the algorithm, a line per phase. None when the run was asked to stop before the first update."""
    started = time.perf_counter()
    set_seed(draw(run.cfg.seed, run.step, run.plan.rank))  # whatever draws from a global generator: nothing to resume
    with run.phase("rollout"):  # answers are graded while others are still being sampled
        samples, prompts_drawn = rollout(run)
    if run.agreed_to_stop():
        return None
    with run.phase("advantage"):
        advantages(run.cfg, samples)
    with run.phase("collate"):
        minibatches = collate(run, samples)
    with run.phase("old"):
        run.engine.sleep()
        old_policy_pass(run, minibatches)
    if run.agreed_to_stop():
        return None
    with run.phase("optimize"):
        updates = optimize(run, minibatches)
    with run.phase("sync"):
        run.sync()
    run.step += 1
    run.prompts_drawn = prompts_drawn
    metrics = step_metrics(run, samples, minibatches, updates)
    return metrics | run.take_times() | {"time/step_s": time.perf_counter() - started}


def finish_step(run: Run, metrics: dict[str, float]) -> None:
    """Evaluate when due, log, save when due. Interrupted while evaluating, the metrics wait in the checkpoint."""
    cfg, run.unlogged = run.cfg, metrics
    if run.is_due(cfg.eval_every) or (cfg.eval_every and run.finished):
        with run.phase("eval"):
            evaluation = evaluate_policy(run)
        if evaluation is None:
            return
        metrics = metrics | evaluation | run.take_times()
    run.unlogged = {}
    if metrics:
        run.log(metrics)
    if run.step and run.is_due(cfg.save_every):
        run.save()


# ---- rollout and reward ----


def rollout(run: Run) -> tuple[list[Sample], int]:
    """This rank's samples of the step, group after group, in the order of the plan, and how many prompts were drawn so
    far; fewer samples when asked to stop.

    With dynamic sampling a group that is all right or all wrong, before any shaping of its rewards, gives its place to
    the next prompt in the order of training, `max_refills` times.
    """
    cfg, order = run.cfg, {"n": len(run.task.train), "per_step": run.cfg.prompts_per_step, "seed": run.cfg.seed}
    slots = run.plan.slots(run.plan.rank)
    picks, drawn = next_problems(run.prompts_drawn, cfg.prompts_per_step, **order, taken=())
    asked, wanted = set(picks), dict(enumerate(picks))  # slot -> index of its problem
    groups: dict[int, list[Sample]] = {}
    for refill in range(cfg.max_refills + 1 if cfg.dynamic_sampling else 1):
        try:
            groups |= sample_groups(run, wanted, refill)
        except Stopped:
            if cfg.dynamic_sampling:
                run.agreed_to_stop()  # the others ask below
            return [], drawn
        if not cfg.dynamic_sampling:
            break
        if run.agreed_to_stop():
            return [], drawn
        without_signal = [slot for slot in slots if len({sample.grade.score for sample in groups[slot]}) == 1]
        to_refill = sorted(run.gather_objects(without_signal))
        if not to_refill or refill == cfg.max_refills:
            break
        picks, drawn = next_problems(drawn, len(to_refill), **order, taken=asked)
        asked |= set(picks)
        wanted = dict(zip(to_refill, picks, strict=True))
    return [sample for slot in slots for sample in groups[slot]], drawn


def sample_groups(run: Run, wanted: dict[int, int], refill: int) -> dict[int, list[Sample]]:
    """A graded group for every slot of `wanted` (slot -> index of its problem, of all ranks) that is this rank's.

    Processes that share an engine ask it for the same answers, each keeps its own. Raises Stopped.
    """
    cfg, plan = run.cfg, run.plan
    first = plan.rank - plan.rank % cfg.tensor_parallel
    mine = set(plan.slots(plan.rank))
    of_engine = [slot for mate in range(first, first + cfg.tensor_parallel) for slot in plan.slots(mate)]
    slots = [slot for slot in of_engine if slot in wanted]
    seeds = [[draw(cfg.seed, run.step, refill, slot, j) for j in range(cfg.samples_per_prompt)] for slot in slots]
    tickets: dict[tuple[int, int], Ticket | Grade] = {}

    def finished(i: int, j: int, completion: Completion) -> None:
        run.check_stop()
        if slots[i] in mine:
            tickets[i, j] = run.verifier.submit(completion.text, run.task.train[wanted[slots[i]]][0].gold)

    prompts = [run.task.train[wanted[slot]][1] for slot in slots]
    with run.tracker.progress(len(prompts) * cfg.samples_per_prompt, f"step {run.step + 1} rollout", "answers") as bar:
        completions = run.engine.generate(
            prompts, run.sampling(), seeds=seeds, on_finish=finished, progress=lambda k: (bar.update(k), None)[1]
        )
    order = [(i, j) for i, slot in enumerate(slots) if slot in mine for j in range(cfg.samples_per_prompt)]
    grades = dict(zip(order, run.verifier.collect([tickets[key] for key in order]), strict=True))
    groups: dict[int, list[Sample]] = {}
    for i, j in order:
        completion, grade = completions[i][j], grades[i, j]
        problem, prompt = run.task.train[wanted[slots[i]]]
        sample = Sample(problem, prompt, completion, grade, reward_of(cfg, completion, grade))
        groups.setdefault(slots[i], []).append(sample)
    return groups


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


def advantages(cfg: Config, samples: list[Sample]) -> None:
    """Sets the advantage of every sample; a group is `samples_per_prompt` samples in a row."""
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64).view(-1, cfg.samples_per_prompt)  # (B, G)
    for sample, value in zip(samples, group_advantages(rewards, cfg.advantage).flatten().tolist(), strict=True):
        sample.advantage = value


def group_advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """(B, G) advantages of (B, G) rewards, each row a group.

    group_std:  (r - mean) / (std + 1e-6), std with G - 1: GRPO, arXiv 2402.03300
    group_mean: r - mean: Dr. GRPO, arXiv 2503.20783
    rloo:       r - mean of the others: arXiv 2402.14740
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "group_std":
        return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return centred * rewards.shape[1] / (rewards.shape[1] - 1) if kind == "rloo" else centred


# ---- old policy ----


@torch.no_grad()
def old_policy_pass(run: Run, minibatches: list[list[Tokens]]) -> None:
    """Log-probs and entropy under the policy about to be updated, and from them the interval of every token, once.

    The first minibatch is left to the first update, whose own forward pass is still under the old policy: the same
    numbers, one pass less. With `old_policy: sampler` the engine's log-probs are the anchor, and no pass is needed at
    all.
    """
    cfg = run.cfg
    if run.reference:
        run.reference.to(run.device)
        for tokens in work(run, minibatches, "reference"):
            tokens.ref_logprobs, _ = run.reference(tokens.batch)
        if cfg.reference_offload:
            run.reference.to("cpu")
    needs_entropy = cfg.radius == "entropy"  # its mean over the whole step comes before any interval
    if cfg.old_policy == "trainer" or needs_entropy:
        for tokens in work(run, minibatches if needs_entropy else minibatches[1:], "old log-probs"):
            tokens.trainer_logprobs, tokens.entropy = run.policy(tokens.batch)
    for tokens in work(run, minibatches, ""):
        tokens.old_logprobs = tokens.sampler_logprobs if cfg.old_policy == "sampler" else tokens.trainer_logprobs
    mean_entropy = mean_over_tokens(run, minibatches) if needs_entropy else math.nan
    for tokens in work(run, minibatches, ""):
        if tokens.old_logprobs is not None:
            set_interval(run, tokens, mean_entropy)


def set_interval(run: Run, tokens: Tokens, mean_entropy: float) -> None:
    """The ratio interval [lower, upper] of every token, from its old log-prob."""
    cfg = run.cfg
    assert tokens.old_logprobs is not None
    delta: float | torch.Tensor = delta_at(cfg, run.step)
    if cfg.radius == "entropy":
        assert tokens.entropy is not None
        delta = token_radius(
            tokens.entropy, delta=delta_at(cfg, run.step), radius=cfg.radius, mean_entropy=mean_entropy
        )
    tokens.lower, tokens.upper = clip_bounds(
        tokens.old_logprobs,
        clip=cfg.clip,
        delta=delta,
        divergence=cfg.divergence,
        ratio_cap=cfg.ratio_cap,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
    )


def delta_at(cfg: Config, step: int) -> float:
    """The Band's radius in the step after `step` completed ones."""
    final = cfg.delta if cfg.delta_final is None else cfg.delta_final
    return scheduled_delta(step, cfg.max_steps, delta=cfg.delta, delta_final=final, schedule=cfg.delta_schedule)


def mean_over_tokens(run: Run, minibatches: list[list[Tokens]]) -> float:
    """Mean entropy of the step's response tokens, over all ranks."""
    entropies = [t.entropy for t in work(run, minibatches, "") if t.entropy is not None]
    sums = run.reduce({"sum": sum(e.double().sum() for e in entropies), "count": float(sum(map(len, entropies)))})
    return sums["sum"] / sums["count"]


def work(run: Run, minibatches: list[list[Tokens]], phase: str):
    """Every micro-batch, behind a progress bar when the phase has a name."""
    flat = [tokens for minibatch in minibatches for tokens in minibatch]
    return run.tracker.progress(flat, f"step {run.step + 1} {phase}", "micro-batches") if phase else flat


# ---- optimize ----


@dataclass
class Updates:
    """What the updates of a step add up to, on the device until the step's metrics are read."""

    clip: ClipStatistics | None = None
    kl_reference: float | torch.Tensor = 0.0  # of this rank's tokens, summed over them and over updates
    loss: float | torch.Tensor = 0.0  # of this rank's share, summed over updates
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0


def optimize(run: Run, minibatches: list[list[Tokens]]) -> Updates:
    """`updates_per_step` optimizer steps on the clipped objective."""
    cfg, updates = run.cfg, Updates()
    set_learning_rate(run)
    for _ in range(cfg.epochs_per_step):
        for minibatch in minibatches:
            for k, tokens in enumerate(minibatch):
                with run.policy.accumulating(last=k == len(minibatch) - 1):
                    logprobs, entropy = run.policy(tokens.batch)
                    if tokens.trainer_logprobs is None and minibatch is minibatches[0]:  # the first update's own
                        tokens.trainer_logprobs = logprobs.detach()
                    if tokens.old_logprobs is None:
                        tokens.old_logprobs = logprobs.detach()
                        set_interval(run, tokens, math.nan)
                    if tokens.entropy is None:
                        tokens.entropy = entropy.detach()
                    judged = judged_logprobs(cfg, tokens, logprobs)
                    losses = token_loss(cfg, tokens, judged)
                    if tokens.ref_logprobs is not None:
                        kl = kl_estimate(logprobs, tokens.ref_logprobs, estimator=cfg.kl_estimator)
                        losses = losses + cfg.kl_coef * kl
                        updates.kl_reference += kl.detach().double().sum()
                    loss = (tokens.weights * losses).sum()
                    # DDP and FSDP average gradients over processes; the weights already divide by global counts.
                    (loss * run.plan.processes).backward()
                with torch.no_grad():
                    updates.loss += loss.detach()
                    statistics = clip_statistics(
                        judged.detach(),
                        tokens.old_logprobs,
                        tokens.advantages,
                        tokens.lower,
                        tokens.upper,
                        cfg.dual_clip,
                    )
                    updates.clip = statistics if updates.clip is None else updates.clip.merge(statistics)
            apply_update(run, updates, minibatch)
    return updates


def judged_logprobs(cfg: Config, tokens: Tokens, logprobs: torch.Tensor) -> torch.Tensor:
    """(T,) log-probs whose ratio to the old ones the interval judges: each token's own, or its sequence's (GSPO)."""
    assert tokens.old_logprobs is not None
    return sequence_logprobs(logprobs, tokens.old_logprobs, tokens.lengths) if cfg.surrogate == "gspo" else logprobs


def token_loss(cfg: Config, tokens: Tokens, judged: torch.Tensor) -> torch.Tensor:
    """(T,) policy loss of every response token; `judged` from judged_logprobs."""
    old = tokens.old_logprobs
    assert old is not None
    loss = policy_loss(
        judged, old, tokens.advantages, tokens.lower, tokens.upper, dual_clip=cfg.dual_clip, surrogate=cfg.surrogate
    )
    if cfg.mismatch_correction == "token_truncate":
        loss = loss * (old - tokens.sampler_logprobs).exp().clamp(max=cfg.mismatch_cap)
    return loss


def apply_update(run: Run, updates: Updates, minibatch: list[Tokens]) -> None:
    """One optimizer step; skipped when the gradient is not finite, on all ranks alike since they share its norm."""
    norm = run.policy.clip_gradients(run.cfg.grad_clip).item()
    if math.isfinite(norm):
        run.optimizer.step()
        run.skipped_in_a_row = 0
        updates.grad_norms.append(norm)
    else:
        updates.skipped += 1
        run.skipped_in_a_row += 1
    run.optimizer.zero_grad()
    if run.skipped_in_a_row >= run.cfg.max_skipped:
        path = run.folder / f"not_finite_step_{run.step + 1:06d}_rank_{run.plan.rank}.jsonl"
        rows = [row for tokens in minibatch for row in tokens.rows]
        path.write_text("".join(json.dumps({"text": run.task.tokenizer.decode(row)}) + "\n" for row in rows))
        raise FloatingPointError(
            f"step {run.step + 1}: {run.skipped_in_a_row} updates in a row had no finite gradient (max_skipped); their "
            f"sequences are in {path}; lower lr or delta, or go back to an earlier checkpoint"
        )


def set_learning_rate(run: Run) -> None:
    """The learning rate of this step: a pure function of it."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.cfg, run.step)


def learning_rate(cfg: Config, step: int) -> float:
    """Of the step after `step` completed ones."""
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
    """Everything of docs/metrics.md but evaluation and times. Raises RuntimeError when the engine is not the policy."""
    cfg, flat = run.cfg, [tokens for minibatch in minibatches for tokens in minibatch]
    entropy = torch.cat([t.entropy for t in flat if t.entropy is not None])
    gaps = [t.trainer_logprobs - t.sampler_logprobs for t in flat if t.trainer_logprobs is not None]
    # Log of trainer over sampler; of the first minibatch alone with old_policy: sampler. Double: it is about rounding.
    gap = torch.cat(gaps).double()
    groups = [samples[i : i + cfg.samples_per_prompt] for i in range(0, len(samples), cfg.samples_per_prompt)]
    masks = [tokens.batch.attention_mask for tokens in flat]  # None: no padding
    slots = [tokens.batch.input_ids.numel() for tokens in flat]
    reasons = ("timeout", "crash", "guard", "no_answer", "contradiction")
    sums = run.reduce(
        {
            "entropy": entropy.double().sum(),
            "mismatch": (gap.expm1() - gap).sum(),  # k3 of KL(sampler, trainer): its samples are the sampler's
            "compared": float(len(gap)),
            "tokens": float(len(entropy)),
            "slots": float(sum(slots)),
            "used": sum(n if mask is None else mask.sum() for n, mask in zip(slots, masks, strict=True)),
            "loss": updates.loss,
            "kl_reference": updates.kl_reference,
            "samples": float(len(samples)),
            "reward": sum(s.reward for s in samples),
            "correct": float(sum(s.grade.correct for s in samples)),
            "truncated": float(sum(s.completion.finish_reason == "length" for s in samples)),
            "groups": float(len(groups)),
            "solved_all": float(sum(all(s.grade.correct for s in group) for group in groups)),
            "solved_none": float(sum(not any(s.grade.correct for s in group) for group in groups)),
            "no_signal": float(sum(len({s.reward for s in group}) == 1 for group in groups)),
            **{reason: float(sum(s.grade.reason == reason for s in samples)) for reason in reasons},
        }
    )
    peaks = run.largest({"mismatch/max": gap.abs().max(), "memory/peak_gib": run.peak_gib})
    run.tokens_seen += int(sums["tokens"])
    assert updates.clip is not None
    metrics = {
        "train/entropy": sums["entropy"] / sums["tokens"],
        "train/loss": sums["loss"] / cfg.updates_per_step,
        "train/delta": delta_at(cfg, run.step - 1),
        "train/tokens_seen": float(run.tokens_seen),
        "train/epoch": run.epochs,
        "reward/mean": sums["reward"] / sums["samples"],
        "reward/accuracy": sums["correct"] / sums["samples"],
        **{f"reward/{key}": sums[key] / sums["groups"] for key in ("solved_all", "solved_none", "no_signal")},
        **{f"reward/{key}": sums[key] / sums["samples"] for key in reasons},
        **updates.clip.reduced(run.reduce, run.largest).summary(),
        **({"kl/reference": sums["kl_reference"] / sums["tokens"] / cfg.epochs_per_step} if run.reference else {}),
        "mismatch/kl": sums["mismatch"] / sums["compared"],
        **peaks,
        "optim/grad_norm": sum(updates.grad_norms) / len(updates.grad_norms) if updates.grad_norms else math.nan,
        "optim/lr": learning_rate(cfg, run.step - 1),
        "optim/skipped": float(updates.skipped),
        "response/length_mean": sums["tokens"] / sums["samples"],
        "response/truncated": sums["truncated"] / sums["samples"],
        "throughput/tokens_per_s": sums["tokens"] / sum(run.times.values()),
        "throughput/real_token_share": sums["used"] / sums["slots"],
    }
    if not metrics["mismatch/kl"] <= cfg.mismatch_limit:  # also when it is not a number
        raise RuntimeError(
            f"step {run.step}: KL(sampler, trainer) is {metrics['mismatch/kl']:.3g} nats per token, mismatch_limit is "
            f"{cfg.mismatch_limit}: the engine does not hold the trainer's weights, or computes with another precision"
        )
    run.tracker.samples(run.step, [sample_row(group[0]) for group in groups[: cfg.samples_logged]])
    run.tracker.histogram(run.step, "histogram/interval_width", torch.cat([t.upper - t.lower for t in flat]).cpu())
    return metrics


def sample_row(sample: Sample) -> dict[str, object]:
    """A row of the table of sample answers."""
    return {
        "problem": sample.problem.problem,
        "answer": sample.completion.text,
        "gold": sample.problem.gold,
        "extracted": sample.grade.extracted,
        "reason": sample.grade.reason,
        "reward": sample.reward,
        "advantage": round(sample.advantage, 4),
        "tokens": len(sample.completion.token_ids),
    }


def evaluate_policy(run: Run) -> dict[str, float] | None:
    """mean@k, pass@k, maj@k on every evaluation set, at the sampling settings of training; None when asked to stop."""
    cfg, total = run.cfg, sum(map(len, run.task.evals.values())) * run.cfg.eval_samples
    if run.agreed_to_stop():
        return None
    with run.tracker.progress(total // run.plan.processes, f"step {run.step} evaluation", "answers") as bar:

        def one_more(count: int) -> None:
            bar.update(count)
            run.check_stop()

        def gather(rows: list[Row]) -> list[Row]:
            if run.agreed_to_stop():
                raise StoppedTogether
            return run.gather_objects(rows if run.plan.rank % cfg.tensor_parallel == 0 else [])

        try:
            result = evaluate(
                run.engine,
                run.eval_verifier,
                run.task.evals,
                run.sampling(),
                samples=cfg.eval_samples,
                seed=cfg.seed,
                ks=(cfg.eval_samples,),
                rank=run.plan.rank // cfg.tensor_parallel,
                world=run.plan.processes // cfg.tensor_parallel,
                gather=gather,
                progress=one_more,
            )
        except StoppedTogether:
            return None
        except Stopped:  # this rank alone so far; the others are told where they gather
            run.agreed_to_stop()
            return None
    scores = [
        value
        for key, value in result.metrics.items()
        if key.endswith(f"/mean@{cfg.eval_samples}") and "strict" not in key
    ]
    run.score, run.score_step = sum(scores) / len(scores), run.step
    return result.metrics


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))  # so that a launcher's summary shows the first error of several processes
