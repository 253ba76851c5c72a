"""Tiny runs of train.py on one GPU: steps, checkpoints, resuming, signals in every phase, the same seed twice."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import GPU_KEYS, ROOT, metrics, without_clock


def run(model: str, out: Path, *script: str, **keys: object) -> subprocess.CompletedProcess[str]:
    words = [w for k, v in {"model": model, "output_dir": out, **GPU_KEYS, **keys}.items() for w in (f"--{k}", str(v))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, *(script or ("train.py",)), "--config", "demo_band", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def well(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def whole(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    well(run(toy_model, out, run_name="run", max_steps=4))
    return out / "run"


def test_trainer_and_engine_agree_at_every_step(whole: Path, device: str, figure: Callable[..., None]):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert 0 <= row["rollout/kl"] < 0.01 and row["rollout/logprob_diff_max"] < 0.5 and row["optim/grad_norm"] > 0
    figure("rollout/kl of a toy model, largest of four steps", max(r["rollout/kl"] for r in rows[1:]), "nats")
    if device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        share = float(GPU_KEYS["engine_memory_share"])
        assert share * total < rows[-1]["memory/peak_gib"] < total  # the engine's share counts while it samples


def test_a_resumed_run_goes_on(whole: Path, toy_model: str, tmp_path: Path):
    well(run(toy_model, tmp_path, run_name="run", max_steps=2))
    well(run(toy_model, tmp_path, run_name="run", max_steps=4))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row, expected in zip(rows[1:], metrics(whole)[1:], strict=True):
        assert row["rollout/kl"] < 0.01
        assert abs(row["train/entropy"] - expected["train/entropy"]) < 0.2


@pytest.mark.parametrize("phase", ["rollout", "old", "update", "sync"])
def test_a_signal_in_every_phase_ends_with_a_checkpoint(phase: str, toy_model: str, tmp_path: Path):
    """Before the first update the engine sleeps, and is closed so."""
    done = run(
        toy_model, tmp_path, "tests/failing_script.py", f"sigterm_{phase}", run_name="run", max_steps=4, eval_every=0
    )
    well(done)
    assert "SIGTERM: saving a checkpoint and stopping" in done.stderr
    completed = 1 if phase in ("rollout", "old") else 2  # the signal came in step 2
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == completed
    assert (tmp_path / "run" / "checkpoints" / f"step_{completed:06d}" / "policy").is_dir()


def test_the_same_seed_twice(whole: Path, toy_model: str, tmp_path: Path, figure: Callable[..., None]):
    """Told, not asserted: without deterministic algorithms a GPU may add in another order."""
    well(run(toy_model, tmp_path, run_name="run", max_steps=4))
    pairs = list(zip(without_clock(metrics(whole)), without_clock(metrics(tmp_path / "run")), strict=True))
    differ = [row["step"] for row, other in pairs if row != other]
    figure("same seed twice: first step that differs", differ[0] if differ else "none", "")
