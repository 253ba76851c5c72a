"""Samples of a replay buffer: where they land, with which old log-probs, and their effect on the gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from bench.chaos import SMALL
from trainer.run import Run
from trainer.types import MicroBatch, Sample

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("old_policy", ["trainer", "rollout"])
def test_replayed_samples(toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_policy: str):
    """The third step also trains on the best samples of the first, whose policy is two steps older."""
    first: list[Sample] = []
    seen: list[tuple[int, MicroBatch, torch.Tensor]] = []  # update of the third step, micro-batch, log-probs
    fresh_of: dict[int, set[tuple[int, int]]] = {}
    gradients: list[torch.Tensor] = []
    make, loss, apply = train.make_minibatches, train.grpo_loss, train.apply_update

    def making(run: Run, samples: list[Sample]) -> list[list[MicroBatch]]:
        first.extend(samples if run.step == 0 else [])
        if run.step < 2:
            return make(run, samples)
        replayed = [replace(s, advantage=3.0) for s in first if s.index in (0, 1, 70, 200)]
        found = make(run, samples + replayed)
        size = run.plan.sequences_per_minibatch
        for m, minibatch in enumerate(found):
            landed = {(s.step, s.index) for batch in minibatch for s in batch.samples}
            fresh_of[m] = {pair for pair in landed if pair[0] == 2}
            assert fresh_of[m] == {(2, s.index) for s in samples if s.index // size == m}  # no boundary moved
            assert landed - fresh_of[m] == {(0, s.index) for s in replayed if s.index // size == m}
        return found

    def watched(cfg: Any, rule: Any, batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> Any:
        if current.step == 2:
            seen.append((len(gradients), batch, logprobs.detach().clone()))
        return loss(cfg, rule, batch, logprobs, entropy)

    def applying(run: Run, stats: Any, minibatch: list[MicroBatch]) -> None:
        if run.step == 2:
            gradients.append(torch.cat([p.grad.flatten() for p in run.policy.parameters() if p.grad is not None]))
            if len(gradients) == 1:
                check_first_gradient(run, minibatch, gradients[0])
        apply(run, stats, minibatch)

    def check_first_gradient(run: Run, minibatch: list[MicroBatch], found: torch.Tensor) -> None:
        """Against the definition: mean over sequences, replayed ones included, of mean over tokens of -r A."""
        run.policy.model.zero_grad()
        count = sum(len(batch.samples) for batch in minibatch)
        total = torch.zeros(())
        for batch in minibatch:
            logprobs, _ = run.policy(batch)
            assert batch.old_logprobs is not None
            ratio = (logprobs - batch.old_logprobs).exp()
            for i, sample in enumerate(batch.samples):
                own = batch.sequence_ids == i
                assert isinstance(sample.advantage, float)
                total = total - (ratio[own] * sample.advantage).mean() / count
        total.backward()
        expected = torch.cat([p.grad.flatten() for p in run.policy.parameters() if p.grad is not None])
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    def stepping(run: Run) -> dict[str, float]:
        current.step = run.step
        return step(run)

    class current:
        step = 0

    step = train.train_step
    for name, function in {
        "train_step": stepping, "make_minibatches": making, "grpo_loss": watched, "apply_update": applying
    }.items():  # fmt: skip
        monkeypatch.setattr(train, name, function)
    keys = {"model": toy_model, "output_dir": tmp_path, "engine": "hf", **SMALL, "eval_every": 0, "max_steps": 3}
    keys |= {"rule": "none", "dual_clip": "null", "old_policy": old_policy, "temperature": 1.5}
    argv = ["--config", "demo_band", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]
    assert train.main(argv) == 0

    assert sum(len(fresh) for fresh in fresh_of.values()) == 256
    stale = 0
    for update, batch, logprobs in seen:
        for i, sample in enumerate(batch.samples):
            own = batch.sequence_ids == i
            old = batch.old_logprobs[own]  # type: ignore[index]
            if old_policy == "rollout":  # the log-probs that the sample came with
                assert old.tolist() == pytest.approx(sample.completion.logprobs, abs=1e-6)
            elif update == 0:  # recomputed under the policy of this step
                assert torch.equal(old, logprobs[own])
            if sample.step == 0:
                stale += 1
                assert batch.advantages[own].tolist() == [3.0] * int(own.sum())
                assert batch.rollout_logprobs[own].tolist() == pytest.approx(sample.completion.logprobs, abs=1e-6)
    assert stale == 4
