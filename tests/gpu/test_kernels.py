"""What needs no engine: log-probs, attention, sharding on one rank, the reference's memory."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launching import ROOT
from tiny import make_batch, policy_options, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

from bandpo.logprobs import token_logprobs
from trainer.attention import register_attention
from trainer.policy import LogprobModel, Policy

register_attention()

OPTIONS = policy_options(precision="bfloat16", attention="auto", chunk_tokens=256)


def test_logprobs_against_float64(device: str, full_size: bool, figure: Callable[..., None]):
    """At the width and vocabulary of Qwen2.5-3B in bfloat16; the reference has the same rounded factors."""
    rows, hidden_size = (151_936, 2048) if full_size else (4_000, 64)
    torch.manual_seed(0)
    hidden = torch.randn(128, hidden_size, device=device).bfloat16().requires_grad_()
    head = (torch.randn(rows, hidden_size, device=device) * 3 / hidden_size**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, rows - 200, (128,), device=device)
    settings = {"temperature": 0.9, "vocab_size": rows - 200, "chunk_tokens": 50}
    logprobs, entropy = token_logprobs(hidden, head, targets, **settings)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, head))

    exact_hidden, exact_head = (t.detach().double().requires_grad_() for t in (hidden, head))
    logits = exact_hidden @ exact_head[: rows - 200].T / 0.9
    all_logprobs = logits.log_softmax(-1)
    expected = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    exact_gradients = torch.autograd.grad(expected.sum(), (exact_hidden, exact_head))
    rounded = (hidden @ head[: rows - 200].T).float().div(0.9).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    error, of_rounded = ((x.double() - expected).abs().max().item() for x in (logprobs, rounded))
    figure("log-prob error, products kept in float32", error, "nats")
    figure("log-prob error, products rounded to bfloat16", of_rounded, "nats")
    assert error < (1e-3 if "cuda" in device else 0.2)  # a CPU rounds
    exact_entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    assert (entropy.double() - exact_entropy).abs().max() < (5e-3 if "cuda" in device else 0.2)
    for found, exact in zip(gradients, exact_gradients, strict=True):
        assert (found.double() - exact).norm() < 0.02 * exact.norm()


def test_attention_by_sequence_needs_flash_alone(device: str, full_size: bool, figure: Callable[..., None]):
    """Forward and backward of a layer as wide as Qwen2.5-3B's at 5,120 positions; a mask of (L, L) would be refused."""
    on_gpu = "cuda" in device
    length = 5_120 if full_size else 64
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=2048 if full_size else 64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=16 if full_size else 2,
        num_key_value_heads=2 if full_size else 1,
        max_position_embeddings=8192,
    )
    causal_lm = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa_by_sequence")
    causal_lm.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    prompts, answers = [[1] * (length // 5)] * 4, [[2 + i % 40] * (length * 4 // 5 - i) for i in range(4)]
    batch = make_batch(prompts, answers, layout="by_sequence", device=device)
    model = LogprobModel(causal_lm, OPTIONS)
    kernels = [SDPBackend.FLASH_ATTENTION] if on_gpu else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with sdpa_kernel(kernels):
        logprobs, _ = model(batch)
        logprobs.sum().backward()
    assert torch.isfinite(logprobs).all()
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        figure("by-sequence attention, 4 x 5,120 positions, one layer: peak", peak, "GiB")
        assert peak < 6
    with torch.no_grad():  # the same numbers from the plain layout
        plain = copy.deepcopy(causal_lm)
        plain.set_attn_implementation("sdpa")
        padded = make_batch(prompts, answers, device=device)
        expected, _ = LogprobModel(plain, OPTIONS)(padded)
    assert (logprobs - expected).abs().mean() < 0.02


def test_fsdp2_on_one_rank_has_the_gradient_of_none(device: str, tmp_path: Path):
    """Through NCCL on a GPU; in float32, for three aggregations and three budgets."""
    tiny_model(tied=True).save_pretrained(tmp_path / "tied")
    for sharding in ("none", "fsdp2"):
        line = [sys.executable, "tests/gradient_script.py", tmp_path, sharding, tmp_path / "tied"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        subprocess.run(list(map(str, line)), cwd=ROOT, env=environment, check=True, timeout=300)
    one, other = (torch.load(tmp_path / f"tied_{sharding}_1.pt", map_location="cpu") for sharding in ("none", "fsdp2"))
    assert one.keys() == other.keys() and len(one) == 12
    for setting, gradients in one.items():
        largest = max(value.abs().max() for name, value in gradients.items() if name.endswith("weight"))
        for name in gradients.keys() - {"counts", "spared"}:
            assert (other[setting][name] - gradients[name]).abs().max() < 1e-4 * largest, f"{setting}: {name}"


def test_a_reference_that_waits_leaves_the_card(device: str, tmp_path: Path):
    tiny_model(tied=True).save_pretrained(tmp_path)
    accelerator = Accelerator(cpu=device == "cpu")
    reference = Policy.load(str(tmp_path), OPTIONS, accelerator, trainable=False)
    batch = make_batch([[1, 2]], [[3, 4, 5]], layout=reference.layout, device=str(accelerator.device))
    found = []
    for _ in range(2):
        with torch.no_grad(), reference.on_device():
            found.append(reference(batch)[0])
            used = torch.cuda.memory_allocated() if device != "cpu" else 1
        left = torch.cuda.memory_allocated() if device != "cpu" else 0
        assert left < used
    assert torch.equal(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cudnn_attention_is_off():
    """On Hopper torch would take it first, and plan it anew for every shape."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
