"""Times whole training steps by phase on a fixed synthetic workload.

    python -m bench.step --size 20m --prompts 16 --samples 8 --tokens 64 --updates 4 --steps 5 [--ragged]
    OMP_NUM_THREADS=1 taskset -c 0 python -m bench.step ...          # one core, for comparisons
    python -m bench.gpu                                              # what a GPU has to show

The real loop runs (trainer.start, train.train_step) with the real engine and verifier; medians over the steps after the
first, which warms up. Prints a table: seconds and share of each phase, what is neither the engine nor the model's
forward and backward, tokens per second, share of real tokens, peak memory, and model FLOPs per second (2 per weight and
token computed in the old-log-prob pass, 6 in an update; recomputation and attention not counted).

    python -m bench.step --size 1m --steps 20 --versus clip=dcpo --versus rule=sapo   # settings in turn, step by step

Rewards: the answers of a random model are all wrong, so a hash of the text is used as reward, as varied as real ones;
in a share `--no_signal` of the groups all answers get the same one. The learning rate is too small to change the
lengths of answers.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REWARD = """
import zlib

def score(completion, gold, problem):
    number = int(problem["id"].rpartition("/")[2])
    return 1.0 if number * 61 % 100 < 100 * {no_signal} else zlib.crc32(completion.encode()) / 2**32
"""
PHASES = ("rollout", "advantage", "batch", "old", "update", "sync")


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", default="20m", help="a name of bench.workload.SIZES")
    parser.add_argument("--model", type=Path, help="a folder made by bench.workload, instead of --size")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="response tokens at most")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--ragged", action="store_true", help="let the end token end answers")
    parser.add_argument("--prompt_tokens", type=int, default=10, help="about; longer problems are padded with digits")
    parser.add_argument("--no_signal", type=float, default=0.0, help="share of groups that get one reward")
    parser.add_argument("--made_up", type=int, default=0, help="no engine: random answers of this mean length")
    parser.add_argument(
        "--versus", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="keys of another setting, in turn"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="any key of the configuration")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    parser.add_argument("--append", type=Path, help="a file that gets the same JSON line as well")
    options = parser.parse_args()
    result = measure(options)
    result["wall_s"] = time.perf_counter() - started
    print(json.dumps(result) if options.json else table(result, options.versus))
    if options.append:
        with options.append.open("a") as file:
            file.write(json.dumps(result) + "\n")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Medians over steps."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    import train
    from bench.workload import make_workload, parameters
    from configs import load
    from configs.schema import Config, Plan
    from eval.compare import paired_interval
    from trainer import start as lifecycle
    from trainer.clock import Clock
    from trainer.preflight import find_rule
    from trainer.task import Task

    with tempfile.TemporaryDirectory() as folder:
        problems = max(options.prompts * (options.steps + 1), 64)
        model = options.model or make_workload(Path(folder) / "model", options.size, problems, options.prompt_tokens)
        reward = Path(folder) / "reward.py"
        reward.write_text(REWARD.format(no_signal=options.no_signal))
        keys = {
            "model": model,
            "train_data": model / "problems.jsonl",
            "output_dir": folder,
            "run_name": "bench",
            "wandb": "disabled",
            "prompt_template": "plain",
            "chat_template": False,
            "max_prompt_tokens": options.prompt_tokens + 16,
            "max_response_tokens": options.tokens,
            "prompts_per_step": options.prompts,
            "samples_per_prompt": options.samples,
            "updates_per_step": options.updates,
            "max_steps": 1,
            "micro_batch_tokens": 16384,
            "engine_max_sequences": min(1024, options.prompts * options.samples),
            "eval_every": 0,
            "kl_coef": 0,
            "lr": 1e-9,
            "sharding": "fsdp2" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "none",
            "gradient_checkpointing": torch.cuda.is_available(),
            "reward": f"{reward}:score",
            "verifier_workers": 1,
            **({"mismatch_limit": 1e9} if options.made_up else {}),
            **dict(pair.split("=", 1) for pair in options.set),
        }
        changes = [dict(pair.split("=", 1) for pair in pairs) for pairs in ([], *options.versus)]
        settings = [load(Config, [w for k, v in (keys | own).items() for w in (f"--{k}", str(v))]) for own in changes]
        cfg = settings[0]
        plan = Plan(cfg)
        # One end token of 24, as TRL takes it; chat templates have a second one.
        load_task = lifecycle.load_task

        def loaded(*given: Any) -> Task:
            task = load_task(*given)
            return dataclasses.replace(task, stop_token_ids=(task.tokenizer.eos_token_id,) if options.ragged else ())

        lifecycle.load_task = loaded
        if options.made_up:
            lifecycle.make_engine = lambda _, given, **keys: MadeUp(options.made_up, given.dtype)
        rows: list[dict[str, float]] = []
        computed: list[int] = []  # positions of each micro-batch of a step
        collate = train.collate

        def counted(*args: Any) -> Any:
            minibatches = collate(*args)
            computed.extend(t.batch.input_ids.numel() for minibatch in minibatches for t in minibatch)
            return minibatches

        train.collate = counted
        inside = ("generate", "forward", "backward")
        spent: dict[str, float] = dict.fromkeys((*inside, "sleep", "wake", "sync_weights"), 0.0)
        with lifecycle.start(cfg, plan, lambda line: None, Clock()) as run:
            for name in ("generate", "sleep", "wake", "sync_weights"):
                setattr(run.engine, name, timed(getattr(run.engine, name), spent, name))
            run.policy.model.forward = timed(run.policy.model.forward, spent, "forward")
            torch.Tensor.backward = timed(torch.Tensor.backward, spent, "backward")
            for number in [*range(len(settings)), *in_turn(len(settings), options.steps)]:
                run.cfg = settings[number]
                run.rule = find_rule(run.cfg)
                spent.update(dict.fromkeys(spent, 0.0))
                computed.clear()
                cpu = time.process_time()
                metrics = train.train_step(run)
                parts = {f"{name}_s": spent[name] for name in ("sleep", "wake", "sync_weights")}
                outer = {"cpu_s": time.process_time() - cpu, "inside_s": sum(spent[name] for name in inside)}
                rows.append(metrics | parts | outer | {"setting": number})
        rows = rows[len(settings) :]
        measured = [row for row in rows if row["setting"] == 0]

        def median(key: str) -> float:
            return statistics.median(row[key] for row in measured)

        length = statistics.mean(row["response/length_mean"] for row in measured)
        result = {"parameters": float(parameters(model))}
        result |= {f"{phase}_s": median(f"time/{phase}_s") for phase in PHASES}
        result |= {f"{part}_s": median(f"{part}_s") for part in ("sleep", "wake", "sync_weights")}
        result |= {
            "step_s": median("time/step_s"),
            "step_cpu_s": median("cpu_s"),
            "outside_share": statistics.median(1 - row["inside_s"] / row["time/step_s"] for row in measured),
            "tokens_per_step": length * options.prompts * options.samples,
            "length_mean": length,
            "real_token_share": median("throughput/real_token_share"),
            "peak_gib": max(row["memory/peak_gib"] for row in rows),
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "mismatch_max": max(row["mismatch/max"] for row in rows),
        }
        for number in range(1, len(settings)):
            pairs = [pair for pair in zip(rows[::2], rows[1::2], strict=True) if number in (r["setting"] for r in pair)]
            times = [{row["setting"]: row["cpu_s"] for row in pair} for pair in pairs]
            ratios = [time[number] / time[0] for time in times]
            result[f"versus_{number}"] = statistics.median(ratios)
            result[f"versus_{number}_low"], result[f"versus_{number}_high"] = paired_interval(ratios, 0.95)
        tflop = 2 * result["parameters"] * sum(computed) / 1e12  # of one forward pass over the step's sequences
        anchored = tflop * (1 - 1 / options.updates) if cfg.old_policy == "trainer" else 0.0
        result["old_tflops"] = anchored / result["old_s"] if anchored else 0.0
        result["update_tflops"] = 3 * tflop / result["optimize_s"]
        return result


def in_turn(settings: int, steps: int) -> list[int]:
    """Which setting each step has: the first alone, or beside each of the others, `steps` pairs each, either first."""
    if settings == 1:
        return [0] * steps
    pairs = [(0, other) for other in range(1, settings)]
    return [number for k in range(steps) for pair in pairs for number in (pair if k % 2 else pair[::-1])]


class MadeUp:
    """An engine that samples nothing: random tokens, lengths geometric with a given mean, cut at the limit."""

    def __init__(self, mean: int, dtype: str):
        self.mean, self.dtype, self.norms = mean, dtype, {}

    def generate(self, prompts: list[list[int]], sampling: Any, *, seeds: list[list[int]], on_finish: Any, **_: Any):
        from trainer.rollout import Completion

        answers: list[list[Completion]] = [[] for _ in prompts]
        for i, row in enumerate(seeds):
            for j, seed in enumerate(row):
                rng = random.Random(seed)
                length = min(sampling.max_tokens, 1 + int(rng.expovariate(1 / self.mean)))
                tokens = [rng.randrange(5, 24) for _ in range(length)]
                answers[i].append(Completion(tokens, [-3.0] * length, "stop", str(seed)))
                on_finish(i, j, answers[i][j])
        return answers

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


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """`function`, adding its seconds to spent[name]; the GPU's work is waited for."""
    import torch

    def wrapped(*args: Any, **keys: Any) -> Any:
        started = time.perf_counter()
        out = function(*args, **keys)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - started
        return out

    return wrapped


