"""A tiny random Qwen2 with grouped-query attention, and ragged sequences for it: what several tests cut and compare."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from data import Problem
from data.toy import make_tokenizer
from rewards import Grade
from trainer.attention import model_inputs
from trainer.policy import PolicyOptions
from trainer.rollout import Completion
from trainer.types import MicroBatch, Sample

VOCABULARY = 48  # tokens; the head has rows beyond them, as Qwen2.5's has
ROWS = 64


def tiny_model(*, tied: bool) -> Qwen2ForCausalLM:
    """Random weights, large enough that probabilities are far from uniform; the same on every call."""
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attention_dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).float()


def ragged(count: int, *, longest: int) -> list[tuple[list[int], list[int], float]]:
    """(prompt, response, advantage) of `count` sequences of very different lengths, one token at least."""
    draw = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(n)]

    return [(tokens(draw.randint(1, 7)), tokens(draw.randint(1, longest)), draw.gauss(0, 1)) for _ in range(count)]


def make_model(folder: Path, *, tied: bool, seed: int = 0, spread: float = 0.2) -> Path:
    """A random model whose head has 18 rows more than its tokenizer has tokens, as Qwen2.5's has 271."""
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=spread,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_sample(prompt: list[int], response: list[int], **changed: object) -> Sample:
    """A sample with these token ids; rollout log-probs are -1."""
    completion = Completion(response, [-1.0] * len(response), "stop", "")
    problem, grade = Problem("set/0", "1 + 1 =", "2", "set", None), Grade(False, None, "mismatch")
    fields: dict[str, object] = {"reward": 0.0, "step": 0, "index": 0, "advantage": 1.0, **changed}
    return Sample(problem, prompt, completion, grade, **fields)  # type: ignore[arg-type]


def policy_options(**changed: object) -> PolicyOptions:
    """Options of a policy with the tiny model, in float32 on one process."""
    fields: dict[str, object] = {
        **{"sharding": "none", "precision": "float32", "attention": "sdpa", "gradient_checkpointing": False},
        **{"temperature": 1.0, "vocab_size": VOCABULARY, "chunk_tokens": 16, "trust_remote_code": False},
    }
    return PolicyOptions(**{**fields, **changed})  # type: ignore[arg-type]


def make_batch(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], *, layout: str = "padded", device: str = "cpu"
) -> MicroBatch:
    """The model inputs of these sequences; advantages and weights are 1."""
    lengths = torch.tensor([len(response) for response in responses], device=device)
    ones = torch.ones(int(lengths.sum()), device=device)
    return MicroBatch(
        samples=[make_sample(p, r) for p, r in zip(prompts, responses, strict=True)],
        sequence_ids=torch.repeat_interleave(lengths),
        rollout_logprobs=-ones,
        advantages=ones,
        loss_weights=ones,
        **model_inputs(prompts, responses, layout=layout, device=torch.device(device)),
    )
