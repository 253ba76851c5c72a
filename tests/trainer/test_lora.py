"""LoRA: which weights move, what the engine and a checkpoint get, the reference, and a resumed run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launching import metrics, trained_here, without_clock
from peft import PeftModel
from safetensors.torch import load_file
from tiny import ROWS, make_batch, policy_options, ragged, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from configs import load
from configs.memory import GIB, Size, estimate
from configs.schema import Config
from trainer.lora import Lora, StartModel
from trainer.policy import Policy

SEQUENCES = ragged(4, longest=8)
BATCH = make_batch([p for p, _, _ in SEQUENCES], [r for _, r, _ in SEQUENCES])


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="no", cpu=True)


def lora(**changed: Any) -> Lora:
    return Lora(**{"rank": 4, "alpha": 8.0, "targets": "all-linear", "seed": 0, "folder": None, **changed})


def adapted(start: Path, accelerator: Accelerator, sharding: str, updates: int = 2) -> Policy:
    """A policy with adapters after some updates with a large learning rate."""
    policy = Policy.load(str(start), policy_options(sharding=sharding, lora=lora()), accelerator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    for _ in range(updates):
        policy(BATCH)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_engine_and_the_checkpoint_get_merged_weights(sharding: str, accelerator: Accelerator, tmp_path: Path):
    start = tmp_path / "start"
    tiny_model(tied=True).save_pretrained(start)
    before = load_file(start / "model.safetensors")
    policy = adapted(start, accelerator, sharding)
    policy.write(tmp_path / "policy", policy.full_weights())
    after = load_file(tmp_path / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        change = weight - before[name]
        if "_proj.weight" in name:
            assert torch.linalg.matrix_rank(change, atol=1e-5) == 4, name
        else:
            assert not change.any(), name
    for name, weight in policy.named_weights("float32"):
        assert torch.allclose(weight, after.get(name, after["model.embed_tokens.weight"]), atol=1e-6), name
    with torch.no_grad():
        ours, _ = policy(BATCH)
        merged, _ = Policy.load(str(tmp_path / "policy"), policy_options(), accelerator)(BATCH)
        first, _ = Policy.load(str(start), policy_options(), accelerator)(BATCH)
        with StartModel(policy).on_device():
            reference, _ = policy(BATCH)
    assert torch.allclose(ours, merged, atol=1e-4)
    assert torch.allclose(reference, first, atol=1e-6) and (ours - first).abs().max() > 0.1
    assert torch.equal(policy(BATCH)[0].detach(), ours)  # the adapters are on again


def test_the_adapters_load_in_peft(accelerator: Accelerator, tmp_path: Path):
    start = tmp_path / "start"
    tiny_model(tied=False).save_pretrained(start)
    policy = adapted(start, accelerator, "none")
    policy.write(tmp_path / "policy", policy.full_weights())
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path / "adapter")
    expected = load_file(tmp_path / "policy" / "model.safetensors")
    for name, weight in loaded.merge_and_unload().state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
    again = policy_options(lora=lora(folder=tmp_path / "adapter"))
    resumed = Policy.load(str(start), again, accelerator)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), policy.parameters(), strict=True))


def test_only_the_adapters_are_trained(accelerator: Accelerator, tmp_path: Path):
    tiny_model(tied=True).save_pretrained(tmp_path)
    policy = Policy.load(str(tmp_path), policy_options(lora=lora(targets=["q_proj", "v_proj"])), accelerator)
    names = [name for name, p in policy.causal_lm.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name and ("q_proj" in name or "v_proj" in name) for name in names)
    assert len(policy.parameters()) == len(names)


def test_a_model_with_transposed_weights_is_merged(accelerator: Accelerator, tmp_path: Path):
    """GPT-2 stores (in, out): an adapter added the wrong way round would fit its square layers unnoticed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=ROWS, n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    policy = adapted(tmp_path / "start", accelerator, "none")
    policy.write(tmp_path / "policy", policy.full_weights())
    merged = Policy.load(str(tmp_path / "policy"), policy_options(), accelerator)
    with torch.no_grad():
        assert torch.allclose(policy(BATCH)[0], merged(BATCH)[0], atol=1e-4)


@pytest.mark.parametrize("targets", ["w_proj", "embed_tokens", "lm_head"])
def test_a_layer_that_is_not_linear_is_refused(accelerator: Accelerator, tmp_path: Path, targets: str):
    tiny_model(tied=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^lora_targets: .*{targets}"):
        Policy.load(str(tmp_path), policy_options(lora=lora(targets=targets)), accelerator)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(toy_model: str, tmp_path: Path):
    """With a reference policy: its log-probs come from the model without adapters."""
    words = f"--model {toy_model} --lora_rank 4 --lr 1e-2 --kl_coef 0.1 --epochs 2 --wandb disabled --eval_every 0 "
    words += f"--verifier_workers 1 --prompts_per_step 8 --samples_per_prompt 4 --minibatches 2 --output_dir {tmp_path}"
    trained_here("demo_band.yaml", *words.split(), "--run_name", "whole", "--max_steps", 3, "--save_every", 0)
    for steps in (1, 3):
        trained_here("demo_band.yaml", *words.split(), "--run_name", "parts", "--max_steps", steps)
    rows = metrics(tmp_path / "whole")
    assert without_clock(metrics(tmp_path / "parts")) == without_clock(rows)
    assert all(row["rollout/kl"] < 1e-6 for row in rows)  # the engine sampled from the merged weights
    assert rows[0]["kl/reference"] < rows[-1]["kl/reference"]


def test_memory_of_3b_with_adapters():
    """float32 weights, and per adapter weight, gradient and two moments: 16 bytes for each of 30 million."""
    size = Size(2048, 36, 16, 2, 11008, 151_936, tied=True)
    cfg = load(Config, ["--lora_rank", "16", "--kl_coef", "0"])
    adapters = 36 * 16 * (9 * 2048 + 2 * 256 + 3 * 11008)
    assert size.adapter_parameters(16) == adapters == 29_933_568
    assert estimate(cfg, size, 1).states * GIB == pytest.approx(4 * size.parameters + 8 * adapters)
