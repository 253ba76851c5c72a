"""A grading process as its owner sees it: start it, ask it, learn how it ended. The other end: worker.py.

How a process ended says who ended it. A signal that people, schedulers and the kernel's memory killer send
(`FROM_OUTSIDE`) says nothing about the item in hand; an exit or a fault (a segmentation fault, an abort) is the item's.
SIGPROF is the kernel's word that the item has used up its processor time.

Why not multiprocessing, or a pool built on it: a process that it starts afresh imports the main script first, here
train.py and with it torch; its limits go by the clock, which a loaded machine stretches; and one that was killed looks
like one that broke.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_S = 60.0  # a fresh worker has this long to import and report; half a second is usual
END_S = 5.0  # a process whose socket is closed has this long to end
TICK_S = 0.1  # between two looks whether the process still runs
WAITING = 10  # times the limit of processor time may pass on the clock
FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))


class WorkerDied(Exception):
    """The worker ended by its own doing."""


class WorkerNotStarted(WorkerDied):
    """No worker comes up; its text says why."""


class WorkerKilled(Exception):
    """The worker was ended from outside."""


class WorkerStalled(Exception):
    """The worker gave no reply for WAITING times its limit and did not use up its processor time: it sleeps, waits for
    something, or was stopped.
    """


class Worker:
    """One process running rewards.pool.worker, spoken to over a socket.

    `asked`: what a user's reward asks for (own.Asked). Raises WorkerNotStarted, or WorkerKilled when it is killed
    before it is ready.
    """

    def __init__(self, grader: str, timeout_s: float, memory_gib: float):
        ours, theirs = socket.socketpair()
        settings = {"parent": os.getpid(), "memory_bytes": int(memory_gib * 2**30), "timeout_s": timeout_s}
        settings["grader"], self._wait_s = grader, WAITING * timeout_s
        home = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self.items, self._socket, self._buffer = 0, ours, b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.pool.worker", json.dumps(settings)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the trainer, which then closes us
            )
        except OSError as error:
            ours.close()
            raise WorkerNotStarted(f"no process could be started: {error}") from error
        finally:
            theirs.close()
        self.pid, self._killed = self._process.pid, False
        try:
            hello = self._exchange(b"", START_S)
        except (WorkerStalled, WorkerDied) as error:
            self.kill()
            raise WorkerNotStarted(f"the process did not come up ({error}); its last words are on stderr") from error
        except WorkerKilled:
            self.kill()
            raise
        if not hello["ready"]:
            self.kill()
            raise WorkerNotStarted(hello["why"])
        self.asked: dict[str, Any] = hello["asked"]

    def ask(self, call: str, args: Sequence[Any]) -> dict[str, Any]:
        """The reply to one item (worker.py).

        Raises TimeoutError when the item has used up its processor time, WorkerStalled when it only waited,
        WorkerDied or WorkerKilled when the process ends before.
        """
        self.items += 1
        message = json.dumps({"call": call, "args": args}).encode("ascii") + b"\n"
        reply = self._exchange(message, self._wait_s)
        if reply["reason"] == "crash":  # its last words
            raise WorkerDied
        return reply

    def _exchange(self, message: bytes, wait_s: float) -> dict[str, Any]:
        """Send a message, if any, and wait for the next line. A line that is there is read, however late it is."""
        while message or b"\n" not in self._buffer:
            begun = time.monotonic()
            try:
                self._socket.settimeout(min(TICK_S, wait_s))
                if message:
                    message = message[self._socket.send(message) :]
                    continue
                chunk = self._socket.recv(65536)
            except TimeoutError:
                wait_s -= min(time.monotonic() - begun, TICK_S)  # a longer tick: all of us were stopped, and go on now
                if self._process.poll() is not None:  # and a process that it started holds the socket
                    raise self._death() from None
                if wait_s <= 0:
                    raise WorkerStalled("no word in time") from None
                continue
            except OSError:
                chunk = b""
            if not chunk:
                raise self._death()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _death(self) -> Exception:
        """What ended the process, whose socket is closed."""
        end = time.monotonic() + END_S
        while (status := self._process.poll()) is None and time.monotonic() < end:
            time.sleep(0.01)
        if status == -signal.SIGPROF:
            return TimeoutError()
        return WorkerKilled() if status is not None and -status in FROM_OUTSIDE else WorkerDied(f"exit status {status}")

    def kill(self) -> None:
        """SIGKILL to the process and to all that it started, and reap. Safe to call twice and from another thread."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._socket.close()
