"""How step time and memory grow with samples, response length, vocabulary, parameters and processes.

    OMP_NUM_THREADS=1 python -m bench.scaling [--steps 2]

Each row is one run of bench.step at fixed lengths, a process of its own (fsdp2 over gloo where there are several); the
slope of a series is that of log(CPU seconds) and of log(peak memory) against log(size), by least squares: 1 is
proportional, 0 does not depend on it. Times and memory of several processes are those of the first.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = {"size": "1m", "prompts": "8", "samples": "8", "tokens": "64"}
SERIES = {
    "samples": [{"samples": n} for n in ("8", "16", "32")],
    "tokens": [{"tokens": n} for n in ("64", "128", "256")],
    "vocabulary": [{"size": n} for n in ("20m", "20m-vocab8k", "20m-vocab32k")],
    "parameters": [{"size": n} for n in ("1m", "5m", "20m", "50m")],
    "processes": [{"size": "5m", "processes": n} for n in ("1", "2")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--series", default=",".join(SERIES))
    options = parser.parse_args()
    print("| series | size | step, CPU s | wall s | rollout | old | optimize | peak GiB |\n|" + "---|" * 8, flush=True)
    for name in options.series.split(","):
        runs = [measure({**BASE, **point}, options.steps) for point in SERIES[name]]
        sizes = [size_of(name, point, run) for point, run in zip(SERIES[name], runs, strict=True)]
        for size, run in zip(sizes, runs, strict=True):
            seconds = [run[key] for key in ("step_cpu_s", "step_s", "rollout_s", "old_s", "optimize_s")]
            cells = [name, f"{size:,.0f}", *(f"{value:.2f}" for value in seconds), f"{run['peak_rss_gib']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        if len(runs) < 3:
            continue
        time, memory = (slope(sizes, [run[key] for run in runs]) for key in ("step_cpu_s", "peak_rss_gib"))
        print(f"| {name} | slope | {time:.2f} | | | | | {memory:.2f} |", flush=True)


def size_of(series: str, point: dict[str, str], run: dict[str, float]) -> float:
    """What the series varies, as a number."""
    from bench.workload import SIZES

    if series == "vocabulary":
        return SIZES[point["size"]].vocabulary
    return run["parameters"] if series == "parameters" else float(point[series])


def measure(point: dict[str, str], steps: int) -> dict[str, float]:
    """One run of bench.step."""
    processes = point.pop("processes", "1")
    words = [word for key, value in point.items() for word in (f"--{key}", value)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes] if processes != "1" else []
    command = [sys.executable, *launcher, "-m", "bench.step", "--json", "--steps", str(steps), *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y against log x."""
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    main()
