"""The policy on one process: what it loads, gives out, takes back and refuses. Several: test_distributed.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import ROWS, make_batch, policy_options, ragged, tiny_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from configs.memory import Size, activations_a_token
from trainer.policy import LogprobModel, Policy
from trainer.preflight import check_processes
from trainer.rollout import read_sums, weight_sum

SEQUENCES = ragged(4, longest=8)
BATCH = make_batch([p for p, _, _ in SEQUENCES], [r for _, r, _ in SEQUENCES])


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="no", cpu=True)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model(tied=request.param).bfloat16().save_pretrained(path)  # the precision models come in
    return str(path)


def sums(policy: Policy, precision: str) -> dict[str, float]:
    return read_sums({name: weight_sum(weight) for name, weight in policy.named_weights(precision)})


def one_update(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    logprobs, _ = policy(BATCH)
    logprobs.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_master_weights_are_float32(folder: str, accelerator: Accelerator):
    for precision in ("float32", "bfloat16"):
        policy = Policy.load(folder, policy_options(precision=precision), accelerator)
        logprobs, entropy = policy(BATCH)
        logprobs.sum().backward()
        assert {p.dtype for p in policy.parameters()} == {torch.float32} == {logprobs.dtype, entropy.dtype}
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())


def test_bfloat16_computes_in_bfloat16(folder: str, accelerator: Accelerator):
    with torch.no_grad():
        exact, _ = Policy.load(folder, policy_options(), accelerator)(BATCH)
        rounded, _ = Policy.load(folder, policy_options(precision="bfloat16"), accelerator)(BATCH)
    gap = (exact - rounded).abs().max().item()
    assert 1e-4 < gap < 0.5  # half the digits are gone, the numbers are not


def test_fsdp2_does_not_copy_a_micro_batch(folder: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch):
    """A cast of its inputs would visit every number in the samples: 70 ms for 16 of 1,200 tokens on a CPU."""
    policy = Policy.load(folder, policy_options(sharding="fsdp2", precision="bfloat16"), accelerator)
    forward, seen = LogprobModel.forward, []
    monkeypatch.setattr(LogprobModel, "forward", lambda model, batch: seen.append(batch) or forward(model, batch))
    logprobs, _ = policy(BATCH)
    assert seen[0] is BATCH and logprobs.dtype == torch.float32


def test_the_same_policy_has_the_same_logprobs_with_and_without_gradient(folder: str, accelerator: Accelerator):
    """What lets the first update use its own forward pass as the old policy's: bit for bit, checkpointing included."""
    policy = Policy.load(folder, policy_options(gradient_checkpointing=True), accelerator)
    with torch.no_grad():
        old, _ = policy(BATCH)
    now, _ = policy(BATCH)
    assert torch.equal(old, now.detach())


def test_named_weights_are_the_model_in_a_fixed_order(folder: str, accelerator: Accelerator):
    policy = Policy.load(folder, policy_options(), accelerator)
    pairs = list(policy.named_weights("float32"))
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names) and names == [name for name, _ in policy.named_weights("float32")]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(names) == set(expected)  # with lm_head.weight, tied or not
    for name, value in pairs:
        assert torch.equal(value, expected[name])


