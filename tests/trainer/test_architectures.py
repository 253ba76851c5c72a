"""Causal language models of transformers, tiny and random: log-probs and gradients of batches as of single sequences.

`attention: auto` chooses the layout. docs/quickstart.md lists what is found here.
"""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from launching import ROOT
from tiny import make_batch, policy_options
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trainer.attention import set_attention
from trainer.policy import LogprobModel, check_head

ROWS = 64
PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 10, 11, 12]]
RESPONSES = [[3, 4, 5, 6, 7, 8, 9, 10], [20, 21], [30, 31, 32, 33, 34]]
SMALL: dict[str, Any] = {
    **{"vocab_size": ROWS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    **{"hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "lru_width": 64},
    **{"intermediate_size": 96, "ffn_dim": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "sliding_window": 5, "initializer_range": 0.2},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_state": 8},
    **{"mamba_n_groups": 1, "n_groups": 1, "mamba_expand": 1, "mamba_d_ssm": 64, "ssm_state_size": 8, "state_size": 8},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
}
LINEAR, CONVOLUTION = (
    {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": ["conv", "full_attention"]},
)
OPTIONS = policy_options(vocab_size=ROWS)
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "minimax", "olmo_hybrid"), LINEAR),
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONVOLUTION),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), LATENT),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}
PACKED = (
    "apertus arcee deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma3_text glm glm4 glm4_moe gpt2 gpt_neox "
    "granite helium hunyuan_v1_dense llama mistral mixtral olmo2 olmo3 olmoe opt phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 starcoder2"
).split()
PADDED = (
    "bamba bloom falcon falcon_h1 gpt_oss granitemoehybrid jamba lfm2 lfm2_moe mamba mamba2 minimax nemotron "
    "nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next stablelm zamba2"
).split()
REFUSED = "cohere cohere2 gemma2 phi recurrent_gemma".split()


def tiny(kind: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    with_defaults = CONFIG_MAPPING[kind]()
    plain = {k: v for k, v in SMALL.items() if hasattr(with_defaults, k) and not is_property(CONFIG_MAPPING[kind], k)}
    config = CONFIG_MAPPING[kind](**{**plain, **OWN.get(kind, {})})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


def is_property(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), property)


def logprobs_and_gradients(
    causal_lm: Any, layout: str, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    causal_lm.zero_grad()
    logprobs, entropy = LogprobModel(causal_lm, OPTIONS)(make_batch(prompts, responses, layout=layout))
    (logprobs + 0.1 * entropy).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in causal_lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_a_batch_has_the_log_probs_and_gradients_of_its_sequences(kind: str):
    causal_lm = tiny(kind)
    check_head(causal_lm, kind)
    alone = [logprobs_and_gradients(causal_lm, "padded", [p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    layout = set_attention(causal_lm, "auto", "float32")
    assert layout == ("by_sequence" if kind in PACKED else "padded")
    logprobs, gradients = logprobs_and_gradients(causal_lm, layout, PROMPTS, RESPONSES)
    torch.testing.assert_close(logprobs, torch.cat([each for each, _ in alone]), rtol=0, atol=1e-4)
    for name, found in gradients.items():
        expected = torch.stack([of_one[name] for _, of_one in alone if name in of_one]).sum(0)
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_with_a_bias_scale_or_cap_is_refused(kind: str):
    with pytest.raises(ValueError, match=f"model: {kind} changes its logits after the head"):
        check_head(tiny(kind), kind)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "nemotron_h"])
def test_flash_attention_is_refused_where_packed_sequences_mix(kind: str):
    for attention in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(ValueError, match=f"attention: {attention} packs sequences.*use auto, sdpa or eager"):
            set_attention(tiny(kind), attention, "bfloat16")


def test_a_kernel_that_a_model_lacks_is_refused():
    for kind in ("bloom", "gpt_oss"):
        with pytest.raises(ValueError, match="attention: this model does not support sdpa; use auto"):
            set_attention(tiny(kind), "sdpa", "float32")


def test_flash_attention_is_chosen_for_bfloat16_only(monkeypatch: pytest.MonkeyPatch):
    """As if a GPU and flash attention were there; setting the kernel needs the real ones."""
    used: list[str] = []
    model = tiny("llama")
    own = type(model).set_attn_implementation

    def record(self: Any, kernel: str) -> None:
        used.append(kernel)
        if kernel == "flash_attention_2":
            self.config._attn_implementation_internal = kernel
        else:
            own(self, kernel)

    monkeypatch.setattr(type(model), "set_attn_implementation", record)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: True)
    assert set_attention(model, "auto", "float32") == "by_sequence" and used[-1] == "sdpa_by_sequence"
    assert set_attention(model, "auto", "bfloat16") == "packed" and used[-1] == "flash_attention_2"
    assert set_attention(model, "sdpa", "bfloat16") == "padded" and used[-1] == "sdpa"


def test_the_page_lists_what_is_tried():
    text = (ROOT / "docs" / "quickstart.md").read_text()
    for layout, kinds in (("packed", PACKED), ("padded", PADDED), ("refused", REFUSED)):
        item = re.search(rf"^- {layout}:.*\n(?:  .*\n)*", text, re.MULTILINE)
        assert item and re.findall(r"`(\w+)`", item[0]) == kinds
