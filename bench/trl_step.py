"""The work of bench/step.py done by TRL's GRPOTrainer, in the environment of `make bench-env`.

    .venv.bench/bin/python bench/trl_step.py --model DIR --steps 5 [--engine hf|vllm] [--ragged]

One step is one rollout of prompts x samples responses and --minibatches optimizer steps (num_iterations 1, beta 0).
Prints one JSON line with medians over the steps after the first. Nothing is downloaded.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
import zlib
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="vllm")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--ragged", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    torch._dynamo.config.disable = True
    rows = [json.loads(line) for line in (Path(options.model) / "problems.jsonl").read_text().splitlines()]
    total, steps = options.prompts * options.samples, options.steps + 1
    on_cpu = not torch.cuda.is_available()
    fixed = {}
    if not options.ragged:
        no_end = {"vllm": {"ignore_eos": True}, "hf": {"min_new_tokens": options.tokens}}
        fixed = {"generation_kwargs": no_end[options.engine]}
    if options.engine == "vllm":
        _fit_vllm_to_the_cpu(options.tokens + 64)

    def reward(completions: list[str], **_: object) -> list[float]:
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    generated: list[tuple[float, float]] = []
    tokens: list[int] = []

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            clock = _now()
            out = super()._generate_single_turn(*args, **kwargs)
            generated.append(_since(clock))
            tokens.append(sum(len(row) for row in out[0]))
            return out

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=on_cpu,
            bf16=not on_cpu,
            gradient_checkpointing=not on_cpu,
            per_device_train_batch_size=total // options.minibatches,
            gradient_accumulation_steps=1,
            steps_per_generation=options.minibatches,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            max_steps=steps * options.minibatches,
            learning_rate=1e-9,  # as ours: the lengths of answers do not change
            lr_scheduler_type="constant",
            beta=0.0,
            num_iterations=1,
            temperature=1.0,
            logging_steps=options.minibatches,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_vllm=options.engine == "vllm",
            vllm_mode="colocate",
            vllm_max_model_length=options.tokens + 64,
            dataloader_pin_memory=not on_cpu,
            shuffle_dataset=False,
            **fixed,
        )
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": row["problem"]} for row in rows[: steps * options.prompts]]),
        )
        marks: list[tuple[float, float]] = []

        class Mark(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % options.minibatches == 0:
                    marks.append(_now())

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Mark())
        marks.append(_now())
        trainer.train()
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(marks, marks[1:], strict=False)][1:]
    result = {
        "step_s": statistics.median(wall for wall, _ in spans),
        "step_cpu_s": statistics.median(cpu for _, cpu in spans),
        "rollout_s": statistics.median(wall for wall, _ in generated[1:]),
        "tokens_per_step": statistics.mean(tokens[1:]),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "optimizer_steps": trainer.state.global_step,
    }
    print(json.dumps(result), flush=True)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(clock: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _now()
    return wall - clock[0], cpu - clock[1]


def _fit_vllm_to_the_cpu(max_tokens: int) -> None:
    """TRL's engine settings fail on vLLM's CPU build: it repacks weights at load, after which TRL's in-place sync
    cannot work."""
    import functools

    import torch
    import trl.generation.vllm_generation as generation  # pyright: ignore[reportMissingImports]
    from vllm import _custom_ops

    extra = {"enforce_eager": True, "max_model_len": max_tokens}
    if not torch.cuda.is_available():
        _custom_ops._supports_onednn = False
        extra |= {"kv_cache_memory_bytes": 256 << 20, "dtype": "float32"}
    original = generation.LLM
    generation.LLM = functools.wraps(original)(lambda **keys: original(**{**keys, **extra}))


if __name__ == "__main__":
    main()
