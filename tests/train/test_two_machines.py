"""Two launchers here, a process each, stand for two machines: the numbers of one launcher with two processes, and
an end within a minute when one of them is lost.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from launching import ACCELERATE, LIVELY, ROOT, metrics, small_run, together, weights, without_clock

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


@pytest.fixture
def machines(toy_model: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machines]:
    max_steps, engine = request.param
    line = ["train.py", *small_run(toy_model, tmp_path, "run", "fsdp2", max_steps), *LIVELY.split(), "--engine", engine]
    both = Machines(tmp_path, line)
    yield both
    both.kill()


@pytest.mark.parametrize("machines", [(2, "hf")], indirect=True)
def test_two_machines_train_as_one_with_two_processes(machines: Machines, toy_model: str, tmp_path: Path):
    given = yaml.safe_load(CONFIG.read_text())
    assert (given["num_machines"], given["num_processes"], given["distributed_type"]) == (2, 16, "MULTI_GPU")
    assert [launcher.wait(timeout=200) for launcher in machines.launchers] == [0, 0], machines.outputs[0].read_text()
    together(
        2, "train.py", *small_run(toy_model, tmp_path / "one", "run", "fsdp2", 2), *LIVELY.split(), "--engine", "hf"
    )
    assert without_clock(metrics(tmp_path / "run")) == without_clock(metrics(tmp_path / "one" / "run"))
    ours, theirs = weights(tmp_path / "run", 2), weights(tmp_path / "one" / "run", 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("machines", [(500, "hf")], indirect=True)
@pytest.mark.parametrize("lost, rank", [("launcher", 0), ("machine", 1)])
def test_a_machine_that_is_lost_ends_the_other(machines: Machines, lost: str, rank: int, tmp_path: Path):
    machines.wait_for("step   2/")
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
