"""Train GRPO's fixed clip and the Band from the same start model, and compare the two runs.

    make demo            # or: python demo.py           a tiny model on the synthetic task (data/toy.py), minutes
    make demo-llm        # or: python demo.py --llm     SmolLM2-135M on arithmetic in English, long on a CPU

Prepares the start model, trains one config with fixed clip bounds and one with the Band through train.py, and prints
the findings. Each run is stored in runs/CONFIG. An interrupted run resumes. A finished run is not trained again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.smollm2 import prepare
from data.toy import save_start
from eval.compare import compare
from eval.records import Record, load_record
from eval.report import write_report

ROOT = Path(__file__).resolve().parent
RUNS = ROOT / "runs"
RAREST = "clip/up/p<0.01"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Train GRPO and the Band from the same start model and compare them.",
        epilog="Further --key value arguments set options of both configs, such as --max_steps 2.",
    )
    parser.add_argument("--llm", action="store_true", help="SmolLM2-135M on arithmetic in English")
    arguments, keys = parser.parse_known_args(argv)
    llm: bool = arguments.llm
    started = time.perf_counter()
    name = "demo_llm" if llm else "demo"
    configs = (f"{name}_grpo", f"{name}_band")
    if llm:
        title("1. SmolLM2-135M-Instruct, which solves some of the problems")
        try:
            print(f"runs/smollm2: {prepare(RUNS / 'smollm2')}")
        except OSError as error:
            raise SystemExit(f"error: {error}") from None
    else:
        title("1. A tiny model that mostly uses a shortcut and very rarely the better strategy")
        save_start(RUNS / "toy_model", "toy", seed=0, device="cpu")
    title(f"2. Training {' and '.join(configs)}: accelerate launch train.py --config NAME.yaml")
    # One thread for each of the tiny runs, all threads for a run of SmolLM2.
    cores = os.cpu_count() or 1
    train_all(configs, 1 if llm else min(2, cores), keys, threads=cores if llm else 1)
    title("3. Comparison of the two runs")
    runs = [RUNS / config for config in configs]
    figure, page = RUNS / f"{name}.png", RUNS / f"{name}.html"
    print(compare(runs, out=figure))
    print(findings(*map(load_record, runs)))
    if llm:
        title("4. Three responses of each run, at its first and at its last step")
        print("\n".join(line for run in runs for line in first_and_last_responses(run, 3)))
    write_report(runs, page)
    print(f"\nlook at {page.relative_to(ROOT)} in a browser: curves, and the responses token by token")
    print(f"curves as a picture: {figure.relative_to(ROOT)}")
    print(f"took {time.perf_counter() - started:.0f} s; to train again: rm -r runs/{configs[0]} runs/{configs[1]}")


def train_all(configs: Sequence[str], at_once: int, keys: Sequence[str], *, threads: int) -> None:
    """Train the configs, `at_once` at a time with `threads` each. Exits if a run fails."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            codes = dict(zip(configs, pool.map(lambda config: train(config, keys, threads), configs), strict=True))
        except KeyboardInterrupt:  # the runs receive it too and save a checkpoint
            pool.shutdown(cancel_futures=True)
            raise SystemExit("stopped; the same command resumes") from None
    if failed := [f"{name} stopped with exit code {code}" for name, code in codes.items() if code]:
        raise SystemExit(f"{', '.join(failed)}; the lines above say why")


def train(config: str, keys: Sequence[str], threads: int) -> int:
    """Train one config in a separate process, print its lines after its name, and return the exit code."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    line = [accelerate, "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    line += ["--dynamo_backend", "no", "train.py", "--config", f"{config}.yaml"]
    line += ["--output_dir", RUNS.name, "--run_name", config, *keys]  # an option that is set twice is an error
    # Passive waiting: threads do not spin, which is several times faster on a busy machine.
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **os.environ}
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for printed in process.stdout:
            print(f"{config} | {printed}", end="", flush=True)
    return process.returncode


def first_and_last_responses(run: Path, count: int) -> list[str]:
    """Return lines with `count` logged responses of the run's first and last step, with problem and verdict."""
    files = sorted((run / "samples").glob("step_*.jsonl"))
    lines = []
    for path in dict.fromkeys(files[:1] + files[-1:]):
        lines.append(f"{run.name}, step {int(path.stem.removeprefix('step_'))}:")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()[:count]):
            verdict = "correct" if row["correct"] else "incorrect"
            lines.append(f"  {row['problem']}  ->  {json.dumps(row['answer'], ensure_ascii=False)}  ({verdict})")
    return lines


def findings(grpo: Record, band: Record) -> str:
    """Return sentences about the mechanism, with the numbers of these two runs."""

    def mean(run: Record, key: str) -> str:
        values = run.series(key)[1]
        return f"{values.mean():.0%}" if len(values) else "none seen"

    def reached(run: Record, level: float) -> str:
        steps, rewards = run.series("reward/mean")
        return str(steps[rewards >= level][0]) if max(rewards) >= level else "not reached"

    entropies = [run.series("train/entropy")[1][-1] for run in (grpo, band)]
    return (
        "Mechanism: clipped share of tokens with positive advantage and old probability below 1 % (mean over steps):\n"
        f"  fixed clip {mean(grpo, RAREST)}, Band {mean(band, RAREST)}.\n"
        f"Speed: first step with mean reward 0.5: fixed clip {reached(grpo, 0.5)}, Band {reached(band, 0.5)}.\n"
        f"Entropy after the last step: fixed clip {entropies[0]:.3f}, Band {entropies[1]:.3f} nats per token.\n"
        "One seed each; docs/results.md has several seeds and what does not hold."
    )


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