def table(result: dict[str, float], versus: Sequence[Sequence[str]]) -> str:
    """The result for people."""
    lines = [f"{result['parameters'] / 1e6:.1f}M parameters, {result['tokens_per_step']:,.0f} response tokens a step, "]
    lines[0] += f"mean length {result['length_mean']:.1f}"
    whole = result["step_s"]
    parts = {phase: result[f"{phase}_s"] for phase in PHASES}
    parts["metrics"] = whole - sum(parts.values())
    lines += [f"  {name:<10}{seconds:8.3f} s {seconds / whole:6.1%}" for name, seconds in parts.items()]
    lines.append(f"  {'step':<10}{whole:8.3f} s, {result['tokens_per_step'] / whole:,.0f} tokens/s")
    lines.append(
        f"outside engine and model {result['outside_share']:.1%} of a step; "
        f"real tokens {result['real_token_share']:.1%} of those computed; "
        f"peak memory {result['peak_gib']:.2f} GiB; whole process {result['wall_s']:.0f} s"
    )
    handing = ", ".join(f"{part} {result[f'{part}_s']:.3f} s" for part in ("sleep", "wake", "sync_weights"))
    lines.append(f"of it the engine's {handing}")
    lines.append(f"model TFLOP/s: old {result['old_tflops']:.3g}, update {result['update_tflops']:.3g}")
    for number, pairs in enumerate(versus, start=1):
        median, low, high = (result[f"versus_{number}{end}"] for end in ("", "_low", "_high"))
        lines.append(
            f"CPU time, {' '.join(pairs):30} over the first setting: {median:.4f}, mean in [{low:.4f}, {high:.4f}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
