"""The main job on a bare machine: the same tiny model trained with GRPO's fixed clip and with the Band, then compared.

    make demo        # or: python demo.py

Makes the start model (data/toy.py), trains configs/demo_grpo.yaml and configs/demo_band.yaml through the same line
that trains a 7B model, and prints what the two runs show, no more. Everything is in runs/demo_grpo and runs/demo_band;
a run that was interrupted goes on where it stopped, a finished one is shown again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.toy import save_start
from eval.compare import compare
from eval.report import write_report

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "runs" / "toy_model"
CONFIGS = ("demo_grpo", "demo_band")
RAREST = "clip/up/p<0.01"


def main() -> None:
    started = time.perf_counter()
    title("1. A tiny model that answers by a shortcut, and very rarely by the better way")
    save_start(MODEL, "toy", seed=0, device="cpu")
    title(f"2. Training {' and '.join(CONFIGS)}, side by side: accelerate launch train.py --config NAME.yaml")
    train_all()
    title("3. What the two runs show")
    runs = [ROOT / "runs" / name for name in CONFIGS]
    figure = ROOT / "runs" / "demo.png"
    print(compare(runs, out=figure))
    print(findings(*(read_metrics(run) for run in runs)))
    page = ROOT / "runs" / "demo.html"
    write_report(runs, page)
    print(f"\nlook at {page.relative_to(ROOT)} in a browser: curves, and the answers token by token")
    print(f"curves as a picture: {figure.relative_to(ROOT)}")
    print(f"took {time.perf_counter() - started:.0f} s; to train anew: rm -r runs/demo_grpo runs/demo_band")


def train_all() -> None:
    """At once, a core for each where there are enough; ends the program when one of them ends badly."""
    with ThreadPoolExecutor(min(len(CONFIGS), os.cpu_count() or 1)) as pool:
        try:
            codes = dict(zip(CONFIGS, pool.map(train, CONFIGS), strict=True))
        except KeyboardInterrupt:  # the runs have it too, and save what they have
            pool.shutdown(cancel_futures=True)
            raise SystemExit("stopped; the same command goes on from here") from None
    if failed := [f"{name} stopped with exit code {code}" for name, code in codes.items() if code]:
        raise SystemExit(f"{', '.join(failed)}; the lines above say why")


def train(config: str) -> int:
    """The exit code; every line of the run is printed behind its name."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    line = [accelerate, "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    line += ["--dynamo_backend", "no", "train.py", "--config", f"{config}.yaml"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for printed in process.stdout:
            print(f"{config} | {printed}", end="", flush=True)
    return process.returncode


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def findings(grpo: list[dict[str, float]], band: list[dict[str, float]]) -> str:
    """Sentences about the mechanism, with the numbers of these two runs and nothing else."""

    def mean(rows: list[dict[str, float]], key: str) -> str:
        values = [row[key] for row in rows if key in row]
        return f"{sum(values) / len(values):.0%}" if values else "none seen"

    def reached(rows: list[dict[str, float]], level: float) -> str:
        return next((f"step {row['step']}" for row in rows if row.get("reward/mean", 0) >= level), "not reached")

    return "\n".join(
        [
            "Mechanism: of the tokens with positive advantage and old probability below 1 %, the update was clipped",
            f"  for: fixed clip {mean(grpo, RAREST)}, Band {mean(band, RAREST)} (mean over steps).",
            f"Speed: mean reward 0.5 was reached at: fixed clip {reached(grpo, 0.5)}, Band {reached(band, 0.5)}.",
            f"Entropy after the last step: fixed clip {grpo[-1]['train/entropy']:.3f}, Band "
            f"{band[-1]['train/entropy']:.3f} nats per token.",
            "One seed each; docs/results.md has several seeds and what does not hold.",
        ]
    )


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
