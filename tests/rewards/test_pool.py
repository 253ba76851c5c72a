"""The worker pool with real processes: queue, threads, forks, exits. How one process ends: test_process.py."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from launching import ROOT
from verifiers import HARD, is_running, math_verifier, own_verifier, wait_until_gone, worker_pids

from rewards import Grade, GraderError, Verifier

STUCK = "\\boxed{((9^{999})^{999})^{999}}"  # passes the guards, fills memory and time


def run_script(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a script from another folder, as a user would start a trainer."""
    file = tmp_path / "script.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body))
    return subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_stuck_item_costs_itself_and_no_other():
    with math_verifier(workers=2, timeout_s=1.0) as verifier:
        verifier.grade(*HARD)
        pairs = [(f"\\boxed{{{n}\\sqrt2}}", f"\\sqrt{{{2 * n * n}}}") for n in range(2, 22)]
        pairs[7] = (STUCK, "\\sqrt2")
        start = time.monotonic()
        grades = verifier.collect([verifier.submit(*pair) for pair in pairs])
        assert [grade.reason for grade in grades] == ["match"] * 7 + ["timeout"] + ["match"] * 12
        assert not grades[7].correct and time.monotonic() - start < 15


def test_a_worker_that_gets_no_pipe_is_an_error(tmp_path):
    """Out of file descriptors: the second thread cannot start its worker while the first grades."""
    (tmp_path / "r.py").write_text("import time\ndef f(completion, gold):\n    time.sleep(0.2)\n    return 1.0\n")
    body = f"""
        import resource
        from rewards import GraderError, Verifier
        with Verifier(2, 2.0, memory_gib=2.0, grader={str(tmp_path / "r.py")!r} + ":f") as verifier:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            tickets = [verifier.submit("x", "y") for _ in range(4)]
            try:
                print([grade.score for grade in verifier.collect(tickets)])
            except GraderError as error:
                print(error)
        """
    assert "no process could be started" in run_script(tmp_path, body).stdout


def test_waiting_in_the_queue_is_not_counted(tmp_path):
    slow = "import time\ndef reward(completion, gold):\n    time.sleep(0.4)\n    return True\n"
    with own_verifier(tmp_path, slow, timeout_s=0.1) as verifier:
        tickets = [verifier.submit("x", "y") for _ in range(5)]  # two seconds on the clock, one second for each
        assert [grade.reason for grade in verifier.collect(tickets)] == ["match"] * 5


def test_submit_returns_before_the_grade_is_there(tmp_path):
    slow = "import time\ndef reward(completion, gold):\n    time.sleep(1)\n    return True\n"
    with own_verifier(tmp_path, slow) as verifier:
        start = time.monotonic()
        ticket = verifier.submit("x", "y")
        assert time.monotonic() - start < 0.5
        assert verifier.collect([ticket])[0].correct


