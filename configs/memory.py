"""Lower estimate of the memory per rank, to detect runs that cannot fit.

Terms are bytes per rank. n: processes. P: parameters. H: hidden size. V: vocabulary rows. L: layers. F: feed-forward
size. K: kv heads x head size. m: `micro_batch_tokens`. c: LOGPROB_CHUNK_TOKENS.

    weights, Adam    4 P + 8 T, float32, divided by n under fsdp2; T: trained, P or the adapters of LoRA
    gradients        4 T (/ n), and under ddp 4 T for the buckets
    gathered         bfloat16. fsdp2: two layers and embedding + head, their gradients too; else 2 P of casts
    activations      2 m H L at the layer boundaries, and 2 m (12 H + 2 K + 4 F) inside one layer, recomputed in
                     backward; without gradient_checkpointing inside every layer
    logits           8 c V for a chunk in float32 and its softmax, and 8 V H for the head and its gradient
    UPDATE           the sum of these
    ROLLOUT          weights, Adam, the sync (the largest weight, gathered and copied into the engine's layout) and the
                     engine: engine_memory_share of the card
    engine           at least 2 P / tensor_parallel, and the KV cache of 16 whole sequences, 4 K L per token

The card is the smallest of CARDS_GIB that fits UPDATE and ROLLOUT, each plus OVERHEAD_GIB, and whose share fits the
engine. With `precision: float32`, 2 bytes become 4. Not counted: fragmentation, memory of the attention kernel, host
memory.
"""

from dataclasses import dataclass
from typing import Any

from configs.schema import Config

GIB = 2**30
CARDS_GIB = (24, 40, 48, 80, 141)
OVERHEAD_GIB = 3.0  # CUDA context, NCCL and a sleeping engine; a guess
LOGPROB_CHUNK_TOKENS = 1024  # response tokens per chunk of logits
DDP_PARAMETERS = 1e9  # largest model for ddp: weights, gradients and AdamW take 16 GB per process
CPU_CACHE_SLACK = 2**24  # bytes; vLLM reserves one block
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of the number of experts in config.json
ENGINE_SEQUENCES = 16  # smallest useful number of concurrent sequences


@dataclass(frozen=True)
class Size:
    """Dimensions of a model, from its config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int  # rows of the embedding
    tied: bool
    head: int | None = None  # size of an attention head; None: hidden / heads
    experts: int = 0  # per layer; 0: no mixture of experts

    @classmethod
    def of(cls, model_config: Any) -> "Size":
        """Create a Size from a transformers config."""
        config = model_config.get_text_config()
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,  # GPT-2, BLOOM: no such key
            config.vocab_size,
            bool(model_config.tie_word_embeddings),
            getattr(config, "head_dim", None),
            max(getattr(config, name, None) or 0 for name in EXPERTS),
        )

    @property
    def kv(self) -> int:
        return (self.head or self.hidden // self.heads) * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.feed_forward + 2 * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Return the number of LoRA parameters of this rank on every linear layer except the head."""
        return self.layers * rank * (9 * self.hidden + 2 * self.kv + 3 * self.feed_forward)

    @property
    def outer_parameters(self) -> int:
        """Number of parameters of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outer_parameters


_QWEN_7B = Size(3584, 28, 28, 4, 18944, 152_064, tied=False)
_LLAMA_8B = Size(4096, 32, 32, 8, 14336, 128_256, tied=False)
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": Size(896, 24, 14, 2, 4864, 151_936, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": Size(2048, 36, 16, 2, 11008, 151_936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Size(1536, 28, 12, 2, 8960, 151_936, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_8B,
}


@dataclass(frozen=True)
class Memory:
    """Estimates in GiB per rank; the module docstring has the formulas."""

    states: float  # weights and Adam
    update: float
    beside_engine: float  # ROLLOUT without the engine
    engine_least: float
    card: int | None  # None: none of CARDS_GIB


def activations_a_token(size: Size, checkpointing: bool) -> int:
    """Return the numbers per token that autograd stores for the backward pass of a micro-batch."""
    inside = 12 * size.hidden + 2 * size.kv + 4 * size.feed_forward  # inside one layer
    return size.hidden * size.layers + inside if checkpointing else inside * size.layers


def cache_a_token(size: Size, bytes_per_number: int) -> int:
    """Return the bytes per token in the engine's KV cache."""
    return 2 * size.layers * size.kv * bytes_per_number


def sharding_of(cfg: Config, size: Size, processes: int) -> str:
    """Resolve `auto`: return none, ddp or fsdp2."""
    if cfg.sharding != "auto":
        return cfg.sharding
    return "none" if processes == 1 else "ddp" if size.parameters <= DDP_PARAMETERS else "fsdp2"


def cpu_cache_bytes(cfg: Config, size: Size, sequences: int) -> int:
    """Return the bytes of vLLM's KV cache on a CPU: `sequences` sequences of half the maximum length.

    At least one whole sequence and 256 MiB. At most 4 GiB, unless one sequence needs more.
    """
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    a_sequence = whole * cache_a_token(size, 2 if cfg.precision == "bfloat16" else 4)
    return max(a_sequence + CPU_CACHE_SLACK, min(sequences * a_sequence // 2, 4 * GIB), 2**28)


def estimate(cfg: Config, size: Size, processes: int) -> Memory:
    """Estimate the memory per rank of `cfg` on `processes` GPUs, by the formulas of the module docstring."""
    sharding = sharding_of(cfg, size, processes)
    sharded = sharding == "fsdp2"
    n = processes if sharded else 1
    compute = 4 if cfg.precision == "float32" else 2  # bytes per number in forward and backward
    p, h, m = size.parameters, size.hidden, cfg.micro_batch_tokens
    trained = size.adapter_parameters(cfg.lora_rank) if cfg.lora_rank else p
    states = (4 * p + 8 * trained) / n
    gradients = 4 * trained / n + (4 * trained if sharding == "ddp" else 0)
    if sharded:
        gathered = 2 * compute * (2 * size.layer_parameters + size.outer_parameters)
    else:
        gathered = 2 * p if compute == 2 else 0
    activations = compute * m * activations_a_token(size, cfg.gradient_checkpointing)
    logits = 8 * LOGPROB_CHUNK_TOKENS * size.vocabulary + 8 * size.vocabulary * h
    update = states + gradients + gathered + activations + logits
    beside = states + 3 * compute * size.vocabulary * h
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    engine = (compute * p + ENGINE_SEQUENCES * whole * cache_a_token(size, compute)) / cfg.tensor_parallel

    def holds(card: int) -> bool:
        share, free = cfg.engine_memory_share * card * GIB, (card - OVERHEAD_GIB) * GIB
        return update <= free and beside + share <= free and engine <= share

    card = next((card for card in CARDS_GIB if holds(card)), None)
    return Memory(states / GIB, update / GIB, beside / GIB, engine / GIB, card)


def memory_text(cfg: Config, size: Size, processes: int) -> str:
    """Format the estimate."""
    memory = estimate(cfg, size, processes)
    card = f"a card of {memory.card} GiB" if memory.card else f"none of {', '.join(map(str, CARDS_GIB))} GiB"
    return (
        f"memory:  a rank holds about {memory.states:.1f} GiB of weights and AdamW, {memory.update:.1f} in an update, "
        f"{memory.beside_engine:.1f} next to its engine; smallest card: {card}"
    )
