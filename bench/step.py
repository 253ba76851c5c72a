"""Time training steps by phase on a fixed synthetic workload; with --trl, compare with TRL's GRPOTrainer.

    python -m bench.step --size 20m --prompts 16 --samples 8 --tokens 64 --minibatches 4 --steps 5 [--ragged]
    OMP_NUM_THREADS=1 taskset -c 0 python -m bench.step ...          # one core, for comparisons
    make bench-env && python -m bench.step --size 1m --trl 3         # three pairs of runs, ours and TRL's

Runs the training loop (trainer.start, train.train_step) with engine and verifier, on a random model and sums as
problems. Prints medians over the steps after the first: seconds per phase and per call of engine and model, the share
outside both, tokens per second, share of real tokens, peak memory and model TFLOP/s. TFLOP/s count 2 FLOPs per weight
and token in the old-policy pass and 6 in an update, without recomputation and attention. The last line is JSON.

Responses have the maximum length. With --ragged, the end token, one of 24 tokens, ends them: geometric lengths with
mean 24. Responses of a random model are all incorrect, so the reward is a hash of the text. The learning rate is too
small to change the lengths of responses.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.memory import Size

ROOT = Path(__file__).resolve().parent.parent
TRL_PYTHON = ROOT / ".venv.bench" / "bin" / "python"
REWARD = "import zlib\n\n\ndef score(completion, gold):\n    return zlib.crc32(completion.encode()) / 2**32\n"
PHASES = ("rollout", "advantage", "batch", "old", "update", "sync")
INSIDE = ("generate", "forward", "backward")  # engine and model
CALLS = (*INSIDE, "sleep", "wake", "sync_weights")
SIZES = {  # Qwen2 models; vocabulary counts rows of the head, the tokenizer always has 24 tokens
    "1m": Size(128, 4, 4, 2, 512, 24, tied=True),
    "20m": Size(512, 7, 8, 4, 1376, 24, tied=True),
    "135m": Size(576, 30, 9, 3, 1536, 49152, tied=True),  # the shape of SmolLM2-135M
    "200m": Size(1024, 12, 16, 8, 2816, 32768, tied=True),
    "3b": Size(2048, 36, 16, 2, 11008, 151936, tied=True),  # the shape of Qwen2.5-3B, for a GPU
}
TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", *"0123456789", *"+-=? \n.,:"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="20m", choices=SIZES)
    parser.add_argument("--model", type=Path, help="folder that keeps the model of --size; made if it does not exist")
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="response tokens at most")
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--ragged", action="store_true", help="let the end token end responses")
    parser.add_argument("--prompt_tokens", type=int, default=10, help="about; longer problems are padded with digits")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="any key of the configuration")
    parser.add_argument("--trl", type=int, default=0, metavar="PAIRS", help="compare with TRL, PAIRS runs each")
    options = parser.parse_args(argv)
    if options.trl and (options.engine, options.prompt_tokens) != ("vllm", 10):
        parser.error("--trl: supports only vLLM and prompts of 10 tokens; remove --engine and --prompt_tokens")
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or Path(folder) / "model"
        if not options.model.exists():
            make_model(options.model, SIZES[options.size])
        write_problems(options.model, options.prompts * (options.steps + 1), options.prompt_tokens)
        if options.trl:
            print(beside_trl(options))
            return
        result = measure(options, Path(folder))
    print("\n".join(f"{name:<20}{value:14,.4g}" for name, value in result.items()))
    print(json.dumps(result))


# ---- workload ----


def make_model(folder: Path, size: Size) -> None:
    """Write a randomly initialized model and a tokenizer with a chat template."""
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
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    large = size.hidden >= 2048  # initialized on the GPU and stored as bfloat16, like published models
    with torch.device("cuda" if large and torch.cuda.is_available() else "cpu"):
        model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16 if large else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_problems(folder: Path, count: int, prompt_tokens: int) -> None:
    """Write problems.jsonl with sums, padded to at least `prompt_tokens` tokens."""
    rng, rows = random.Random(0), []
    for i in range(count):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        problem = f"{a}+{b}={i}?".rjust(prompt_tokens, "0")
        rows.append(json.dumps({"id": str(i), "problem": problem, "gold": str(a + b)}) + "\n")
    (folder / "problems.jsonl").write_text("".join(rows))


# ---- our steps ----


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return medians over the measured steps. Patches functions of the trainer for the rest of this process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import train
    from configs import load
    from configs.schema import Config, Plan
    from trainer import start
    from trainer.clock import Clock

    (folder / "reward.py").write_text(REWARD)
    cfg = load(Config, arguments(options, folder))
    spent: dict[str, float] = dict.fromkeys(CALLS, 0.0)
    rows: list[dict[str, float]] = []
    positions: list[int] = []  # input positions of each micro-batch of a step
    load_task, make_minibatches = start.load_task, train.make_minibatches

    def with_own_ends(*given: Any) -> Any:
        """Keep only the EOS token, as in TRL's run (chat templates have a second end token), or no end token."""
        task = load_task(*given)
        return dataclasses.replace(task, stop_token_ids=(task.tokenizer.eos_token_id,) if options.ragged else ())

    def counted(*given: Any) -> Any:
        minibatches = make_minibatches(*given)
        positions[:] = [batch.input_ids.numel() for minibatch in minibatches for batch in minibatch]
        return minibatches

    start.load_task, train.make_minibatches = with_own_ends, counted
    with start.start(cfg, Plan(cfg), lambda line: None, Clock()) as run:
        for name in ("generate", "sleep", "wake", "sync_weights"):
            setattr(run.engine, name, timed(getattr(run.engine, name), spent, name))
        run.policy.model.forward = timed(run.policy.model.forward, spent, "forward")
        run.policy.backward = timed(run.policy.backward, spent, "backward")
        for _ in range(options.steps + 1):
            spent.update(dict.fromkeys(spent, 0.0))
            cpu = time.process_time()
            metrics = train.train_step(run)
            outside = 1 - sum(spent[name] for name in INSIDE) / metrics["time/step_s"]
            rows.append(metrics | spent | {"cpu_s": time.process_time() - cpu, "outside": outside})
        weights = sum(parameter.numel() for parameter in run.policy.model.parameters())

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows[1:])

    tflop = 2 * weights * sum(positions) / 1e12  # one forward pass over the step's sequences
    tokens = median("response/length_mean") * options.prompts * options.samples
    has_old_pass = cfg.old_policy == "trainer" and cfg.updates_per_step > 1
    return {
        "parameters": weights,
        **{f"{phase}_s": median(f"time/{phase}_s") for phase in PHASES},
        **{f"{call}_s": median(call) for call in CALLS},
        "step_s": median("time/step_s"),
        "step_cpu_s": median("cpu_s"),
        "outside_share": median("outside"),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / median("time/step_s"),
        "real_token_share": median("throughput/real_token_share"),
        "peak_gib": max(row["memory/peak_gib"] for row in rows),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "logprob_diff_max": max(row["rollout/logprob_diff_max"] for row in rows),
        "old_tflops": tflop / median("time/old_s") if has_old_pass else 0.0,
        "update_tflops": 3 * tflop / median("time/update_s"),
    }


