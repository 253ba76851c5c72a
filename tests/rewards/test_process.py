"""One grading process: who ended it and what that costs its item; processor time, clock, memory, its children."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from launching import ROOT
from verifiers import HARD, math_verifier, own_verifier, wait_until_gone, worker_pids

from rewards import Grade, GraderError


@pytest.mark.slow
def test_a_worker_killed_from_outside_loses_nothing():
    with math_verifier() as verifier:
        verifier.grade(*HARD)
        (pid,) = worker_pids(verifier)
        os.kill(pid, signal.SIGKILL)
        assert verifier.grade("\\boxed{3\\sqrt2}", "\\sqrt{18}").correct
        assert worker_pids(verifier) != [pid]


def grader_that(tmp_path: Path, when: str, does: str, tries: int) -> str:
    """A user's file whose first `tries` loads ("load") or calls ("call") do something bad; each try leaves a line."""
    accident = f"""
        import ctypes, os, signal
        def accident(when):
            if when != {when!r}:
                return
            with open({str(tmp_path / "tries")!r}, "a+") as file:
                file.write("x\\n")
                file.seek(0)
                tried = len(file.readlines())
            if tried <= {tries}:
                {does}
        accident("load")
        def reward(completion, gold):
            accident("call")
            return completion == gold
        """
    return textwrap.dedent(accident)


@pytest.mark.slow
@pytest.mark.parametrize(("when", "kills"), [("load", 5), ("call", 9)])
@pytest.mark.parametrize("number", ["KILL", "TERM"])
@pytest.mark.promise("a grading process killed from outside, also while it starts")
def test_a_kill_from_outside_is_no_fault_of_the_item(tmp_path, when, kills, number):
    """The kernel does not say who sent a signal, so the process may send it to itself here."""
    body = grader_that(tmp_path, when, f"os.kill(os.getpid(), signal.SIG{number})", kills)
    with own_verifier(tmp_path, body) as verifier:
        assert verifier.grade("42", "42") == Grade(True, None, "match", 1.0, {})
    assert len((tmp_path / "tries").read_text().split()) == kills + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "tries"),
    [("os._exit(0)", 2), ("ctypes.string_at(0)", 2), ("os.abort()", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 10)],
)
def test_an_item_that_ends_its_worker_is_a_crash_after_few_tries(tmp_path, does, tries):
    with own_verifier(tmp_path, grader_that(tmp_path, "call", does, 1000)) as verifier:
        assert verifier.grade("42", "42") == Grade(False, None, "crash", 0.0)
    assert len((tmp_path / "tries").read_text().split()) == tries


@pytest.mark.slow
def test_a_stopped_worker_is_replaced_and_its_item_tried_again():
    with math_verifier(timeout_s=0.2) as verifier:
        verifier.grade(*HARD)
        (pid,) = worker_pids(verifier)
        os.kill(pid, signal.SIGSTOP)
        assert verifier.grade("\\boxed{3\\sqrt2}", "\\sqrt{18}").correct
        assert worker_pids(verifier) != [pid]


def test_processor_time_counts_and_not_the_clock(tmp_path):
    """A busy function is stopped at its limit of processor time; one that waits too long on the clock is an error."""
    body = """
        import time
        def reward(completion, gold):
            time.sleep(float(completion))
            while completion == "0":
                pass
            return True
        """
    with own_verifier(tmp_path, body, timeout_s=0.1, reward_timeout_s=1.0) as verifier:
        assert verifier.grade("0.5", "").correct
        assert verifier.grade("0", "").reason == "timeout"
        start = time.monotonic()
        with pytest.raises(GraderError, match=r"my_rewards.py:reward did not return within reward_timeout_s 1; "):
            verifier.grade("1000", "")
        assert 1.0 <= time.monotonic() - start < 10


@pytest.mark.promise("all processes suspended and continued")
def test_a_run_that_is_suspended_and_continued_loses_no_grade(tmp_path):
    """Two seconds stopped, one and a half on the clock for the item."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def reward(completion, gold):\n"
        "    print('begun', flush=True)\n"
        "    for _ in range(30): time.sleep(0.01)\n"  # most of it after it goes on
        "    return True\n"
    )
    (tmp_path / "trainer.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import rewards\n"
        "verifier = rewards.Verifier(1, 0.15, memory_gib=2.0, grader='slow.py:reward', reward_timeout_s=1.5)\n"
        "ticket = verifier.submit('x', 'y')\n"
        "while not verifier._live: pass\n"
        "print(*[worker.pid for worker in verifier._live], flush=True)\n"
        "print(verifier.collect([ticket])[0].reason)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout and trainer.stderr
    group = [trainer.pid, int(trainer.stdout.readline())]
    assert trainer.stderr.readline() == "begun\n"
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in group:
            os.kill(pid, number)
        time.sleep(2.0 if number == signal.SIGSTOP else 0.0)
    said, errors = trainer.communicate(timeout=30)
    assert said == "match\n", errors


@pytest.mark.parametrize("pidfd", [True, False])  # elsewhere than on Linux there is none
@pytest.mark.promise("processes that a reward started")
def test_what_a_reward_has_started_ends_with_its_worker(tmp_path, monkeypatch, pidfd):
    if not pidfd:
        (tmp_path / "sitecustomize.py").write_text("import os\ndel os.pidfd_open\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    body = """
        import subprocess
        def reward(completion, gold):
            started = subprocess.Popen(["sleep", "1000"])
            print(started.pid, file=open(gold, "a"), flush=True)
            while completion == "hang":
                pass
            return True
        """
    pids = tmp_path / "pids"
    with own_verifier(tmp_path, body, timeout_s=0.3) as verifier:
        assert verifier.grade("hang", str(pids)).reason == "timeout"
        assert wait_until_gone([int(pids.read_text())])
        assert verifier.grade("fine", str(pids)).correct
    assert len(pids.read_text().split()) == 2
    assert wait_until_gone([int(pid) for pid in pids.read_text().split()])


@pytest.mark.promise("processes that a reward started, after SIGKILL to the trainer")
def test_what_a_reward_has_started_ends_with_a_trainer_that_is_killed(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import subprocess\n"
        "def reward(completion, gold):\n"
        "    print(subprocess.Popen(['sleep', '1000']).pid, flush=True)\n"
        "    while True: pass\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from rewards import Verifier\n"
        "verifier = Verifier(workers=1, timeout_s=60.0, memory_gib=2.0, grader='mine.py:reward')\n"
        "verifier.collect([verifier.submit('x', 'y')])\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert trainer.stderr
    pid = int(trainer.stderr.readline())
    trainer.kill()
    trainer.communicate(timeout=20)  # nobody holds its stderr
    assert wait_until_gone([pid])


def test_memory_is_limited(tmp_path):
    greedy = (
        "def reward(completion, gold):\n    return len(bytearray(3 * 2**30)) > 0 if completion == 'big' else True\n"
    )
    with own_verifier(tmp_path, greedy) as verifier:
        assert verifier.grade("big", "").reason == "crash"
        assert verifier.grade("small", "").correct
