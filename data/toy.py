"""Synthetic task of the demo and the tests, and the tiny start model for it.

    python -m data.toy --out runs/toy_model            # tokenizer + warmed-up model, about 20 s on one core
    python -m data.toy --out DIR --task toy_hard ...   # the larger variant for one GPU; or toy_skewed

A prompt is an expression to evaluate from left to right modulo 10, such as `3*7+4-2=`. There are two strategies:

    shortcut   \\boxed{2}           only the last operation: short, low entropy, correct in about 1 of 4 cases
    chain      a1b5c3\\boxed{3}     every intermediate value after a free marker from `abcd`: nearly always correct

The warm-up teaches both strategies and then makes the chain rare (`chain_share`, 0.3 %): its first token has an old
probability far below 1 %. This shows the effect of fixed clipping: the probability of a rare good token can grow by at
most a fifth per update for any reward, while the Band allows large increases. The choice of markers is free. Learning
the chain therefore raises the policy's entropy, and entropy collapse is visible too. Responses are graded like those of
real problems. The tokenizer has `\\boxed{` as one token.

The task measures this mechanism. It requires no language knowledge and measures no reasoning.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from data.problem import Problem

OPERATORS = "+-*"
MARKERS = "abcd"
EOS, PAD, BOX = "<|endoftext|>", "<pad>", "\\boxed{"


@dataclass(frozen=True)
class Task:
    """Variant of the task, with the size and warm-up of its model."""

    operands: int  # numbers in a prompt
    modulus: int  # modulus of every intermediate value
    chain_share: float  # share of chain responses after the warm-up (p0)
    hidden: int
    layers: int
    heads: int  # head size hidden / heads is at least 32, as vLLM's CPU kernels require
    warm_up_batch: int
    warm_up_steps: tuple[int, int]  # steps with half of the responses chains, then at chain_share
    learning_rates: tuple[float, float]
    marker_weights: tuple[float, ...] | None  # frequency of each marker in the warm-up; None: equal
    markers: str | None = None  # interchangeable markers of a step, one token each; None: abcd
    train_rows: int | None = None  # None: as in SPLITS


TASKS = {
    "toy": Task(4, 10, 0.003, 64, 2, 2, 128, (700, 100), (4e-3, 1e-3), None),
    "toy_hard": Task(16, 100, 0.002, 512, 8, 8, 512, (1500, 500), (1e-3, 3e-4), None),  # ~25M parameters, for one GPU
    "toy_rarest": Task(4, 10, 0.0005, 64, 2, 2, 128, (700, 100), (4e-3, 1e-3), None),
    # All markers are equally good and some start rare: losing them over a long run is entropy collapse.
    "toy_skewed": Task(4, 10, 0.02, 64, 2, 2, 128, (700, 100), (4e-3, 1e-3), (0.6, 0.25, 0.1, 0.05)),
    # Runs of seconds: a rare chain, only chains with many markers, a rare chain of five steps.
    "toy_quick": Task(3, 7, 0.005, 64, 1, 2, 128, (600, 100), (4e-3, 1e-3), None, train_rows=1024),
    "toy_words": Task(3, 7, 1.0, 64, 1, 2, 128, (600, 100), (4e-3, 1e-3), None, ascii_lowercase, train_rows=1024),
    "toy_long": Task(6, 7, 0.01, 64, 2, 2, 128, (900, 100), (4e-3, 1e-3), None, train_rows=1024),
}
SPLITS = {"train": (8192, 1), "eval": (128, 2)}  # rows, seed; the splits are disjoint


def _apply(a: int, operator: str, b: int, modulus: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % modulus


def _draw(task: Task, rng: random.Random) -> tuple[list[int], str]:
    return [rng.randrange(task.modulus) for _ in range(task.operands)], "".join(
        rng.choice(OPERATORS) for _ in range(task.operands - 1)
    )


def _prompt(numbers: list[int], operators: str) -> str:
    return str(numbers[0]) + "".join(o + str(n) for o, n in zip(operators, numbers[1:], strict=True)) + "="


def _running(task: Task, numbers: list[int], operators: str) -> list[int]:
    values = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        values.append(_apply(values[-1], operator, number, task.modulus))
    return values[1:]


def shortcut_answer(task: Task, numbers: list[int], operators: str) -> str:
    """Return the shortcut response: the last operation only."""
    return f"{BOX}{_apply(numbers[-2], operators[-1], numbers[-1], task.modulus)}}}"


def chain_answer(task: Task, numbers: list[int], operators: str, rng: random.Random) -> str:
    """Return the chain response: every intermediate value after a random marker, then the answer."""
    values = _running(task, numbers, operators)
    weights, known = task.marker_weights, task.markers or MARKERS
    markers = [rng.choices(known, weights)[0] if weights else rng.choice(known) for _ in values]
    return "".join(marker + str(v) for marker, v in zip(markers, values, strict=True)) + f"{BOX}{values[-1]}}}"


@cache
def toy_problems(name: str) -> tuple[Problem, ...]:
    """Generate the problems of a set, such as toy_train or toy_hard_eval; always the same rows.

    Raises ValueError for an unknown name.
    """
    task_name, _, split = name.rpartition("_")
    if task_name not in TASKS or split not in SPLITS:
        known = ", ".join(f"{t}_{s}" for t in TASKS for s in SPLITS)
        raise ValueError(f"{name!r} is not a generated set; these are: {known}")
    task, (rows, seed) = TASKS[task_name], SPLITS[split]
    rows = task.train_rows or rows if split == "train" else rows
    rng, problems, prompts = random.Random(f"{task_name} {seed}"), [], set()
    while len(problems) < rows:
        numbers, operators = _draw(task, rng)
        prompt = _prompt(numbers, operators)
        # The split is a function of the prompt, so the splits are disjoint.
        if prompt in prompts or (random.Random(prompt).random() < 0.1) != (split == "eval"):
            continue
        prompts.add(prompt)
        gold = str(_running(task, numbers, operators)[-1])
        problems.append(Problem(id=f"{name}/{len(problems)}", problem=prompt, gold=gold, source=name, level=None))
    return tuple(problems)


def make_tokenizer(markers: str = MARKERS):
    """Build a tokenizer with one token per character and one for `\\boxed{`; 22 tokens with four markers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [PAD, EOS, *"0123456789", *OPERATORS, "=", *markers, BOX, "}"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(task: Task, tokenizer, seed: int):
    """Build a randomly initialized float32 Qwen2 model with a tied head."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=task.hidden,
        intermediate_size=2 * task.hidden,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.heads,
        max_position_embeddings=512,
        initializer_range=0.05,  # at this width, the usual 0.02 learns the task several times slower
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config).float()


def warm_up(task: Task, *, seed: int, device: str):
    """Train a new model on both strategies, and make the chain rare at the end. Returns (model, tokenizer)."""
    import torch
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread does not speed up such small operations
    tokenizer = make_tokenizer(task.markers or MARKERS)
    model: Any = make_model(task, tokenizer, seed)
    model = model.to(device).train()
    rng = random.Random(seed)
    steps = sum(task.warm_up_steps)
    bar = tqdm(total=steps, desc="warm-up", unit="step", dynamic_ncols=True, disable=None)
    for phase, share in enumerate((max(0.5, task.chain_share), task.chain_share)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rates[phase], weight_decay=0.0)
        total = task.warm_up_steps[phase]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s, n=total: min(1.0, (s + 1) / 50) * 0.5 * (1 + math.cos(math.pi * s / n))
        )
        for _ in range(total):
            input_ids, labels = _warm_up_batch(task, tokenizer, rng, share)
            loss = model(input_ids=input_ids.to(device), labels=labels.to(device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
    bar.close()
    torch.set_num_threads(threads)
    return model.eval(), tokenizer


def _warm_up_batch(task: Task, tokenizer, rng: random.Random, chain_share: float):
    """Sample a batch: (N, L) right-padded input ids, and labels that are -100 outside the response."""
    import torch

    texts = []
    for _ in range(task.warm_up_batch):
        numbers, operators = _draw(task, rng)
        chain = rng.random() < chain_share
        answer = chain_answer(task, numbers, operators, rng) if chain else shortcut_answer(task, numbers, operators)
        texts.append((_prompt(numbers, operators), answer + EOS))
    encoded = tokenizer.backend_tokenizer.encode_batch([text for pair in texts for text in pair])  # as plain lists
    prompts, answers = ([e.ids for e in encoded[k::2]] for k in (0, 1))
    widths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    padding = [max(widths) - width for width in widths]
    rows = list(zip(prompts, answers, padding, strict=True))
    input_ids = torch.tensor([p + a + [tokenizer.pad_token_id] * n for p, a, n in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * n for p, a, n in rows])
    return input_ids, labels


def save_start(out: Path, task_name: str, *, seed: int, device: str) -> None:
    """Write the warmed-up model and tokenizer to `out` in Hugging Face format, unless they exist."""
    settings = {k: str(v) for k, v in vars(TASKS[task_name]).items() if v is not None}
    stamp = {"task": task_name, "seed": seed, **settings}
    mark = out / "toy.json"
    if mark.exists() and json.loads(mark.read_text()) == stamp:
        print(f"{out.name}: already there")
        return
    start = time.perf_counter()
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    model, tokenizer = warm_up(TASKS[task_name], seed=seed, device=device)
    model.cpu().save_pretrained(out)
    tokenizer.save_pretrained(out)
    mark.write_text(json.dumps(stamp))  # written last: a folder without it is incomplete
    size = sum(p.numel() for p in model.parameters())
    print(f"{out.name}: {size:,} parameters, warmed up in {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tokenizer and the warmed-up model of the synthetic task.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--task", choices=sorted(TASKS), default="toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    save_start(arguments.out, arguments.task, seed=arguments.seed, device=arguments.device)


if __name__ == "__main__":
    main()
