"""Times whole training steps by phase on a fixed synthetic workload; with --trl, beside TRL's GRPOTrainer.

    python -m bench.step --size 20m --prompts 16 --samples 8 --tokens 64 --minibatches 4 --steps 5 [--ragged]
    OMP_NUM_THREADS=1 taskset -c 0 python -m bench.step ...          # one core, for comparisons
    make bench-env && python -m bench.step --size 1m --trl 3         # three pairs of runs, ours and TRL's

The real loop runs (trainer.start, train.train_step) with the real engine and verifier. Values are medians over the
steps after the first. Prints seconds and share of each phase, the share outside engine and model, tokens per second,
share of real tokens, peak memory, and model FLOPs per second (2 per weight and token in the old-policy pass, 6 in an
update; recomputation and attention not counted).

A random model's responses are all incorrect, so the reward is a hash of the text. The learning rate is too small to
change the lengths of responses.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.workload import make_workload, parameters

ROOT = Path(__file__).resolve().parent.parent
TRL_PYTHON = ROOT / ".venv.bench" / "bin" / "python"
REWARD = "import zlib\n\n\ndef score(completion, gold):\n    return zlib.crc32(completion.encode()) / 2**32\n"
PHASES = ("rollout", "advantage", "batch", "old", "update", "sync")
INSIDE = ("generate", "forward", "backward")  # engine and model
CALLS = (*INSIDE, "sleep", "wake", "sync_weights")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="20m", help="a name of bench.workload.SIZES")
    parser.add_argument("--model", type=Path, help="a folder made by bench.workload, instead of --size")
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="response tokens at most")
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--ragged", action="store_true", help="let the end token end responses")
    parser.add_argument("--prompt_tokens", type=int, default=10, help="about; longer problems are padded with digits")
    parser.add_argument("--synthetic", type=int, default=0, help="no engine: random responses of this mean length")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="any key of the configuration")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    parser.add_argument("--trl", type=int, default=0, metavar="PAIRS", help="compare with TRL, PAIRS runs each")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            problems = max(options.prompts * (options.steps + 1), 64)
            options.model = make_workload(Path(folder) / "model", options.size, problems, options.prompt_tokens)
        if options.trl:
            print(beside_trl(options))
            return
        result = measure(options, Path(folder))
    print(json.dumps(result) if options.json else table(result))


# ---- our steps ----


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Medians over steps."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from configs import load
    from configs.schema import Config, Plan
    from train import train_step
    from trainer import start
    from trainer.clock import Clock

    (folder / "reward.py").write_text(REWARD)
    cfg = load(Config, arguments(options, folder))
    spent: dict[str, float] = dict.fromkeys(CALLS, 0.0)
    rows: list[dict[str, float]] = []
    with instrumented(options) as positions:
        with start.start(cfg, Plan(cfg), lambda line: None, Clock()) as run:
            time_calls(run, spent)
            for _ in range(options.steps + 1):
                spent.update(dict.fromkeys(spent, 0.0))
                positions.clear()
                cpu = time.process_time()
                metrics = train_step(run)
                inside = sum(spent[name] for name in INSIDE)
                rows.append(metrics | spent | {"cpu_s": time.process_time() - cpu, "inside_s": inside})
    has_old_pass = cfg.old_policy == "trainer" and cfg.updates_per_step > 1
    return summary(options, rows[1:], sum(positions), has_old_pass=has_old_pass)


def arguments(options: argparse.Namespace, folder: Path) -> list[str]:
    """Command line of the configuration."""
    import torch

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
        **({"max_rollout_kl": 1e9} if options.synthetic else {}),
        **dict(pair.split("=", 1) for pair in options.set),
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


@contextmanager
def instrumented(options: argparse.Namespace) -> Iterator[list[int]]:
    """Patch the loop's entry points; yields the positions of each micro-batch of a step."""

    import train
    from trainer import start

    positions: list[int] = []
    load_task, make_engine, make_minibatches = start.load_task, start.make_engine, train.make_minibatches

    def loaded(*given: Any) -> Any:
        """One end token of 24, as in TRL's run; chat templates have a second one."""
        task = load_task(*given)
        return dataclasses.replace(task, stop_token_ids=(task.tokenizer.eos_token_id,) if options.ragged else ())

    def counted(*given: Any) -> Any:
        minibatches = make_minibatches(*given)
        positions.extend(batch.input_ids.numel() for minibatch in minibatches for batch in minibatch)
        return minibatches

    start.load_task, train.make_minibatches = loaded, counted
    if options.synthetic:
        start.make_engine = lambda _, given, **keys: SyntheticEngine(options.synthetic, given.dtype)
    try:
        yield positions
    finally:
        start.load_task, start.make_engine, train.make_minibatches = load_task, make_engine, make_minibatches


def time_calls(run: Any, spent: dict[str, float]) -> None:
    for name in ("generate", "sleep", "wake", "sync_weights"):
        setattr(run.engine, name, timed(getattr(run.engine, name), spent, name))
    run.policy.model.forward = timed(run.policy.model.forward, spent, "forward")
    run.policy.backward = timed(run.policy.backward, spent, "backward")


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """`function`, adding its seconds to spent[name]; on a GPU it waits until the work is done."""
    import torch

    def wrapped(*args: Any, **keys: Any) -> Any:
        started = time.perf_counter()
        out = function(*args, **keys)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - started
        return out

    return wrapped


