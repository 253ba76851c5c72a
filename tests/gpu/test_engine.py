"""vLLM as a GPU runs it: tests/engine_script.py in a process each, with which an engine's memory ends."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT
from tiny import make_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from data.toy import make_tokenizer


def ask(device: str, models: list[Path], *more: str) -> dict[str, Any]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    line = [sys.executable, "tests/engine_script.py", *models, "--device", device, "--dtype", dtype, *more]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        list(map(str, line)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.split("RESULT ")[1])


def check(found: dict[str, Any]) -> None:
    """In bfloat16 a log-prob is rounded, and a sample may turn out another way in another batch, rarely."""
    assert found["largest_id"] < 22
    assert found["gap_before"] < 0.15 and found["gap_after_sync"] < 0.15 < found["gap_to_old_weights"]
    assert sum(found["same_in_another_batch"]) >= 5 and found["different_seeds_differ"]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(found["compared"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_sampling_and_new_weights(device: str, tied: bool, mode: str, tmp_path: Path, figure: Callable[..., None]):
    models = [make_model(tmp_path / str(seed), tied=tied, seed=seed) for seed in (0, 1)]
    started = time.perf_counter()
    found = ask(device, models, *(["--graphs"] if mode == "graphs" else []))
    figure(f"engine of a toy model, {mode}: start to end", time.perf_counter() - started, "s")
    figure("engine against transformers, largest gap", found["gap_before"], "nats")
    check(found)
    if device != "cpu":
        assert found["runner"] == "vllm.v1.worker.gpu.model_runner"  # the second


def test_memory_comes_and_goes(device: str, tmp_path: Path, figure: Callable[..., None]):
    """Three times asleep and awake, then closed while asleep: the script's exit code says that this ends well."""
    models = [make_model(tmp_path / str(seed), tied=True, seed=seed) for seed in (0, 1)]
    found = ask(device, models, "--cycles", "3")
    check(found)
    if device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        for awake, asleep in found["in_use_gib"]:
            figure("in use awake and asleep", f"{awake:.2f}, {asleep:.2f}", "GiB")
            assert awake - asleep > found["memory_share"] / 2 * total
        asleep = [used for _, used in found["in_use_gib"]]
        assert abs(asleep[2] - asleep[0]) < 0.2


def test_a_tied_embedding_as_large_as_qwen3b_s(device: str, full_size: bool, tmp_path: Path):
    """1.2 GB in float32: the weight that once filled a bucket of its own and left the tied head without it."""
    rows, hidden = (151_936, 2048) if full_size else (1_024, 64)
    models = []
    for seed in (0, 1):
        config = Qwen2Config(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=hidden // 128 or 2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(tmp_path / str(seed))
        make_tokenizer().save_pretrained(tmp_path / str(seed))
        models.append(tmp_path / str(seed))
    found = ask(device, models)
    assert found["gap_before"] < 0.5 and found["gap_after_sync"] < 0.5 < found["gap_to_old_weights"]
