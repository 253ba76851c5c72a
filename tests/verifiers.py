"""Verifiers for tests, and their worker processes."""

import textwrap
import time
from pathlib import Path
from typing import Any

from rewards import Verifier

HARD = ("\\boxed{2\\sqrt2}", "\\sqrt8")  # right, and only computer algebra can tell


def math_verifier(workers: int = 1, timeout_s: float = 5.0) -> Verifier:
    return Verifier(workers=workers, timeout_s=timeout_s, memory_gib=2.0, grader="math")


def own_verifier(tmp_path: Path, body: str, timeout_s: float = 5.0, workers: int = 1, **limits: Any) -> Verifier:
    file = tmp_path / "my_rewards.py"
    file.write_text(textwrap.dedent(body))
    return Verifier(workers, timeout_s, memory_gib=2.0, grader=f"{file}:reward", **limits)


def worker_pids(verifier: Verifier) -> list[int]:
    return [worker.pid for worker in verifier._live]


def is_running(pid: int) -> bool:
    """Alive and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False