def summary(
    options: argparse.Namespace, rows: list[dict[str, float]], positions: int, *, has_old_pass: bool
) -> dict[str, float]:
    """Medians over the measured steps. positions: of one step's micro-batches."""

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    length = statistics.mean(row["response/length_mean"] for row in rows)
    result = {"parameters": float(parameters(options.model))}
    result |= {f"{phase}_s": median(f"time/{phase}_s") for phase in PHASES}
    result |= {f"{part}_s": median(part) for part in CALLS}
    tflop = 2 * result["parameters"] * positions / 1e12  # of one forward pass over the step's sequences
    return result | {
        "step_s": median("time/step_s"),
        "step_cpu_s": median("cpu_s"),
        "outside_share": statistics.median(1 - row["inside_s"] / row["time/step_s"] for row in rows),
        "tokens_per_step": length * options.prompts * options.samples,
        "length_mean": length,
        "real_token_share": median("throughput/real_token_share"),
        "peak_gib": max(row["memory/peak_gib"] for row in rows),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "logprob_diff_max": max(row["rollout/logprob_diff_max"] for row in rows),
        "old_tflops": tflop / result["old_s"] if has_old_pass else 0.0,
        "update_tflops": 3 * tflop / result["update_s"],
    }


class SyntheticEngine:
    """An engine that samples nothing: random tokens, geometric lengths with a given mean, cut at the limit."""

    def __init__(self, mean: int, dtype: str):
        self.mean, self.dtype, self.norms = mean, dtype, {}

    def generate(self, prompts: list[list[int]], sampling: Any, *, seeds: list[list[int]], on_finish: Any, **_: Any):
        from trainer.rollout import Completion

        responses: list[list[Completion]] = [[] for _ in prompts]
        for i, row in enumerate(seeds):
            for j, seed in enumerate(row):
                rng = random.Random(seed)
                length = min(sampling.max_tokens, 1 + int(rng.expovariate(1 / self.mean)))
                tokens = [rng.randrange(5, 24) for _ in range(length)]
                responses[i].append(Completion(tokens, [-3.0] * length, "stop", str(seed)))
                on_finish(i, j, responses[i][j])
        return responses

    def sync_weights(self, weights: Any) -> None:
        import torch

        from trainer.rollout import weight_sum

        dtype = getattr(torch, self.dtype)
        self.norms = {name: weight_sum(tensor.to(dtype)) for name, tensor in weights if tensor.dim() == 1}

    def checksum(self, names: list[str]) -> dict[str, float]:
        return {name: self.norms[name] for name in names if name in self.norms}

    def sleep(self) -> None:
        pass

    wake = close = sleep


def table(result: dict[str, float]) -> str:
    """The result as text."""
    whole = result["step_s"]
    parts = {phase: result[f"{phase}_s"] for phase in PHASES}
    parts["metrics"] = whole - sum(parts.values())
    engine = ", ".join(f"{part} {result[f'{part}_s']:.3f} s" for part in ("sleep", "wake", "sync_weights"))
    return "\n".join(
        [
            f"{result['parameters'] / 1e6:.1f}M parameters, {result['tokens_per_step']:,.0f} response tokens per step, "
            f"mean length {result['length_mean']:.1f}",
            *(f"  {name:<10}{seconds:8.3f} s {seconds / whole:6.1%}" for name, seconds in parts.items()),
            f"  {'step':<10}{whole:8.3f} s, {result['tokens_per_step'] / whole:,.0f} tokens/s",
            f"outside engine and model {result['outside_share']:.1%} of a step; real tokens "
            f"{result['real_token_share']:.1%} of positions; peak memory {result['peak_gib']:.2f} GiB",
            f"engine: {engine}",
            f"model TFLOP/s: old {result['old_tflops']:.3g}, update {result['update_tflops']:.3g}",
        ]
    )


# ---- beside TRL ----


def beside_trl(options: argparse.Namespace) -> str:
    """CPU seconds per step of ours over TRL's, pair by pair, each run a process of its own; start-up is not counted.

    Ours runs with each `old_policy`: trainer recomputes old log-probs as the paper does, rollout takes the engine's.
    """
    if not TRL_PYTHON.exists():
        raise SystemExit("TRL's environment is missing: make bench-env")
    shared = ["--model", str(options.model), *(["--ragged"] if options.ragged else [])]
    for name in ("engine", "steps", "prompts", "samples", "tokens", "minibatches"):
        shared += [f"--{name}", str(getattr(options, name))]
    commands = {"TRL": [str(TRL_PYTHON), "bench/trl_step.py", *shared]}
    for old_policy in ("rollout", "trainer"):
        keys = [f"old_policy={old_policy}", *options.set]
        commands[old_policy] = [sys.executable, "-m", "bench.step", "--json", *shared, "--set", *keys]
    runs = [{name: execute(command) for name, command in commands.items()} for _ in range(options.trl)]
    lines = []
    for name in commands:
        ratios = [pair[name]["step_cpu_s"] / pair["TRL"]["step_cpu_s"] for pair in runs]
        seconds, peak = (statistics.median(pair[name][key] for pair in runs) for key in ("step_cpu_s", "peak_rss_gib"))
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
        lines.append(f"{name:<8} CPU s per step {seconds:.3f}, over TRL {ratio}, peak {peak:.2f} GiB")
    return "\n".join(lines)


def execute(command: list[str]) -> dict[str, float]:
    """The JSON line that a run prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


if __name__ == "__main__":
    main(sys.argv[1:])
