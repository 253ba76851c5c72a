"""off_policy_steps: each step trains on rollouts of an earlier policy, with stated log-probs, and resumes exactly."""

import shutil
from pathlib import Path

import pytest
from launching import metrics, without_clock

import train
from bench.chaos import SMALL, difference
from trainer.policy import Policy
from trainer.resume import load_state
from trainer.types import State, from_text, to_text

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


def test_a_state_survives_its_text(late: Path):
    state = load_state(late / "checkpoints" / "step_000004", rank=0, processes=1)
    assert from_text(to_text(state)) == state
    with pytest.raises(TypeError, match="not set"):
        to_text(State(pending_metrics={"x": {1}}))  # type: ignore[dict-item]


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
