"""One grading process: receives items, sends replies, and dies with its parent.

    python -m rewards.pool.worker '[PARENT_PID, MEMORY_BYTES, TIMEOUT_S, "math"]'

File descriptor 0 is a multiprocessing Connection.
    first message out   {"asked": {name: has a default}, "many": takes several items at once} or {"why": "..."}
    in                  ("compare" | "check" | "own", [item, ...])
    out                 [{"value": ..., "reason": "..."}, ...], with "parts" or "error" of a user's; None: no memory

Started by process.py alone. The kernel ends this process with SIGPROF when an item has used up its processor time,
also inside C code; the parent looks at the clock, for an item that only waits. The module is started by name with
a plain interpreter and imports neither torch nor the trainer, so a respawn costs half a second.
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
        _take_along()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    channel = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a grader prints goes to stderr
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
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            call, items = channel.recv()
            signal.setitimer(signal.ITIMER_PROF, timeout_s * len(items))
            try:
                replies = calls[call](items)
            except MemoryError:
                return channel.send(None)  # what is left of the heap is not worth keeping
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.send(replies)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent's thread that started us ends; leave at once when it already has."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the closed channel ends an idle worker
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _take_along() -> None:
    """Leave a process behind that kills our group once we have ended, however we did: what a user's reward has started
    must not outlive a trainer that was killed. It is nobody's child, since that code may wait for its own.
    """
    if not hasattr(os, "pidfd_open"):  # not Linux: the group ends with a worker that its owner ends
        return
    ours = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        if os.fork() == 0:
            os.closerange(0, ours)  # the channel, above all
            select.select([ours], [], [])  # readable when we have ended
            os.killpg(0, signal.SIGKILL)
        os._exit(0)
    os.wait()
    os.close(ours)


def _math_calls() -> dict[str, Callable[[list[Any]], list[dict[str, Any]]]]:
    from ..math import compare, golds, symbolic

    logging.disable(logging.CRITICAL)  # math-verify and sympy would log the model's whole text when they cannot read it
    symbolic.equal_expressions("\\sqrt{2}+x^{2}", "x^{2}+\\sqrt{2}")  # builds the grammar now, not on an item's time
    leaf = compare.Leaf(symbolic.equal_expressions)

    def judge(items: list[tuple[list[str], str]]) -> list[dict[str, Any]]:
        verdicts = [compare.compare(answers, gold, leaf) for answers, gold in items]
        return [{"value": bool(verdict), "reason": reason} for verdict, reason in verdicts]

    def check(items: list[str]) -> list[dict[str, Any]]:
        return [{"value": golds.trouble_with(gold, leaf), "reason": "match"} for gold in items]

    return {"compare": judge, "check": check}


if __name__ == "__main__":
    main()
