"""The workload of bench/step.py with TRL's GRPOTrainer and vLLM, in the environment of `make bench-env`.

    .venv.bench/bin/python bench/trl_step.py --model DIR --steps 5 [--ragged]

One step is one rollout of prompts x samples responses and --minibatches optimizer steps (num_iterations 1, beta 0).
Prints one JSON line with medians over the steps after the first. Nothing is downloaded.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import tempfile
import time
import zlib
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import trl.generation.vllm_generation as generation  # pyright: ignore[reportMissingImports]
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from vllm import _custom_ops


class Clock(TrainerCallback):
    """Record (wall-clock, CPU) seconds after every `per_step` optimizer steps."""

    def __init__(self, per_step: int):
        self.per_step = per_step
        self.marks = [(time.perf_counter(), time.process_time())]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.per_step == 0:
            self.marks.append((time.perf_counter(), time.process_time()))


def reward(completions: list[str], **_: object) -> list[float]:
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def fit_vllm_to_the_cpu(max_tokens: int) -> None:
    """Patch TRL's engine settings, which fail on vLLM's CPU build.

    The CPU build repacks weights at load, and then TRL's in-place weight sync fails.
    """
    _custom_ops._supports_onednn = False
    extra = {"enforce_eager": True, "max_model_len": max_tokens, "kv_cache_memory_bytes": 256 << 20, "dtype": "float32"}
    original = generation.LLM
    generation.LLM = functools.wraps(original)(lambda **keys: original(**{**keys, **extra}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name, default in {"steps": 5, "prompts": 16, "samples": 8, "tokens": 64, "minibatches": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ragged", action="store_true")
    options = parser.parse_args()
    torch._dynamo.config.disable = True
    rows = [json.loads(line) for line in (Path(options.model) / "problems.jsonl").read_text().splitlines()]
    steps = options.steps + 1
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        fit_vllm_to_the_cpu(options.tokens + 64)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=on_cpu,
            bf16=not on_cpu,
            gradient_checkpointing=not on_cpu,
            per_device_train_batch_size=options.prompts * options.samples // options.minibatches,
            gradient_accumulation_steps=1,
            steps_per_generation=options.minibatches,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            max_steps=steps * options.minibatches,
            learning_rate=1e-9,  # as in bench/step.py: the lengths of responses do not change
            lr_scheduler_type="constant",
            beta=0.0,
            num_iterations=1,
            temperature=1.0,
            logging_steps=options.minibatches,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=options.tokens + 64,
            generation_kwargs={"ignore_eos": not options.ragged},
            dataloader_pin_memory=not on_cpu,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": row["problem"]} for row in rows[: steps * options.prompts]]),
        )
        clock = Clock(options.minibatches)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(clock.marks, clock.marks[1:], strict=False)][1:]
    result = {
        "step_s": statistics.median(wall for wall, _ in spans),
        "step_cpu_s": statistics.median(cpu for _, cpu in spans),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
