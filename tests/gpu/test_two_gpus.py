"""What takes two GPUs: NCCL, external_launcher engines, tensor parallelism, resuming with another number of ranks."""

from pathlib import Path

import pytest
import torch
from launching import GPU_KEYS, launch, metrics, well

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def run(processes: int, model: str, out: Path, **keys: object) -> list[dict]:
    given = {"config": "demo_band", "model": model, "output_dir": out, "run_name": "run", **GPU_KEYS, **keys}
    words = [w for k, v in given.items() for w in (f"--{k}", str(v))]
    well(launch(processes, "train.py", *words, timeout_s=400, ACCELERATE_USE_CPU="false"))
    return metrics(out / "run")


@pytest.mark.parametrize("keys", [{"sharding": "fsdp2"}, {"sharding": "ddp"}, {"tensor_parallel": 2}], ids=str)
def test_two_ranks_train_and_agree_with_their_engines(keys: dict, toy_model: str, tmp_path: Path):
    for row in run(2, toy_model, tmp_path, max_steps=2, **keys)[1:]:
        assert row["rollout/kl"] < 0.01 and row["optim/grad_norm"] > 0


def test_two_ranks_go_on_as_one_and_one_as_two(toy_model: str, tmp_path: Path):
    run(2, toy_model, tmp_path, max_steps=1)
    run(1, toy_model, tmp_path, max_steps=2)
    rows = run(2, toy_model, tmp_path, max_steps=3)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(row["rollout/kl"] < 0.01 for row in rows[1:])