def arguments(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of train.py."""
    keys = {
        "model": options.model,
        "train_data": options.model / "problems.jsonl",
        "output_dir": folder,
        "run_name": "bench",
        "wandb": "disabled",
        "engine": options.engine,
        "prompt_template": "plain",
        "chat_template": False,
        "max_prompt_tokens": options.prompt_tokens + 16,
        "max_response_tokens": options.tokens,
        "prompts_per_step": options.prompts,
        "samples_per_prompt": options.samples,
        "minibatches": options.minibatches,
        "max_steps": 1,
        "eval_every": 0,
        "kl_coef": 0,
        "lr": 1e-9,
        "gradient_checkpointing": torch.cuda.is_available(),
        "reward": f"{folder / 'reward.py'}:score",
        "verifier_workers": 1,
        **dict(pair.split("=", 1) for pair in options.set),
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """Wrap `function` to add its seconds to spent[name]. On a GPU, the wrapper synchronizes."""

    def wrapped(*args: Any, **keys: Any) -> Any:
        started = time.perf_counter()
        out = function(*args, **keys)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - started
        return out

    return wrapped


# ---- comparison with TRL ----


def beside_trl(options: argparse.Namespace) -> str:
    """Compare CPU seconds per step with TRL in pairs of runs, each in a separate process, without start-up.

    Runs each `old_policy`: trainer recomputes old log-probs like the paper, rollout uses the engine's.
    """
    if not TRL_PYTHON.exists():
        raise SystemExit("TRL's environment is missing: make bench-env")
    shared = ["--model", str(options.model), *(["--ragged"] if options.ragged else [])]
    for name in ("steps", "prompts", "samples", "tokens", "minibatches"):
        shared += [f"--{name}", str(getattr(options, name))]
    commands = {"TRL": [str(TRL_PYTHON), "bench/trl_step.py", *shared]}
    for old_policy in ("rollout", "trainer"):
        keys = [f"old_policy={old_policy}", *options.set]
        commands[old_policy] = [sys.executable, "-m", "bench.step", *shared, "--set", *keys]
    runs = [{name: execute(command) for name, command in commands.items()} for _ in range(options.trl)]
    lines = []
    for name in commands:
        ratios = [pair[name]["step_cpu_s"] / pair["TRL"]["step_cpu_s"] for pair in runs]
        seconds, peak = (statistics.median(pair[name][key] for pair in runs) for key in ("step_cpu_s", "peak_rss_gib"))
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
        lines.append(f"{name:<8} CPU s per step {seconds:.3f}, over TRL {ratio}, peak {peak:.2f} GiB")
    return "\n".join(lines)


def execute(command: list[str]) -> dict[str, float]:
    """Run a command and return its last JSON line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


if __name__ == "__main__":
    main(sys.argv[1:])
