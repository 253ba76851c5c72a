"""Grade many completions at once, in worker processes that can be stopped.

    with Verifier(workers=2, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        tickets = [verifier.submit(completion, gold) for completion, gold in pairs]     # at once, from any thread
        grades = verifier.collect(tickets)                                              # in order

`submit` settles in the caller what needs no computer algebra (microseconds); the rest goes to a queue. One daemon
thread owns one worker process each: it hands over an item and waits for the reply. The kernel ends a process whose
item has used up its processor time, and it is replaced. Load and time in the queue change no reward. The first worker
is started when the Verifier is made, the others when an item needs one.

An item whose worker is killed from outside is graded again. A worker killed while it starts had no item. An item under
which workers end by themselves (memory, a fault, an exit) is a crash at the second time.

Works from any thread and after a fork (the child starts workers of its own), in several processes at once, and while
the interpreter shuts down. Workers are killed by `close`, at exit, and by the kernel when their parent dies (Linux).
"""

import atexit
import importlib.util
import json
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple

from ..math import compare, golds
from ..math.answer_line import answer_line_reward
from ..math.echo import is_echo
from ..math.extract import final_answers
from ..math.grade import Grade
from .process import Worker, WorkerDied, WorkerKilled, WorkerNotStarted, WorkerStalled
from .watch import Watch

MAX_STRIKES = 10  # of an item, then it is a crash. A worker ended from outside counts 1,
DEATH_STRIKES = 5  # a worker that ended by itself 5
MAX_KILLED_STARTS = 100  # in a row; then this machine lets no worker start
MAX_TIMEOUT_S, MAX_MEMORY_GIB = 86_400, 1_000_000
ITEMS_PER_WORKER = 5000  # then it is replaced, so that the algebra's caches cannot grow without end
MAX_KNOWN = 50_000  # tickets kept by what they are about: the samples of a group repeat their answers
_CRASH: dict[str, Any] = {"value": None, "reason": "crash"}
_TIMEOUT: dict[str, Any] = {"value": None, "reason": "timeout"}


def _error(told: str) -> dict[str, Any]:
    return {"value": None, "reason": "error", "error": told}


class GraderError(RuntimeError):
    """Grading cannot go on: a user's function raised or returned no number, or no worker comes up."""


class Judged(NamedTuple):
    """What a verdict of the grader "math" is about."""

    answers: tuple[str, ...]
    gold: str
    problem: str

    def grade(self, verdict: bool, reason: Any) -> Grade:
        if verdict and self.problem and is_echo(*self):
            verdict, reason = False, "echo"
        return Grade(verdict, ", ".join(self.answers), reason)


class Ticket(Future[dict[str, Any]]):
    """A future of the reply to one item (worker.py). Pass it to `Verifier.collect`."""

    def __init__(self, call: str, *args: Any, judged: Judged | None = None):
        super().__init__()
        self.call, self.args, self.judged, self.pid, self.strikes = call, args, judged, os.getpid(), 0

    def settle(self, reply: dict[str, Any]) -> None:
        if self.done():  # by `close`, or by a caller who saw that no thread is left
            return
        if reply["reason"] == "error":
            self.set_exception(GraderError(reply["error"]))
        else:
            self.set_result(reply)

    def grade(self) -> Grade:
        reply = self.result()
        if self.judged is not None:
            return self.judged.grade(bool(reply["value"]), reply["reason"])
        score = reply["value"] or 0.0
        return Grade(score > 0, None, reply["reason"], score, reply.get("parts"))


