"""Samples of an earlier policy, by off_policy_steps or a replay buffer: their log-probs, gradient and resume."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import metrics, without_clock

import train
from bench.chaos import SMALL, difference
from trainer.policy import Policy
from trainer.resume import load_state
from trainer.run import Run
from trainer.types import MicroBatch, Sample, State

pytestmark = pytest.mark.slow


def argv(model: str, run: Path, **overrides: object) -> list[str]:
    keys = {"model": model, "output_dir": run.parent, "run_name": run.name, "engine": "hf", **SMALL, "eval_every": 0}
    keys |= {"max_steps": 4, "save_every": 1, "keep_last": 9, **overrides}
    return ["--config", "demo_band", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def late(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "late"
    assert train.main(argv(toy_model, run, off_policy_steps=2)) == 0
    return run


@pytest.mark.parametrize("old_policy", ["trainer", "rollout"])
def test_with_a_constant_policy_staleness_changes_nothing(toy_model: str, tmp_path: Path, old_policy: str):
    """At a learning rate of 0 every response is of the same policy: all other metrics are the same at any staleness."""
    rows = []
    for steps in (0, 2):
        run = tmp_path / str(steps)
        assert train.main(argv(toy_model, run, off_policy_steps=steps, lr=0, old_policy=old_policy)) == 0
        rows.append(without_clock(metrics(run)))
    assert [row["train/staleness"] for row in rows[1]] == [0, 1, 2, 2]
    for now, late in zip(*rows, strict=True):
        compared = now.keys() - {"train/staleness", "train/epoch"} - {k for k in now if k.startswith("rollout/")}
        assert {k: now[k] for k in compared} == {k: late[k] for k in compared}
        assert ("rollout/kl" in late) == (late["train/staleness"] == 0)  # a stale sample is of another policy


@pytest.mark.parametrize("old_policy", ["trainer", "rollout"])
def test_old_logprobs_of_stale_samples(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_policy: str
):
    """trainer: recomputed under the current policy just before the updates, so that the first ratio is exactly 1, and
    tis corrects for the rest. rollout: the engine's, so that the first ratio shows the staleness."""
    first_ratios, loss = [], train.grpo_loss

    def watched(cfg, rule, batch, logprobs, entropy):
        assert all(s.step == max(0, run_step[0] - 2) for s in batch.samples)
        if old_policy == "rollout":
            assert batch.old_logprobs is batch.rollout_logprobs
        first_ratios.append((run_step[0], (logprobs.detach() - batch.old_logprobs).exp()))
        return loss(cfg, rule, batch, logprobs, entropy)

    run_step, update = [0], train.update_policy

    def updating(run, minibatches):
        run_step[0] = run.step
        return update(run, minibatches)

    monkeypatch.setattr(train, "grpo_loss", watched)
    monkeypatch.setattr(train, "update_policy", updating)
    tis = {"tis": "token_truncate"} if old_policy == "trainer" else {}
    assert train.main(argv(toy_model, tmp_path / "run", off_policy_steps=2, old_policy=old_policy, **tis)) == 0
    of_last = [ratio for step, ratio in first_ratios if step == 3]
    gap = (of_last[0] - 1).abs().max().item()
    assert gap == 0 if old_policy == "trainer" else gap > 1e-3
    if old_policy == "trainer":
        rows = metrics(tmp_path / "run")
        assert rows[0]["rollout/tis_mean"] == pytest.approx(1, abs=1e-5) and abs(rows[3]["rollout/tis_mean"] - 1) > 1e-4


def test_a_queued_sample_keeps_its_rollout_logprobs_and_a_resume_is_exact(late: Path, toy_model: str, tmp_path: Path):
    """From each checkpoint the run continues bit for bit."""
    state = load_state(late / "checkpoints" / "step_000004", rank=0, processes=1)
    assert [{sample.step for sample in batch} for batch in state.queue] == [{2}, {3}]
    assert all(len(s.completion.logprobs) == len(s.completion.token_ids) for batch in state.queue for s in batch)
    for step in (1, 3):
        run = tmp_path / str(step) / late.name
        shutil.copytree(late, run)
        for other in {2, 3, 4} - {step}:
            if other > step:
                shutil.rmtree(run / "checkpoints" / f"step_{other:06d}")
        assert train.main(argv(toy_model, run, off_policy_steps=2)) == 0
        assert difference(run, late, step=4) == ""


def test_samples_of_another_number_of_processes_are_refused(late: Path):
    with pytest.raises(ValueError, match="each kept its own queue: resume with that number, not 2"):
        load_state(late / "checkpoints" / "step_000004", rank=1, processes=2)


@pytest.mark.parametrize("field, value, found", [("score", Path("x"), "PurePosixPath|PosixPath"), ("gone", 1, "gone")])
def test_a_state_of_other_code_is_refused(tmp_path: Path, field: str, value: object, found: str):
    state = State(step=3)
    object.__setattr__(state, field, value)
    (tmp_path / "step_000003").mkdir()
    torch.save(state, tmp_path / "step_000003" / "state_rank_0.pt")
    with pytest.raises(ValueError, match=f"other fields of State, or holds a class that KINDS lacks .*({found})"):
        load_state(tmp_path / "step_000003", rank=0, processes=1)


@pytest.mark.parametrize("kl_coef", [0, 0.1])
def test_a_skipped_backward_pass_changes_no_bit(
    kl_coef: float, toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Many groups of the start model are all incorrect. With a KL term they have a gradient all the same."""
    backward, skipped = Policy.backward, []

    def counting(policy, loss, *outputs, always):
        backward(policy, loss, *outputs, always=always)
        skipped.append(not always and outputs[0].grad_fn is not None and not loss.item())

    def complete(policy, loss, *outputs, always):
        backward(policy, loss, *outputs, always=True)

    for name, patched in (("skipped", counting), ("complete", complete)):
        monkeypatch.setattr(Policy, "backward", patched)
        keys = {"max_steps": 2, "micro_batch_tokens": 256, "kl_coef": kl_coef, "save_every": 0}
        assert train.main(argv(toy_model, tmp_path / name, **keys)) == 0
    assert difference(tmp_path / "skipped", tmp_path / "complete", step=2) == ""
    assert any(skipped) or kl_coef


# ---- a replay buffer ----


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
    keys = {"max_steps": 3, "save_every": 0, "rule": "none", "dual_clip": "null", "temperature": 1.5}
    assert train.main(argv(toy_model, tmp_path / "run", old_policy=old_policy, **keys)) == 0

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
