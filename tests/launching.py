"""Starting train.py as a user does, and reading what a run left behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def train(config: str, *overrides: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`accelerate launch train.py --config CONFIG --key value ...`, output captured; the caller judges."""
    line = [ACCELERATE, "launch", *ONE_PROCESS, "train.py", "--config", config, *map(str, overrides)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def trained(config: str, *overrides: object) -> subprocess.CompletedProcess[str]:
    """`train`, and the run must have ended well."""
    done = train(config, *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that must be the same in two identical runs: all but times, speed and memory."""
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "throughput", "memory")} for row in rows]