class Verifier:
    """Grades (completion, gold) pairs: see the head of this file.

    workers: processes. timeout_s: seconds of processor time for one item, so that no verdict depends on the load; a
    user's function that waits (for a subprocess, a network) is stopped after 10 times as long on the clock.
    memory_gib: address space of a worker.
    grader: "math" (extract, compare, computer algebra), "answer_line" (the paper's strict rule, never a process), or
    "path/to/file.py:function", a user's own, run in the workers: see own.py.
    while_waiting: called at least once a second while `collect` waits; what it raises ends the waiting.

    Raises ValueError for a bad argument, for a user's function that cannot be loaded or asks for what is not known, and
    when no worker comes up within its limits.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        memory_gib: float,
        grader: str,
        while_waiting: Callable[[], object] = lambda: None,
    ):
        if workers < 1:
            raise ValueError(f"workers={workers}: at least one is needed")
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s={timeout_s}: more than 0 is needed, and at most a day, {MAX_TIMEOUT_S}")
        if not 0 < memory_gib <= MAX_MEMORY_GIB:
            raise ValueError(f"memory_gib={memory_gib}: more than 0 is needed, and at most {MAX_MEMORY_GIB}")
        self.workers, self.timeout_s, self.memory_gib = workers, timeout_s, memory_gib
        self.grader, self._closed, self._while_waiting = _checked_grader(grader), False, while_waiting
        self._reset()
        self._asked = {} if self.grader == "answer_line" else self._start_first()
        _OPEN.add(self)

    def _start_first(self) -> dict[str, Any]:
        """Start a worker and see that it can do its work within its limits; what a user's function asks for."""
        worker = None
        try:
            worker = self._start()
            if self.grader == "math":
                worker.ask("compare", [["x+1"], "1+x"])
        except (WorkerDied, WorkerKilled) as error:
            if self.grader == "math":
                told = f"verifier_memory_gib {self.memory_gib}: no grading process can work in it ({error}); 2 is usual"
                raise ValueError(told) from None
            raise ValueError(f"grader={self.grader!r} cannot be used: {error}") from None
        except (TimeoutError, WorkerStalled):
            told = f"verifier_timeout_s {self.timeout_s}: too short to compare even x+1 and 1+x; 3 is usual"
            raise ValueError(told) from None
        self._first = worker
        return worker.asked

    def _reset(self) -> None:
        """Empty, as at first and in a forked child."""
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._known: dict[Judged, Ticket] = {}
        self._live: set[Worker] = set()
        self._first: Worker | None = None
        self._watch = Watch()
        self._pid = os.getpid()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, completion: str, gold: str, about: Mapping[str, Any] | None = None) -> "Ticket | Grade":
        """Start grading; returns at once. Callable from any thread, also while others submit or collect.

        about: what a user's function may ask for (own.ABOUT), able to be JSON; the grader "math" reads the text of the
        problem, about["problem"]["problem"], if it is there. Raises ValueError when a user's function asks for
        something that is not in it.
        """
        if self.grader == "answer_line":
            return answer_line_reward(completion, gold)
        if self.grader != "math":
            return self._enqueue(Ticket("own", completion, gold, self._sent(about or {})))
        answers = final_answers(completion)
        if not answers:
            return Grade(False, None, "no_answer")
        judged = Judged(answers, gold, (about or {}).get("problem", {}).get("problem", ""))
        verdict, reason = compare.compare(answers, gold, compare.UNDECIDED)
        if verdict is not None:
            return judged.grade(verdict, reason)
        known = self._known.get(judged)
        if known is None:
            known = Ticket("compare", answers, gold, judged=judged)
            if len(self._known) < MAX_KNOWN:
                self._known[judged] = known
            self._enqueue(known)
        return known.grade() if known.done() else known

    def _sent(self, about: Mapping[str, Any]) -> dict[str, object]:
        """Of `about`, what the user's function asks for."""
        missing = [name for name in self._asked["required"] if name not in about]
        if missing:
            raise ValueError(f"{self.grader} asks for {', '.join(missing)}, which is not given here")
        sent = {name: about[name] for kind in ("required", "optional") for name in self._asked[kind] if name in about}
        for name, value in sent.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} cannot be given to {self.grader}: it must be JSON, but {error}") from None
        return sent

    def collect(self, tickets: "Sequence[Ticket | Grade]") -> list[Grade]:
        """The grades in the order of the tickets. Waits, but each item has its limit, so never for ever.

        Raises GraderError at the first item that a user's function failed on, or that no worker could be started for.
        """
        grades = [ticket if isinstance(ticket, Grade) else self._done(ticket).grade() for ticket in tickets]
        self._watch.see(grades)
        return grades

    def grade(self, completion: str, gold: str, about: Mapping[str, Any] | None = None) -> Grade:
        """`submit` and `collect` for one pair."""
        return self.collect([self.submit(completion, gold, about)])[0]

    def check_golds(self, golds_to_check: list[str]) -> list[str | None]:
        """For each gold the reason why it must not be used, None when it is fine."""
        tickets: list[Ticket | str | None] = []
        for gold in golds_to_check:
            try:
                tickets.append(golds.trouble_with(gold, compare.UNDECIDED))
            except golds.Undecided:
                tickets.append(self._enqueue(Ticket("check", gold)))
        return [self._trouble(ticket) if isinstance(ticket, Ticket) else ticket for ticket in tickets]

    def _trouble(self, ticket: Ticket) -> str | None:
        reply = self._done(ticket).result()
        return reply["reason"] if reply["reason"] in golds.NOT_CHECKED else reply["value"]

    def close(self) -> None:
        """Kill the workers; what is still unanswered becomes a crash. Idempotent."""
        self._closed = True
        _OPEN.discard(self)
        if self._pid != os.getpid():
            return
        with self._lock:
            threads, live = list(self._threads), list(self._live)
        for _ in threads:
            self._queue.put(None)
        for worker in live:
            worker.kill()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)
        while not self._queue.empty():
            if (ticket := self._queue.get()) is not None:
                ticket.settle(_CRASH)

    def _enqueue(self, ticket: Ticket) -> Ticket:
        if self._closed:
            raise ValueError("this Verifier is closed: submit inside its `with` block")
        with self._lock:
            if len(self._threads) < self.workers:
                thread = threading.Thread(target=self._serve, args=(self._queue,), name="rewards-verifier", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put(ticket)
        return ticket

    def _done(self, ticket: Ticket) -> Ticket:
        """The ticket once its reply, or its error, is there."""
        if ticket.pid != os.getpid():  # submitted before a fork: no thread of this process grades it
            return self._done(self._enqueue(Ticket(ticket.call, *ticket.args, judged=ticket.judged)))
        while not ticket.done():
            self._while_waiting()
            if not wait([ticket], timeout=1.0).done and not any(thread.is_alive() for thread in self._threads):
                ticket.settle(_CRASH if self._closed else _error("the grading threads ended; why is on stderr"))
        return ticket

    def _serve(self, tickets: "queue.SimpleQueue[Ticket | None]") -> None:
        """One thread: owns one worker at a time and takes items until None."""
        worker: Worker | None = None
        while (ticket := tickets.get()) is not None:
            reply: dict[str, Any] | None = None
            try:
                worker = worker or self._start()
                reply = worker.ask(ticket.call, ticket.args)
            except TimeoutError:
                reply = _TIMEOUT
            except WorkerKilled:
                ticket.strikes += 1
            except WorkerStalled:  # algebra never waits: the process was stopped, or this machine has no time for it
                ticket.strikes += 1
                reply = _TIMEOUT if ticket.call == "own" else None
            except WorkerDied as error:
                ticket.strikes += DEATH_STRIKES
                if isinstance(error, WorkerNotStarted) and ticket.strikes >= MAX_STRIKES:
                    reply = _error(f"no grading process can be started: {error}")
            if worker is not None and (
                reply is None or reply["reason"] == "timeout" or worker.items >= ITEMS_PER_WORKER
            ):
                self._drop(worker)
                worker = None
            if reply is None and (self._closed or ticket.strikes >= MAX_STRIKES):
                reply = _CRASH
            if reply is None:
                tickets.put(ticket)  # behind the others
                continue
            if ticket.judged and reply["reason"] in ("crash", "error"):
                self._known.pop(ticket.judged, None)
            ticket.settle(reply)
        if worker is not None:
            worker.kill()

    def _start(self) -> Worker:
        """A worker that is ready. One killed while it starts is replaced: it had no item yet that could be to blame."""
        with self._lock:
            first, self._first = self._first, None
        if first is not None:
            return first
        for _ in range(MAX_KILLED_STARTS):
            if self._closed:
                break
            try:
                worker = Worker(self.grader, self.timeout_s, self.memory_gib)
            except WorkerKilled:
                continue
            with self._lock:
                self._live.add(worker)
            if self._closed:  # `close` came while it was starting, and could not see it
                worker.kill()
                break
            return worker
        if self._closed:
            raise WorkerDied
        raise WorkerNotStarted(f"{MAX_KILLED_STARTS} in a row were killed from outside")

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            self._live.discard(worker)
        worker.kill()


def _checked_grader(grader: str) -> str:
    if grader == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("grader='math' needs the package math-verify: pip install 'math-verify[antlr4_13_2]'")
    if grader in ("math", "answer_line"):
        return grader
    path, found, name = grader.rpartition(":")
    if not found or not name.isidentifier():
        raise ValueError(f"grader={grader!r}: allowed are 'math', 'answer_line' and 'path/to/file.py:function'")
    if not Path(path).is_file():
        raise ValueError(f"grader={grader!r}: there is no file {Path(path).resolve()}")
    return f"{Path(path).resolve()}:{name}"


_OPEN: "weakref.WeakSet[Verifier]" = weakref.WeakSet()


def _close_all() -> None:
    for verifier in list(_OPEN):
        verifier.close()


def _forget_parents_workers() -> None:
    for verifier in list(_OPEN):
        verifier._reset()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_parents_workers)