def test_buffers_are_sent_too_and_saved(accelerator: Accelerator, tmp_path: Path):
    """vLLM's reload does not restore a buffer that is not sent. Apertus has two in its activation."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("apertus", vocab_size=ROWS, num_hidden_layers=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    policy = Policy.load(str(tmp_path / "start"), policy_options(), accelerator)
    sent = dict(policy.named_weights("bfloat16"))
    expected = {name: buffer for name, buffer in policy.causal_lm.named_buffers() if "act_fn" in name}
    assert len(expected) == 2 and all(sent[name] is not None and sent[name] == b for name, b in expected.items())
    assert policy.full_weights().keys() >= expected.keys()


def test_only_norms_are_compared_with_tensor_parallelism(accelerator: Accelerator, tmp_path: Path):
    """An engine splits biases, here OPT's. It does not split the norms of decoder layers."""
    config = AutoConfig.for_model(
        "opt", vocab_size=ROWS, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = Policy.load(str(tmp_path), policy_options(), accelerator).compared_names(split=True)
    assert names and all(name.endswith("norm.weight") for name in names)


def test_checksums_see_every_update_and_cover_what_an_engine_keeps(folder: str, accelerator: Accelerator):
    policy = Policy.load(folder, policy_options(), accelerator)
    names = policy.compared_names(split=False)
    assert "model.embed_tokens.weight" in names and "model.norm.weight" in names
    parts = set(names) - set(policy.compared_names(split=True))
    assert {name for name in parts if not name.endswith(".bias")} == {"model.embed_tokens.weight"}
    before = sums(policy, "float32")
    expected = dict(policy.causal_lm.named_parameters())["model.norm.weight"].double().sum().item()
    assert before["model.norm.weight"] == pytest.approx(expected, abs=1e-12)
    one_update(policy, torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0))  # as small as they get
    after = sums(policy, "float32")
    assert all(abs(after[name] - before[name]) > 1e-6 for name in ("model.embed_tokens.weight", "model.norm.weight"))


def test_checksums_are_of_the_precision_of_the_engine(folder: str, accelerator: Accelerator):
    policy = Policy.load(folder, policy_options(), accelerator)
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.fill_(1.001)  # 1.0 in bfloat16
    assert sums(policy, "bfloat16")["model.norm.weight"] == 64.0


def test_a_checksum_covers_every_row_and_holds_a_slice_in_double_precision():
    weight = torch.arange(3 * 4096 + 5, dtype=torch.float32).view(-1, 1)
    assert weight_sum(weight) == len(weight) * (len(weight) - 1) / 2
    # A million ones and then a million times 2^-24: lost in float32, there in double precision.
    assert weight_sum(torch.cat([torch.ones(1 << 20), torch.full((1 << 20,), 2.0**-24)])) == (1 << 20) * (1 + 2.0**-24)


TINY: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, fields, named",
    [
        ("granite", {"logits_scaling": 8.0}, "logits_scaling: 8.0"),
        ("cohere", {}, "logit_scale: 0.0625"),
        ("gemma2", {}, "final_logit_softcapping: 30.0"),
        ("phi", {}, "a bias"),
    ],
)
def test_a_model_that_changes_its_logits_is_refused_by_the_field_that_does(
    accelerator: Accelerator, tmp_path: Path, kind: str, fields: dict, named: str
):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **fields)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"changes its logits after the head \(.*{named}"):
        Policy.load(str(tmp_path), policy_options(), accelerator)


@pytest.mark.parametrize(
    "kind, fields",
    [("granite", {"logits_scaling": 1.0}), ("gemma2", {"final_logit_softcapping": None}), ("llama", {}), ("qwen3", {}),
     ("mistral", {}), ("olmo2", {})],
)  # fmt: skip
def test_a_plain_head_is_computed_as_the_model_computes_it(
    accelerator: Accelerator, tmp_path: Path, kind: str, fields: dict
):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **fields))
    model.save_pretrained(tmp_path)
    policy = Policy.load(str(tmp_path), policy_options(vocab_size=ROWS), accelerator)
    batch = make_batch([[3, 4]], [[5, 6, 7]])
    with torch.no_grad():
        found, _ = policy(batch)
        logits = model.eval()(torch.tensor([[3, 4, 5, 6]])).logits[0, 1:]
    assert torch.allclose(found, logits.log_softmax(-1)[range(3), [5, 6, 7]], atol=1e-5)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dropout_of_the_configuration_is_off(accelerator: Accelerator, tmp_path: Path, checkpointing: bool):
    """Llama and Qwen keep it as a number of the attention module; GPT-NeoX has modules as well."""
    for kind in ("llama", "gpt_neox"):
        fields = {"attention_dropout": 0.5, "hidden_dropout": 0.5} | {k: v for k, v in TINY.items() if "head_" not in k}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).save_pretrained(tmp_path / kind)
        policy = Policy.load(str(tmp_path / kind), policy_options(gradient_checkpointing=checkpointing), accelerator)
        assert torch.equal(policy(BATCH)[0], policy(BATCH)[0])
        logprobs, _ = policy(BATCH)
        calls = []
        layer = next(m for m in policy.causal_lm.modules() if type(m).__name__ in policy.causal_lm._no_split_modules)
        layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        logprobs, _ = policy(BATCH)
        logprobs.sum().backward()
        assert len(calls) == (2 if checkpointing else 1)  # computed again in backward


