"""Main program of a grading process: receives items, sends replies, and ends with its parent.

    python -m rewards.pool.worker '[PARENT_PID, MEMORY_BYTES, TIMEOUT_S, "math"]'

File descriptor 0 is a multiprocessing Connection.
    first message out   {"asked": {name: has a default}, "many": takes several items at once} or {"why": "..."}
    in                  ("compare" | "check" | "own", [item, ...])
    out                 [{"value": ..., "reason": "..."}, ...], "parts" or "error" for a user's reward; None: no memory

Only process.py starts it. The kernel ends this process with SIGPROF if an item exceeds its CPU time, also inside C
code. The parent enforces the wall-clock limit for an item that waits. The module runs in a new interpreter and imports
neither torch nor the trainer, so a restart takes 0.5 s.
"""

import contextlib
import ctypes
import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .own import describe, load

logger = logging.getLogger("rewards.pool.worker")

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, memory_bytes, timeout_s, grader = json.loads(sys.argv[1])
    _die_with(parent)
    path, own, _ = grader.rpartition(":")
    if own:
        _start_watchdog()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    channel = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # a grader's output goes to stderr
    hello: dict[str, Any] = {}
    try:
        if own:
            reward = load(grader)
            calls = {"own": reward.grade}
            asked = {name: part.default is not part.empty for name, part in reward.parameters.items()}
            hello = {"asked": asked, "many": reward.is_batch or reward.is_async}
        else:
            calls = _math_calls()
    except Exception as error:  # a user's file may raise anything
        logger.debug("not loaded", exc_info=True)
        return channel.send({"why": describe(error, path)})
    channel.send(hello)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        while True:
            call, items = channel.recv()
            signal.setitimer(signal.ITIMER_PROF, timeout_s * len(items))
            try:
                replies = calls[call](items)
            except MemoryError:
                return channel.send(None)  # end: the heap may be exhausted
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.send(replies)


def _die_with(parent: int) -> None:
    """Request SIGKILL when the parent thread that started this process ends. Exit if the parent has already ended."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the closed channel ends an idle worker
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _start_watchdog() -> None:
    """Start a watchdog process that kills this process group after this process ends for any reason.

    Children of a user's reward must not outlive a killed trainer. A double fork detaches the watchdog, because the
    reward may wait for its own children.
    """
    if not hasattr(os, "pidfd_open"):  # not Linux: only Worker.kill ends the group
        return
    ours = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        if os.fork() == 0:
            os.closerange(0, ours)  # mainly the channel
            select.select([ours], [], [])  # readable when the worker has ended
            os.killpg(0, signal.SIGKILL)
        os._exit(0)
    os.wait()
    os.close(ours)


def _math_calls() -> dict[str, Callable[[list[Any]], list[dict[str, Any]]]]:
    from ..math import compare, golds, symbolic

    logging.disable(logging.CRITICAL)  # math-verify and sympy log the whole text that they cannot parse
    symbolic.equal_expressions("\\sqrt{2}+x^{2}", "x^{2}+\\sqrt{2}")  # builds the grammar outside an item's CPU time
    leaf = compare.Leaf(symbolic.equal_expressions)

    def judge(items: list[tuple[list[str], str]]) -> list[dict[str, Any]]:
        verdicts = [compare.compare(answers, gold, leaf) for answers, gold in items]
        return [{"value": bool(verdict), "reason": reason} for verdict, reason in verdicts]

    def check(items: list[str]) -> list[dict[str, Any]]:
        return [{"value": golds.trouble_with(gold, leaf), "reason": "match"} for gold in items]

    return {"compare": judge, "check": check}


if __name__ == "__main__":
    main()
