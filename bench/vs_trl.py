"""Step time and memory against TRL's GRPOTrainer on the same work: A B A B, each run a process of its own on one core.

    make bench-env && python -m bench.vs_trl [--sizes 1m,20m] [--pairs 3] [--core 0]

The same model, prompts, number of samples and tokens, and optimizer steps; fixed lengths, and ragged ones (a geometric
length with mean a third of the limit). Both sides with the engine that is the faster one for the case in the first
pair, vLLM or transformers' generate. Ours twice: `trainer` recomputes old log-probs with the policy as the paper does
(all but the first minibatch's), and `sampler` takes the engine's (old_policy: sampler). Ratios are of CPU seconds a
step, pair by pair, which other load on the machine disturbs least; wall seconds beside them. Start-up is not counted on
either side.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.workload import make_workload

ROOT = Path(__file__).resolve().parent.parent
BENCH_PYTHON = ROOT / ".venv.bench" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sizes", default="1m,20m")
    parser.add_argument("--lengths", default="fixed,ragged")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of our configuration")
    parser.add_argument("--core", default="0", help="processor to pin to; empty: no pinning")
    options = parser.parse_args()
    if not BENCH_PYTHON.exists():
        raise SystemExit("TRL's environment is missing: make bench-env")
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            model = make_workload(Path(folder) / size, size, 16 * (options.steps + 1), 10)
            for lengths in options.lengths.split(","):
                compare(model, size, lengths, options)


ENGINES = ("vllm", "hf")


def compare(model: Path, size: str, lengths: str, options: argparse.Namespace) -> None:
    """One line for each variant of ours against TRL."""
    shared = ["--model", str(model), "--steps", str(options.steps), *(["--ragged"] if lengths == "ragged" else [])]

    def theirs(engine: str) -> dict[str, float]:
        return execute([str(BENCH_PYTHON), "bench/trl_step.py", "--backend", engine, *shared], options.core)

    def ours(engine: str, anchor: str) -> dict[str, float]:
        # Micro-batches of half an update: as fast here, and less memory.
        keys = [f"engine={engine}", f"old_policy={anchor}", "micro_batch_tokens=1200", *options.set]
        return execute([sys.executable, "-m", "bench.step", "--json", *shared, "--set", *keys], options.core)

    first_theirs = {engine: theirs(engine) for engine in ENGINES}
    first_ours = {engine: ours(engine, "sampler") for engine in ENGINES}
    best, mine = (min(runs, key=lambda e: runs[e]["step_cpu_s"]) for runs in (first_theirs, first_ours))
    print(
        f"{size:<4} {lengths:<6} CPU s a step, peak GiB by engine: "
        + "; ".join(
            f"{name} {e} {runs[e]['step_cpu_s']:.3f} {runs[e]['peak_rss_gib']:.2f}"
            for name, runs in (("TRL", first_theirs), ("ours", first_ours))
            for e in ENGINES
        ),
        flush=True,
    )
    results = {"trl": [first_theirs[best]], "sampler": [first_ours[mine]], "trainer": [ours(mine, "trainer")]}
    for _ in range(options.pairs - 1):
        results["trl"].append(theirs(best))
        for anchor in ("sampler", "trainer"):
            results[anchor].append(ours(mine, anchor))
    trl = middle(results["trl"])
    for anchor in ("sampler", "trainer"):
        pairs = list(zip(results[anchor], results["trl"], strict=True))
        cpu = [a["step_cpu_s"] / b["step_cpu_s"] for a, b in pairs]
        wall = statistics.median(a["step_s"] / b["step_s"] for a, b in pairs)
        own = middle(results[anchor])
        print(
            f"{size:<4} {lengths:<6} old: {anchor:<7} | "
            f"ratio {statistics.median(cpu):.3f} ({min(cpu):.3f}..{max(cpu):.3f}), wall {wall:.3f} | "
            f"CPU s a step {own['step_cpu_s']:.3f} {mine}, TRL {trl['step_cpu_s']:.3f} {best} | "
            f"tokens {own['tokens_per_step']:,.0f}, {trl['tokens_per_step']:,.0f} | "
            f"peak GiB {own['peak_rss_gib']:.2f}, {trl['peak_rss_gib']:.2f}",
            flush=True,
        )


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def execute(command: list[str], core: str) -> dict[str, float]:
    """The JSON line that a run prints last."""
    pinned = ["taskset", "-c", core, *command] if core else command
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(pinned, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


if __name__ == "__main__":
    main()