@pytest.mark.promise("a model file without a weight that the model needs")
def test_a_model_that_lacks_a_weight_is_refused(accelerator: Accelerator, tmp_path: Path):
    model = tiny_model(tied=True)
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as model.layers.1.mlp.up_proj.weight"):
        Policy.load(str(tmp_path), policy_options(), accelerator)


def test_written_weights_load_as_they_are(folder: str, accelerator: Accelerator, tmp_path: Path):
    policy = Policy.load(folder, policy_options(), accelerator)
    one_update(policy, torch.optim.AdamW(policy.parameters(), lr=1e-3))
    policy.write(tmp_path, policy.full_weights())
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    loaded, told = found
    assert not told["missing_keys"] and not told["unexpected_keys"]
    for name, value in policy.causal_lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_optimizer_state_comes_back(folder: str, accelerator: Accelerator, tmp_path: Path):
    policy = Policy.load(folder, policy_options(), accelerator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    one_update(policy, optimizer)
    torch.save(policy.full_optimizer(optimizer), tmp_path / "optimizer.pt")
    policy.write(tmp_path / "policy", policy.full_weights())
    again = Policy.load(str(tmp_path / "policy"), policy_options(), accelerator)
    moments = torch.optim.AdamW(again.parameters(), lr=1e-3)
    again.load_optimizer(tmp_path / "optimizer.pt", moments)
    one_update(policy, optimizer)
    one_update(again, moments)
    for (name, one), (_, other) in zip(policy.named_weights("float32"), again.named_weights("float32"), strict=True):
        assert torch.equal(one, other), name


def test_gradients_are_clipped_to_their_global_norm(folder: str, accelerator: Accelerator):
    policy = Policy.load(folder, policy_options(), accelerator)
    policy(BATCH)[0].sum().backward()
    squares = [p.grad.double().square().sum() for p in policy.parameters() if p.grad is not None]
    before = torch.stack(squares).sum().sqrt().item()
    assert policy.clip_gradients(0.5).item() == pytest.approx(before, rel=1e-5) and before > 0.5
    after = (
        torch.stack([p.grad.double().square().sum() for p in policy.parameters() if p.grad is not None]).sum().sqrt()
    )
    assert after.item() == pytest.approx(0.5, rel=1e-4)


def test_a_frozen_policy_has_no_gradient(folder: str, accelerator: Accelerator):
    reference = Policy.load(folder, policy_options(gradient_checkpointing=True), accelerator, trainable=False)
    logprobs, _ = reference(BATCH)
    assert not logprobs.requires_grad and not any(p.requires_grad for p in reference.parameters())


def test_fsdp2_on_one_process_is_sharded_and_the_same(accelerator: Accelerator, tmp_path: Path):
    tiny_model(tied=True).save_pretrained(tmp_path)
    try:
        policy = Policy.load(str(tmp_path), policy_options(sharding="fsdp2"), accelerator)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        with torch.no_grad():
            sharded, _ = policy(BATCH)
            expected, _ = Policy.load(str(tmp_path), policy_options(), accelerator)(BATCH)
        assert (sharded - expected).abs().max() < 1e-5
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_start_up_tells_the_memory(folder: str, accelerator: Accelerator):
    policy = Policy.load(folder, policy_options(), accelerator)
    count = sum(p.numel() for p in policy.parameters())
    text = policy.text()
    assert f"{count:,} parameters" in text
    assert (
        f"GiB per rank: weights {count * 4 / 2**30:.3g}, gradients " in text
        and f"AdamW {count * 8 / 2**30:.3g}" in text
    )


def test_the_estimate_of_activations_is_near_what_autograd_keeps(accelerator: Accelerator, tmp_path: Path):
    tiny_model(tied=True).save_pretrained(tmp_path)
    policy = Policy.load(str(tmp_path), policy_options(), accelerator)
    weights, kept = {p.data_ptr() for p in policy.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = policy(BATCH)
    estimate = 4 * BATCH.input_ids.numel() * activations_a_token(Size.of(policy.causal_lm.config), checkpointing=False)
    assert 0.5 < sum(kept.values()) / estimate < 2


def test_what_was_asked_for_and_not_obtained_is_refused(
    folder: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RuntimeError, match="sharding: ddp was requested, the model has none on 1 process"):
        Policy.load(folder, policy_options(sharding="ddp"), accelerator)
    check_processes(accelerator)
    with (
        monkeypatch.context() as m,
        pytest.raises(ValueError, match="launcher started 2 processes, Accelerate sees 1"),
    ):
        m.setenv("WORLD_SIZE", "2")
        check_processes(accelerator)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="asks for FSDP; sharding is the key `sharding`"):
        m.setenv("ACCELERATE_USE_FSDP", "true")
        check_processes(accelerator)


# ---- the backward pass ----


def gradients(policy: Policy) -> list[torch.Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in policy.parameters()]
    policy.model.zero_grad()
    return found


def test_backward_gives_the_gradient_of_the_loss(folder: str, accelerator: Accelerator):
    """Bit for bit, whichever of log-probs and entropy the loss depends on."""
    policy = Policy.load(folder, policy_options(), accelerator)
    for loss_of in (lambda lp, h: lp.square().sum(), lambda lp, h: (lp * h).sum(), lambda lp, h: (lp.exp() - h).sum()):
        loss_of(*policy(BATCH)).backward()
        expected = gradients(policy)
        logprobs, entropy = policy(BATCH)
        policy.backward(loss_of(logprobs, entropy), logprobs, entropy, always=False)
        found = gradients(policy)
        assert all(g is not None and e is not None and torch.equal(g, e) for g, e in zip(found, expected, strict=True))


def test_backward_is_skipped_where_every_gradient_is_zero(folder: str, accelerator: Accelerator):
    policy = Policy.load(folder, policy_options(), accelerator)

    def after(weight: float, *, always: bool) -> list[torch.Tensor | None]:
        logprobs, entropy = policy(BATCH)
        policy.backward((weight * logprobs).sum(), logprobs, entropy, always=always)
        return gradients(policy)

    assert all(g is None for g in after(0.0, always=False))
    assert all(g is not None and not g.any() for g in after(0.0, always=True))  # AdamW then updates its moments
    assert all(g is not None for g in after(float("nan"), always=False))  # a NaN is not skipped
    one = torch.zeros(len(BATCH.targets))
    one[-1] = 1e-30
    logprobs, entropy = policy(BATCH)
    policy.backward((one * logprobs).sum(), logprobs, entropy, always=False)
    assert any(g is not None and g.any() for g in gradients(policy))


def test_a_broken_log_prob_is_not_skipped(folder: str, accelerator: Accelerator):
    """A clamp gives NaN the gradient 0, so that alone would let the update pass."""
    policy = Policy.load(folder, policy_options(), accelerator)
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[BATCH.input_ids.flatten()[0]] = float("nan")
    logprobs, entropy = policy(BATCH)
    loss = (logprobs - logprobs.detach()).clamp(-20, 20).sum()
    assert loss.isnan() and not torch.autograd.grad(loss, logprobs, retain_graph=True)[0].isnan().any()
    policy.backward(loss, logprobs, entropy, always=False)
    assert not policy.clip_gradients(1.0).isfinite()


def test_a_generation_config_that_transformers_refuses_to_save_is_kept(
    folder: str, accelerator: Accelerator, tmp_path: Path
):
    strange = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "early_stopping": True, "eos_token_id": [1, 2]}
    start = shutil.copytree(folder, tmp_path / "start")
    (start / "generation_config.json").write_text(json.dumps(strange))
    policy = Policy.load(str(start), policy_options(), accelerator)
    policy.write(tmp_path / "policy", policy.full_weights())
    assert strange.items() <= json.loads((tmp_path / "policy" / "generation_config.json").read_text()).items()
    assert Policy.load(str(tmp_path / "policy"), policy_options(), accelerator).causal_lm.generation_config.top_p == 0.9
