"""Engines inside the real loop: rows beyond the tokenizer, and dynamic sampling."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import metrics, trained_here
from tiny import make_model
from transformers import AutoTokenizer

from trainer.rollout import start_advice

SMALL = ["--eval_every", 0, "--wandb", "disabled", "--prompts_per_step", 16]
ONE = ["--max_steps", 1]


@pytest.fixture
def padded_model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tied=True, spread=0.02)  # nearly uniform


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_rows_beyond_the_tokenizer_are_masked_on_both_sides(padded_model: Path, tmp_path: Path, engine: str):
    """An engine that did not mask them would be off by log(40 / 22), six tenths of a nat, on every token."""
    (tmp_path / "odd.py").write_text("def score(completion, gold):\n    return len(completion) % 2\n")
    keys = ["--model", padded_model, "--output_dir", tmp_path, "--reward", f"{tmp_path / 'odd.py'}:score"]
    keys += [*SMALL, *ONE, "--minibatches", 1, "--epochs", 1]
    trained_here("demo_band", *keys, engine=engine)
    (row,) = metrics(tmp_path / "demo_band")
    assert row["rollout/logprob_diff_max"] < 1e-3
    assert 2.9 < row["train/entropy"] <= torch.log(torch.tensor(22.0)).item() + 1e-6  # of 22 tokens, not of 40


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_stop_text_ends_a_response(toy_model: str, tmp_path: Path, engine: str):
    """It stays in the response as its last token, and the log-probs stay those of their tokens. } is special here."""
    shutil.copytree(toy_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["}"]})
    tokenizer.save_pretrained(tmp_path / "model")
    keys = ["--model", tmp_path / "model", "--output_dir", tmp_path, *SMALL, *ONE, "--temperature", 2]
    keys += ["--stop", "['{5', '}', '7', '8']", "--samples_logged", 16, "--old_policy", "trainer"]
    trained_here("demo_band", *keys, engine=engine)
    (row,) = metrics(tmp_path / "demo_band")
    assert row["rollout/logprob_diff_max"] < 1e-3
    lines = (tmp_path / "demo_band" / "samples" / "step_000001.jsonl").read_text().splitlines()
    texts = ["".join(json.loads(line)["token_texts"]) for line in lines]
    stopped = [text for text in texts if re.search("{5|[}78]", text)]
    assert len(stopped) > 2 and any("}" in text for text in stopped)
    assert all(re.fullmatch(".*?({5|[}78])", text) and not re.search("{5|[}78]", text[:-1]) for text in stopped)


@pytest.mark.slow
def test_dynamic_sampling_goes_by_right_and_wrong_when_rewards_are_shaped(toy_model: str, tmp_path: Path):
    """With a penalty for long answers nearly every group has unequal rewards; one without a right answer has to go."""
    keys = ["--model", toy_model, "--output_dir", tmp_path, *SMALL, *ONE, "--samples_per_prompt", 32]
    keys += ["--minibatches", 2, "--epochs", 1, "--overlong_buffer_tokens", 15, "--temperature", 1.5]
    trained_here("demo_band", *keys, "--run_name", "plain")
    trained_here("demo_band", *keys, "--run_name", "dynamic", "--dynamic_sampling", 8)
    (plain,), (dynamic,) = metrics(tmp_path / "plain"), metrics(tmp_path / "dynamic")
    alike = [row["reward/solved_none"] + row["reward/solved_all"] for row in (plain, dynamic)]
    assert plain["reward/zero_std"] < alike[0] / 2
    assert alike[0] > 0.1 and alike[1] < alike[0] / 2
    # Refills use up the epoch: 16 prompts of 8,192, and those that were drawn in place of others.
    assert plain["train/epoch"] == 16 / 8192 < dynamic["train/epoch"]


@pytest.mark.slow
def test_dynamic_sampling_replaces_groups_without_signal(toy_model: str, tmp_path: Path):
    """The start policy answers nearly always alike, so that most groups are all right or all wrong."""
    keys = ["--model", toy_model, "--output_dir", tmp_path, *SMALL, *ONE, "--samples_per_prompt", 32]
    keys += ["--minibatches", 2, "--epochs", 1]
    trained_here("demo_band", *keys, "--run_name", "plain")
    trained_here("demo_band", *keys, "--run_name", "dynamic", "--dynamic_sampling", 8)
    (plain,), (dynamic,) = metrics(tmp_path / "plain"), metrics(tmp_path / "dynamic")
    assert plain["reward/zero_std"] > 0.5
    assert dynamic["reward/zero_std"] < plain["reward/zero_std"] - 0.2


def test_a_model_that_vllm_cannot_import_names_the_way_out():
    """As vLLM 0.32 says of Qwen3.5 on a machine without torchvision."""
    message = "Value error, Model architectures ['Qwen3_5ForCausalLM'] failed to be inspected. Please check the logs."
    assert "needs a package" in start_advice(message, {}) and "engine: hf" in start_advice(message, {})
    assert start_advice("another error", {}) == ""
