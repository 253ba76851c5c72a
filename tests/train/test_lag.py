"""lag: every step trains on the answers of the policy of some steps ago, held to that policy, and resumes exactly."""

import shutil
from pathlib import Path

import pytest
from launching import metrics, without_clock

import train
from bench.chaos import SMALL, difference
from trainer.resume import load_state
from trainer.state import State, from_text, to_text

pytestmark = pytest.mark.slow

OF_LAG = ("train/lag", "train/epoch")


def argv(model: str, run: Path, **overrides: object) -> list[str]:
    keys = {"model": model, "output_dir": run.parent, "run_name": run.name, "engine": "hf", **SMALL, "eval_every": 0}
    keys |= {"max_steps": 4, "save_every": 1, "keep_last": 9, **overrides}
    return ["--config", "demo_band", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def late(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "late"
    assert train.main(argv(toy_model, run, lag=2)) == 0
    return run


@pytest.mark.parametrize("old_policy", ["trainer", "sampler"])
def test_a_policy_that_stands_still_is_as_old_as_it_is_young(toy_model: str, tmp_path: Path, old_policy: str):
    """At a learning rate of zero every answer is of the same policy: all that is measured is the same at any lag."""
    rows = []
    for lag in (0, 2):
        run = tmp_path / str(lag)
        assert train.main(argv(toy_model, run, lag=lag, lr=0, old_policy=old_policy)) == 0
        rows.append(without_clock(metrics(run)))
    assert [row["train/lag"] for row in rows[1]] == [0, 1, 2, 2]
    for now, late in zip(*rows, strict=True):
        known = set(now) if old_policy == "trainer" or late["train/lag"] == 0 else set(late)
        assert {k: now[k] for k in known if k not in OF_LAG} == {k: v for k, v in late.items() if k not in OF_LAG}
        assert ("mismatch/kl" in late) == (old_policy == "trainer" or late["train/lag"] == 0)


def test_answers_are_held_to_the_policy_that_gave_them(late: Path):
    """The ratio shows the age of the answers; the gap between engine and trainer, both of that policy, does not."""
    rows = metrics(late)
    assert [row["train/lag"] for row in rows] == [0, 1, 2, 2]
    assert all(row["mismatch/kl"] < 1e-10 for row in rows)
    assert abs(rows[3]["ratio/mean"] - 1) > 1e-4


def test_what_waits_is_in_the_checkpoint(late: Path, toy_model: str, tmp_path: Path):
    """From each of its steps the run goes on to the last bit as it did."""
    state = load_state(late / "checkpoints" / "step_000004", rank=0, processes=1)
    assert [{sample.step for sample in batch} for batch in state.queue] == [{2}, {3}]
    assert all(len(s.old_logprobs or []) == len(s.completion.token_ids) for batch in state.queue for s in batch)
    for step in (1, 3):
        run = tmp_path / str(step) / late.name
        shutil.copytree(late, run)
        for other in {2, 3, 4} - {step}:
            if other > step:
                shutil.rmtree(run / "checkpoints" / f"step_{other:06d}")
        assert train.main(argv(toy_model, run, lag=2)) == 0
        assert difference(run, late, step=4) == ""


def test_samples_of_another_number_of_processes_are_refused(late: Path):
    with pytest.raises(ValueError, match="each kept its own queue: resume with that number, not 2"):
        load_state(late / "checkpoints" / "step_000004", rank=1, processes=2)


def test_a_state_is_the_same_after_a_way_through_text(late: Path):
    state = load_state(late / "checkpoints" / "step_000004", rank=0, processes=1)
    assert from_text(to_text(state)) == state
    with pytest.raises(TypeError, match="not set"):
        to_text(State(unlogged={"x": {1}}))  # type: ignore[dict-item]
