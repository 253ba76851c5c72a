"""Writes the run folders beside this file: invented numbers with the shape of real ones, for the tests of compare.

    python tests/eval/recorded/make_runs.py

Nothing here was measured. Curves are a sigmoid of the step plus seeded noise; 5 seeds of `fixed` and of `band`.
"""

import json
from pathlib import Path

import numpy as np
import yaml

STEPS = 20
BINS = ("p<0.01", "p<0.2", "p<0.4", "p<0.6", "p<0.8", "p<=1")
# rule -> (step where the reward is half way, entropy at the end, share clipped up and down in each bin)
METHODS = {
    "fixed": (11.0, 0.12, (0.60, 0.20, 0.09, 0.02, 0.11, 0.001), (0.29, 0.09, 0.07, 0.04, 0.15, 0.01)),
    "band": (8.0, 0.31, (0.04, 0.09, 0.02, 0.01, 0.29, 0.01), (0.001, 0.06, 0.13, 0.08, 0.20, 0.04)),
}

RULE_ARGS = {"fixed": {"low": 0.2, "high": 0.2}, "band": {"delta": 0.05, "divergence": "kl"}}


def rows(rule: str, seed: int) -> list[dict[str, float]]:
    noise = np.random.default_rng([seed, len(rule)])
    half, entropy_end, up, down = METHODS[rule]
    half += noise.normal(0, 0.8)
    out = []
    for step in range(STEPS + 1):
        reward = 0.25 + 0.72 / (1 + np.exp(-(step - half) / 1.5))
        row: dict[str, float] = {"step": step}
        if step:
            entropy = 0.02 + 0.5 * np.exp(-(((step - half) / 4) ** 2)) + entropy_end * step / STEPS
            row |= {
                "train/entropy": entropy * (1 + noise.normal(0, 0.04)),
                "reward/mean": reward + noise.normal(0, 0.01),
                "reward/solved_all": max(0.0, reward - 0.3),
                "reward/solved_none": max(0.0, 0.7 - reward),
                "clip/up": 0.016 + noise.normal(0, 0.001),
                "clip/down": 0.017 + noise.normal(0, 0.001),
                "optim/grad_norm": 0.4 + abs(noise.normal(0, 0.1)),
                "response/length_mean": 5 + 3 * reward,
                "throughput/tokens_per_s": 4000 + noise.normal(0, 60),
            }
            for name, share_up, share_down in zip(BINS, up, down, strict=True):
                row[f"clip/up/{name}"] = share_up * (1 + noise.normal(0, 0.05))
                row[f"clip/down/{name}"] = share_down * (1 + noise.normal(0, 0.05))
        if step % 5 == 0:
            row |= {
                "eval/toy/mean@32": reward,
                "eval/toy/mean@32_stderr": 0.03,
                "eval/toy/pass@32": min(1.0, reward + 0.1),
            }
        out.append({key: round(float(value), 5) if key != "step" else value for key, value in row.items()})
    return out


def main() -> None:
    for rule in METHODS:
        for seed in range(5):
            folder = Path(__file__).parent / f"{rule}_seed{seed}"
            folder.mkdir(exist_ok=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(rule, seed)))
            config = {"run_name": folder.name, "seed": seed, "output_dir": "runs", "max_steps": STEPS, "rule": rule}
            config |= {"rule_args": RULE_ARGS[rule], "lr": 1e-4, "model": "toy"}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))


if __name__ == "__main__":
    main()
