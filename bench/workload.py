"""A fixed amount of work for the step benchmarks: a random model of a given size, sums as problems.

    folder = make_workload(Path("build/bench/20m"), "20m", 640, 10)    # model, tokenizer, problems.jsonl
    python -m bench.workload --size 3b --out DIR                       # the same from the command line, to keep

Lengths. Fixed: nothing ends an answer before the limit. Ragged: the tokenizer has 24 tokens, a random model samples
them almost evenly, so the one end token makes lengths geometric with mean 24, cut at the limit: a third of it when the
limit is 64.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from configs.memory import Size

SIZES = {  # Qwen2 models; vocabulary counts rows of the head, the tokenizer always has 24 tokens
    "1m": Size(128, 4, 4, 2, 512, 24, tied=True),
    "20m": Size(512, 7, 8, 4, 1376, 24, tied=True),
    "200m": Size(1024, 12, 16, 8, 2816, 32768, tied=True),
    "3b": Size(2048, 36, 16, 2, 11008, 151936, tied=True),  # the shape of Qwen2.5-3B, for a GPU
}
TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", *"0123456789", *"+-=? \n.,:"]


def make_workload(folder: Path, size: str, problems: int, prompt_tokens: int) -> Path:
    """Write a float32 model, its tokenizer (with a chat template) and problems.jsonl; returns the folder.

    A problem has `prompt_tokens` tokens, or ten where that is fewer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    backend: Any = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}<|im_start|>assistant\n"
    )
    shape = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    large = shape.hidden >= 2048  # made on the GPU and stored as such models come
    with torch.device("cuda" if large and torch.cuda.is_available() else "cpu"):
        model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16 if large else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rng = random.Random(0)
    rows = []
    for i in range(problems):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        problem = f"{a}+{b}={i}?".rjust(prompt_tokens, "0")
        rows.append(json.dumps({"id": str(i), "problem": problem, "gold": str(a + b)}))
    (folder / "problems.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.workload", description="Write a workload to a folder.")
    parser.add_argument("--size", required=True, choices=SIZES)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(make_workload(options.out, options.size, options.problems, options.prompt_tokens))


def parameters(folder: Path) -> int:
    """Number of weights of a saved model."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
