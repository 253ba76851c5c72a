"""Two launchers here, a process each, stand for two machines: the numbers of one launcher with two processes, and
an end within a minute when one of them is lost.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from launching import ACCELERATE, LIVELY, ROOT, metrics, small_run, together, without_clock

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="shows what several CPU processes do"),
]
CONFIG = ROOT / "configs" / "accelerate" / "two_machines.yaml"


class Machines:
    """Both launchers, each with its output in a file."""

    def __init__(self, folder: Path, line: list[str]):
        port = str(20000 + os.getpid() % 20000)
        self.outputs = [folder / f"machine_{rank}.txt" for rank in (0, 1)]
        self.launchers = []
        for rank, output in enumerate(self.outputs):
            command = [ACCELERATE, "launch", "--config_file", str(CONFIG), "--machine_rank", str(rank)]
            command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes", "2"]
            environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            with output.open("w") as file:
                self.launchers.append(
                    subprocess.Popen([*command, *line], cwd=ROOT, env=environment, stdout=file, stderr=file)
                )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 150
        while text not in self.outputs[0].read_text():
            assert time.monotonic() < deadline, self.outputs[0].read_text()
            time.sleep(0.1)

    def processes(self, rank: int) -> list[psutil.Process]:
        """The launcher and what it started."""
        launcher = psutil.Process(self.launchers[rank].pid)
        return [launcher, *launcher.children(recursive=True)]

    def kill(self) -> None:
        for rank, launcher in enumerate(self.launchers):
            if launcher.poll() is None:
                for process in self.processes(rank):
                    process.kill()
            launcher.wait()


def line(toy_model: str, out: Path, max_steps: int) -> list[str]:
    return [*small_run(toy_model, out, "run", "fsdp2", max_steps), *LIVELY.split(), "--engine", "hf"]


@pytest.fixture
def machines(toy_model: str, tmp_path: Path) -> Iterator[Machines]:
    both = Machines(tmp_path, ["train.py", *line(toy_model, tmp_path, 500)])
    yield both
    both.kill()


@pytest.fixture(scope="module")
def expected(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of two steps of two processes with one launcher."""
    out = tmp_path_factory.mktemp("one")
    together(2, "train.py", *line(toy_model, out, 2))
    return without_clock(metrics(out / "run"))


@pytest.mark.parametrize("lost, rank", [("launcher", 0), ("machine", 1)])
def test_two_machines_train_as_one_and_end_when_one_is_lost(
    machines: Machines, lost: str, rank: int, tmp_path: Path, expected: list[dict[str, Any]]
):
    given = yaml.safe_load(CONFIG.read_text())
    assert (given["num_machines"], given["num_processes"], given["distributed_type"]) == (2, 16, "MULTI_GPU")
    machines.wait_for("step   2/")
    assert without_clock(metrics(tmp_path / "run"))[:2] == expected
    family = machines.processes(rank)
    for process in family[:1] if lost == "launcher" else family:
        process.send_signal(signal.SIGKILL)
    assert machines.launchers[1 - rank].wait(timeout=60) != 0
    psutil.wait_procs(family, timeout=60)
    assert not any(process.is_running() for process in family)  # no orphan
    told = machines.outputs[1 - rank].read_text() + machines.outputs[rank].read_text()
    if lost == "launcher":
        assert "stopped because a launcher died" in told  # after a checkpoint of the last completed step
        saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
        assert saved and f"step_{metrics(tmp_path / 'run')[-1]['step']:06d}" == saved[-1]
    else:
        assert "Connection closed by peer" in told or "Connection reset by peer" in told
