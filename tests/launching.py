"""Starting train.py as a user does, and reading what a run left behind."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from eval.records import is_of_clock

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
SMALL = "--prompts_per_step 8 --samples_per_prompt 4 --minibatches 2 --epochs 1 --micro_batch_tokens 128"
# A reward that differs inside every group, lengths that differ, and a reference policy.
LIVELY = "--temperature 2.0 --overlong_buffer_tokens 15 --kl_coef 0.01"
QUIET = "--eval_every 0 --wandb disabled --verifier_workers 1"

# Of a short run on one GPU.
GPU_KEYS = {
    **{"prompts_per_step": 8, "samples_per_prompt": 4, "minibatches": 2, "epochs": 1, "kl_coef": 0.01},
    **{"temperature": 2.0, "overlong_buffer_tokens": 15, "eval_every": 2, "eval_samples": 2, "save_every": 1},
    **{"precision": "auto", "sharding": "fsdp2", "wandb": "disabled", "vllm": "{enforce_eager: true}"},
    **{"engine_memory_share": 0.02, "eval_data": "toy_eval"},
}


def train(config: str, *overrides: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`python train.py --config CONFIG --key value ...`, output captured; the caller judges."""
    line = [sys.executable, "train.py", "--config", config, *map(str, overrides)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def trained(config: str, *overrides: object) -> subprocess.CompletedProcess[str]:
    """`train`, and the run must have ended well."""
    done = train(config, *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def trained_here(config: str, *overrides: object, engine: str = "hf") -> None:
    """A run that must end well in this process: where a start of its own, which takes longer, is not the point."""
    import train as loop

    assert loop.main(["--config", config, "--engine", engine, *map(str, overrides)]) == 0


def launch(
    processes: int, *line: object, timeout_s: float = 150, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`line` run by Python, by torchrun when there are several processes; output captured, the caller judges."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(processes)]
    command = [*(torchrun if processes > 1 else [sys.executable]), *map(str, line)]
    paths = {"PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def together(processes: int, *line: object, timeout_s: float = 150, **environment: str) -> str:
    """The output of `line` run by ranks.py, which must end well: where the launcher is not the point."""
    return well(launch(1, TESTS / "ranks.py", processes, *line, timeout_s=timeout_s, **environment))


def small_run(toy_model: str, out: Path, name: str, sharding: str, max_steps: int) -> list[str]:
    fixed = f"--config demo_band.yaml --model {toy_model} --output_dir {out} --run_name {name} --sharding {sharding}"
    return f"{fixed} --max_steps {max_steps} {SMALL} {QUIET}".split()


def well(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a launch that must have ended well."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that must be the same in two identical runs: all but times, speed and memory."""
    return [{key: value for key, value in row.items() if not is_of_clock(key)} for row in rows]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "policy" / "model.safetensors")


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of 32 KiB blocks, each with pieces of 7 bytes of header and the data."""
    data, pos, buffer = path.read_bytes(), 7, b""
    while pos + 7 <= len(data):
        left = 32768 - pos % 32768
        if left < 7:
            pos += left
            continue
        _, length, kind = struct.unpack("<IHB", data[pos : pos + 7])  # 1 whole, 2 first, 3 middle, 4 last
        if kind == 0:
            return
        piece = data[pos + 7 : pos + 7 + length]
        pos += 7 + length
        buffer = piece if kind in (1, 2) else buffer + piece
        if kind in (1, 4):
            from wandb.proto import wandb_internal_pb2  # takes a second

            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(buffer)
            yield record