@pytest.mark.slow
def test_batch_with_hostile_items_finishes_with_every_other_grade_right():
    hostile = [
        STUCK, "\\boxed{9^{9^9}}", "\\boxed{10^9!}", "\\boxed{" * 10_000, "\\boxed{" + "(" * 5000 + "}",
        "x" * 10**6, "\\boxed{4\x002}",
        "\\boxed{\ud800}", "\\boxed{__import__('os').system('false')}", "Answer: " + "9" * 10**5,
    ]  # fmt: skip
    pairs = [(f"\\boxed{{{n}x+x}}", f"{n + 1}x") if n % 3 == 0 else (f"\\boxed{{{n}}}", f"{n}.0") for n in range(1000)]
    for index in range(0, 1000, 20):
        pairs[index] = (hostile[index // 20 % len(hostile)], "\\sqrt{5}")
    with math_verifier(workers=2, timeout_s=1.0) as verifier:
        grades = verifier.collect([verifier.submit(*pair) for pair in pairs])
    assert [grade.correct for grade in grades] == [index % 20 != 0 for index in range(1000)]
    assert {grade.reason for index, grade in enumerate(grades) if index % 20 == 0} >= {"guard", "timeout", "no_answer"}


@pytest.mark.slow
def test_from_many_threads_at_once():
    with math_verifier(workers=2) as verifier:
        right: list[bool] = []

        def work(first: int) -> None:
            pairs = [(f"\\boxed{{{n}\\sqrt2}}", f"\\sqrt{{{2 * n * n}}}") for n in range(first, first + 10)]
            right.extend(grade.correct for grade in verifier.collect([verifier.submit(*pair) for pair in pairs]))

        threads = [threading.Thread(target=work, args=(10 * k,)) for k in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert right == [True] * 40


@pytest.mark.slow
def test_after_a_fork_the_child_has_a_verifier_of_its_own(tmp_path):
    """Of the shared one only. Another raises an error there and does not wait for threads that the child lacks."""
    done = run_script(
        tmp_path,
        """
        import os, rewards
        verifier = rewards.Verifier(workers=1, timeout_s=5.0, memory_gib=2.0, grader="math")
        assert verifier.grade("\\\\boxed{2\\\\sqrt2}", "\\\\sqrt8").correct
        assert rewards.math_reward("\\\\boxed{2\\\\sqrt2}", "\\\\sqrt8").correct
        child = os.fork()
        assert rewards.math_reward("\\\\boxed{5\\\\sqrt2}", "\\\\sqrt{50}").correct
        if child == 0:
            try:
                verifier.grade("\\\\boxed{5\\\\sqrt2}", "\\\\sqrt{50}")
            except rewards.GraderError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        print("fine")
        """,
    )
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.slow
def test_two_processes_at_once_and_from_another_folder(tmp_path):
    body = """
        import rewards
        print(rewards.math_reward("\\\\boxed{2\\\\sqrt2}", "\\\\sqrt8").reason)
        """
    file = tmp_path / "script.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body))
    ranks = [
        subprocess.Popen([sys.executable, str(file)], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["match\n"] * 2


def test_the_main_script_is_not_run_again_by_workers(tmp_path):
    done = run_script(
        tmp_path,
        """
        print("once")
        import rewards
        assert rewards.math_reward("\\\\boxed{2\\\\sqrt2}", "\\\\sqrt8").correct
        """,
    )
    assert done.stdout == "once\n", done.stderr


@pytest.mark.slow
def test_at_interpreter_exit(tmp_path):
    done = run_script(
        tmp_path,
        """
        import atexit, rewards
        verifier = rewards.Verifier(workers=1, timeout_s=5.0, memory_gib=2.0, grader="math")
        verifier.grade("\\\\boxed{2\\\\sqrt2}", "\\\\sqrt8")
        atexit.register(lambda: print(verifier.grade("\\\\boxed{3\\\\sqrt2}", "\\\\sqrt{18}").reason))
        """,
    )
    assert done.stdout == "match\n" and not done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, ending):
    """Also one that is stuck in C code and could not notice a closed pipe."""
    file = tmp_path / "trainer.py"
    file.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import rewards, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
        "verifier = rewards.Verifier(workers=2, timeout_s=60.0, memory_gib=2.0, grader='math')\n"
        "verifier.grade('\\\\boxed{2\\\\sqrt2}', '\\\\sqrt8')\n"
        f"stuck = verifier.submit({STUCK!r}, '\\\\sqrt2')\n"
        "verifier.grade('\\\\boxed{3\\\\sqrt2}', '\\\\sqrt{18}')\n"
        "while len(verifier._live) < 2: time.sleep(0.02)\n"
        "print(*[worker.pid for worker in verifier._live], flush=True)\n"
        "verifier.collect([stuck])\n"
    )
    trainer = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) == 2 and all(is_running(pid) for pid in pids)
    trainer.send_signal(ending)
    trainer.communicate(timeout=20)
    assert trainer.returncode != 0 and wait_until_gone(pids)


@pytest.mark.slow
def test_close_kills_the_workers_and_settles_what_is_pending():
    verifier = math_verifier(timeout_s=60.0)
    verifier.grade(*HARD)
    pids = worker_pids(verifier)
    tickets = [verifier.submit(STUCK, "\\sqrt2"), verifier.submit("\\boxed{3\\sqrt2}", "\\sqrt{18}")]
    verifier.close()
    verifier.close()
    assert wait_until_gone(pids)
    assert [grade.reason for grade in verifier.collect(tickets)] == ["crash", "crash"]
    with pytest.raises(ValueError, match="closed"):
        verifier.submit(*("\\boxed{5\\sqrt2}", "\\sqrt{50}"))


@pytest.mark.slow
def test_close_while_a_worker_is_starting():
    verifier = math_verifier(timeout_s=60.0)
    ticket = verifier.submit(STUCK, "\\sqrt2")
    verifier.close()
    assert verifier.collect([ticket])[0].reason == "crash"
    assert not any(thread.is_alive() for thread in verifier._threads)


@pytest.mark.slow
@pytest.mark.promise("the same answer that times out, many times over")
def test_equal_answers_are_judged_once_also_when_they_time_out():
    """Sixteen would take sixteen seconds of processor time; another bomb costs its own."""
    with math_verifier(timeout_s=1.0) as verifier:
        assert verifier.grade(*HARD).correct
        assert isinstance(verifier.submit(*HARD), Grade)
        start = time.monotonic()
        grades = verifier.collect([verifier.submit(STUCK, "\\sqrt2") for _ in range(16)])
        assert [grade.reason for grade in grades] == ["timeout"] * 16 and time.monotonic() - start < 12
        assert isinstance(verifier.submit(STUCK, "\\sqrt2"), Grade)
        assert not isinstance(verifier.submit(STUCK, "\\sqrt3"), Grade)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"workers": 0}, r"workers: .* \(got 0\)"),
        ({"timeout_s": 1e12}, r"timeout_s: must be above 0 and at most 86400 \(got 1000000000000.0\)"),
        ({"timeout_s": float("nan")}, r"timeout_s: .* \(got nan\)"),
        ({"memory_gib": 0}, r"memory_gib: .* \(got 0\)"),
        ({"memory_gib": float("inf")}, r"memory_gib: .* \(got inf\)"),
        ({"memory_gib": 0.01}, r"verifier_memory_gib: no grading process can work in it \(got 0.01: "),
        ({"timeout_s": 1e-6}, r"verifier_timeout_s: too short .* \(got 1e-06\)"),
    ],
)
@pytest.mark.promise("verifier limits out of range: 0.01 GiB, 1e12 s")
def test_limits_that_cannot_be_worked_in_are_refused_at_once(limits, told):
    with pytest.raises(ValueError, match=told):
        Verifier(**{"workers": 1, "timeout_s": 1.0, "memory_gib": 2.0, "grader": "math", **limits})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.promise("the threads that grade have ended")
def test_grading_that_nobody_is_left_to_do_is_an_error():
    with math_verifier() as verifier:
        verifier.grade(*HARD)
        verifier._queue.put("no ticket")  # type: ignore[arg-type]  (ends the thread that gets it)
        with pytest.raises(GraderError, match="a grading thread ended; why is on stderr"):
            verifier.grade("\\boxed{3\\sqrt2}", "\\sqrt{18}")


def test_a_jump_is_warned_about_once(caplog):
    with math_verifier() as verifier:
        for _ in range(2):
            verifier.collect([Grade(True, "1", "match")] * 200)
        assert not caplog.records
        verifier.collect([Grade(True, "1", "match")] * 180 + [Grade(False, "1", "timeout")] * 20)
        verifier.collect([Grade(True, "1", "match")] * 180 + [Grade(False, "1", "timeout")] * 20)
    assert [record.getMessage() for record in caplog.records] == [
        "verifier: timeout was the verdict on 10.0 % of 200 answers"
    ]
