"""Process pool that grades completions with time and memory limits.

    with Verifier(workers=2, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        tickets = [verifier.submit(completion, gold) for completion, gold in pairs]     # non-blocking, thread-safe
        grades = verifier.collect(tickets)                                              # in order

`submit` grades in the caller if no computer algebra is needed (microseconds), otherwise it queues the item. Each daemon
thread owns one worker process: it sends an item and waits for the reply. The kernel ends a process whose item exceeds
its CPU time, and the thread starts a new one. Rewards do not depend on load or queueing time. The constructor starts
the first worker. Other workers start when an item needs one.

An item whose worker ends gets strikes and is graded again, alone, until it has MAX_STRIKES.

A Verifier works from any thread and during interpreter shutdown, but not in a forked child. Workers are killed by
`close`, and end when their parent dies: the kernel kills them on Linux, elsewhere they end with their item.
"""

import contextlib
import importlib.util
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple

from ..math import compare, golds
from ..math.answer_line import answer_line_reward
from ..math.echo import is_echo
from ..math.extract import final_answers
from ..math.grade import Grade
from .process import Worker, WorkerEnded

logger = logging.getLogger(__name__)

BUILT_IN = ("math", "answer_line")
MAX_STRIKES = 10
STRIKES = {"timeout": 10, "crash": 5, "killed": 1, "stalled": 1}  # by WorkerEnded.reason
MAX_KILLED_STARTS = 100  # consecutive killed starts after which no worker can start on this machine
WAITING = 10  # wall-clock limit of computer algebra, as a multiple of its CPU time limit
MAXIMUM = {"workers": 4096, "timeout_s": 86_400, "memory_gib": 1_000_000}
MAXIMUM |= {"concurrency": 4096, "reward_timeout_s": 86_400}
ITEMS_PER_WORKER = 5000  # items after which a worker is replaced, to limit the caches of computer algebra
MAX_KNOWN = 50_000  # cached tickets by (answers, gold, problem): samples of a group repeat their answers
WATCHED = ("timeout", "crash", "guard", "no_answer")  # warn if the share of one of these reasons ...
WARN_SHARE, WARN_ITEMS = 0.02, 200  # ... is above WARN_SHARE and has doubled; checked after WARN_ITEMS grades


class GraderError(RuntimeError):
    """Raised if grading cannot continue: a user's reward failed, or no worker starts."""


class Judged(NamedTuple):
    """Input of the grader "math", the key of its cache."""

    answers: tuple[str, ...]
    gold: str
    problem: str

    def grade(self, verdict: bool, reason: Any) -> Grade:
        if verdict and self.problem and is_echo(*self):
            verdict, reason = False, "echo"
        return Grade(verdict, ", ".join(self.answers), reason)


class Ticket(Future[dict[str, Any]]):
    """Future for the reply to one item (worker.py). Pass it to `Verifier.collect`."""

    def __init__(self, call: str, item: Any, judged: Judged | None = None):
        super().__init__()
        self.call, self.item, self.judged, self.strikes = call, item, judged, 0

    def settle(self, reason: str, value: Any = None, parts: dict[str, float] | None = None, error: str = "") -> None:
        if self.done():  # settled by `close`, or by a caller after all threads ended
            return
        if reason == "error":
            self.set_exception(GraderError(error))
        else:
            self.set_result({"reason": reason, "value": value, "parts": parts})

    def grade(self) -> Grade:
        reply = self.result()
        if self.judged is not None:
            return self.judged.grade(bool(reply["value"]), reply["reason"])
        score = reply["value"] or 0.0
        return Grade(score > 0, None, reply["reason"], score, reply["parts"] or {})


class Verifier(contextlib.AbstractContextManager["Verifier"]):
    """Process pool that grades (completion, gold) pairs.

    workers: number of processes. timeout_s: CPU time per item, so that verdicts do not depend on the load.
    memory_gib: address space of a worker.
    grader: "math" (extraction, comparison, computer algebra), "answer_line" (the paper's strict rule, without
        processes), or "path/to/file.py:function" (a user's reward, run in the workers: own.py).
    while_waiting: called at least once per second while `collect` waits; its exception ends the wait.
    concurrency: concurrent items in an async or batch reward, over all workers.
    reward_timeout_s: wall-clock limit per call of a user's reward; above it, `collect` raises GraderError.

    Raises ValueError for an invalid argument, for a user's function that cannot be loaded or has unknown parameters,
    and if no worker starts within its limits.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        memory_gib: float,
        grader: str,
        while_waiting: Callable[[], object] = lambda: None,
        concurrency: int = 1,
        reward_timeout_s: float = 60.0,
    ):
        limits = (workers, timeout_s, memory_gib, concurrency, reward_timeout_s)
        for (name, most), value in zip(MAXIMUM.items(), limits, strict=True):
            if not 0 < value <= most:
                raise ValueError(f"{name}: must be above 0 and at most {most} (got {value})")
        self.grader, self._closed, self._while_waiting = _check_grader(grader), False, while_waiting
        wait_s = WAITING * timeout_s if self.grader == "math" else reward_timeout_s
        self._limits = (self.grader, timeout_s, memory_gib, wait_s)
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._known: dict[Judged, Ticket] = {}
        self._live: set[Worker] = set()
        self._idle: list[Worker] = []
        self._counts: Counter[str] = Counter()
        self._shares: dict[str, float] = {"no_answer": 1.0}
        hello = {} if self.grader == "answer_line" else self._start_first()
        many: bool = hello.get("many", False)  # the reward takes several items at once
        self._asked: dict[str, bool] = hello.get("asked", {})
        self._workers = min(workers, concurrency) if many else workers
        self._at_once = concurrency // self._workers if many else 1

    def _start_first(self) -> dict[str, Any]:
        """Start a worker, check that it works within its limits, and return its first message."""
        _, timeout_s, memory_gib, _ = self._limits
        try:
            worker = self._start()
            if self.grader == "math":
                worker.ask("compare", [(["x+1"], "1+x")])
        except WorkerEnded as end:
            if self.grader != "math":
                raise ValueError(f"reward: {self.grader} cannot be used: {end}") from None
            if end.reason in ("timeout", "stalled"):
                raise ValueError(
                    f"verifier_timeout_s: too short to compare even x+1 and 1+x (got {timeout_s}); 3 is usual"
                ) from None
            raise ValueError(
                f"verifier_memory_gib: no grading process can work in it (got {memory_gib}: {end}); 2 is usual"
            ) from None
        self._idle.append(worker)
        return worker.hello

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, completion: str, gold: str, about: Mapping[str, Any] | None = None) -> "Ticket | Grade":
        """Start grading without blocking. Thread-safe.

        about: values for the other parameters of a user's reward (own.NAMES). `problem` is a Problem as a dict, whose
        "row" is the row. A callable is called if the reward has its parameter. Raises ValueError if one is missing.
        """
        about = about or {}
        if self.grader == "answer_line":
            return answer_line_reward(completion, gold)
        if self.grader != "math":
            given = {"row": about.get("problem", {}).get("row", {}), **about}
            given |= {"completion": completion, "gold": gold, "answer": gold}
            missing = [name for name, optional in self._asked.items() if not optional and name not in given]
            if missing:
                raise ValueError(f"reward: {self.grader} has the parameters {', '.join(missing)}, not available here")
            arguments = {name: given[name] for name in self._asked if name in given}
            item = {name: value() if callable(value) else value for name, value in arguments.items()}
            return self._enqueue(Ticket("own", item))
        answers = final_answers(completion)
        if not answers:
            return Grade(False, None, "no_answer")
        judged = Judged(answers, gold, about.get("problem", {}).get("problem", ""))
        verdict, reason = compare.compare(answers, gold, compare.UNDECIDED)
        if verdict is not None:
            return judged.grade(verdict, reason)
        known = self._known.get(judged)
        if known is None:
            known = Ticket("compare", (answers, gold), judged)
            if len(self._known) < MAX_KNOWN:
                self._known[judged] = known
            self._enqueue(known)
        return known.grade() if known.done() else known

    def collect(self, tickets: "Sequence[Ticket | Grade]") -> list[Grade]:
        """Wait for the grades and return them in the order of the tickets. Each item has a time limit.

        Raises GraderError for the first item for which a user's reward failed or no worker could be started.
        """
        grades = [ticket if isinstance(ticket, Grade) else self._done(ticket).grade() for ticket in tickets]
        self._counts.update(grade.reason for grade in grades)
        if (total := self._counts.total()) >= WARN_ITEMS:
            for reason in WATCHED:
                share = self._counts[reason] / total
                if share > max(WARN_SHARE, 2 * self._shares.get(reason, 0.0)):
                    logger.warning("verifier: %s was the verdict on %.1f %% of %d answers", reason, 100 * share, total)
                self._shares[reason] = share
            self._counts.clear()
        return grades

    def grade(self, completion: str, gold: str, about: Mapping[str, Any] | None = None) -> Grade:
        """Grade one pair: `submit` and `collect`."""
        return self.collect([self.submit(completion, gold, about)])[0]

    def check_golds(self, golds_to_check: list[str]) -> list[str | None]:
        """Return for each gold the reason why it must not be used, or None if it is valid."""
        tickets: dict[str, Ticket | str | None] = {}
        for gold in dict.fromkeys(golds_to_check):  # many problems have the same gold
            try:
                tickets[gold] = golds.trouble_with(gold, compare.UNDECIDED)
            except golds.Undecided:
                tickets[gold] = self._enqueue(Ticket("check", gold))
        for gold, ticket in tickets.items():
            if isinstance(ticket, Ticket):
                reply = self._done(ticket).result()
                tickets[gold] = reply["reason"] if reply["reason"] in golds.NOT_CHECKED else reply["value"]
        return [tickets[gold] for gold in golds_to_check]  # type: ignore[misc]  (no ticket is left)

    def close(self) -> None:
        """Kill the workers. Pending items get the reason crash. Idempotent."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for worker in list(self._live):
            worker.kill()
        for thread in self._threads:
            thread.join(timeout=5)
        while not self._queue.empty():
            if (ticket := self._queue.get()) is not None:
                ticket.settle("crash")

    def _enqueue(self, ticket: Ticket) -> Ticket:
        if self._closed:
            raise ValueError("this Verifier is closed: submit inside its `with` block")
        with self._lock:
            if len(self._threads) < self._workers:
                thread = threading.Thread(target=self._serve, name="rewards-verifier", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put(ticket)
        return ticket

    def _done(self, ticket: Ticket) -> Ticket:
        """Wait until a ticket has its reply or its error, and return it."""
        while not ticket.done():
            self._while_waiting()
            if not wait([ticket], timeout=1.0).done and not all(thread.is_alive() for thread in self._threads):
                ticket.settle("crash" if self._closed else "error", error="a grading thread ended; why is on stderr")
        return ticket

    def _take(self) -> list[Ticket]:
        """Return the next item, or several for a batch or async reward; [] at the end. Items with strikes are alone."""
        first = self._queue.get()
        batch = [first] if first else []
        with contextlib.suppress(queue.Empty):
            while first and not first.strikes and len(batch) < self._at_once:
                other = self._queue.get_nowait()
                if other is None or other.strikes:
                    self._queue.put(other)
                    break
                batch.append(other)
        return batch

    def _serve(self) -> None:
        """Main loop of a thread: own one worker at a time and process items until None."""
        worker: Worker | None = None
        while batch := self._take():
            replies: list[dict[str, Any]] = []
            ended: WorkerEnded | None = None
            try:
                worker = worker or self._start()
                replies = worker.ask(batch[0].call, [ticket.item for ticket in batch])
            except WorkerEnded as error:
                ended = error
            if worker is not None and (ended or worker.items >= ITEMS_PER_WORKER):
                self._live.discard(worker)
                worker.kill()
                worker = None
            if ended and not (replies := self._replies_to(ended, batch)):
                for ticket in batch:
                    self._queue.put(ticket)  # retry at the end of the queue
                continue
            for ticket, reply in zip(batch, replies, strict=True):
                if ticket.judged and reply["reason"] in ("crash", "error"):
                    self._known.pop(ticket.judged, None)
                ticket.settle(**reply)
        if worker is not None:
            worker.kill()

    def _replies_to(self, ended: WorkerEnded, batch: list[Ticket]) -> list[dict[str, Any]]:
        """Return the replies to items whose worker has ended; [] if they are graded again."""
        for ticket in batch:
            ticket.strikes += STRIKES.get(ended.reason, 0) if len(batch) == 1 else 1
        if ended.reason == "start":
            reply = {"reason": "error", "error": f"no grading process can be started: {ended}"}
        elif ended.reason == "stalled" and batch[0].call == "own":
            waited = f"{self.grader} did not return within reward_timeout_s {self._limits[-1]:g}"
            reply = {"reason": "error", "error": f"{waited}; give its requests a shorter limit, or raise the key"}
        elif self._closed or batch[0].strikes >= MAX_STRIKES:
            reply = {"reason": "timeout" if ended.reason == "timeout" else "crash"}
        else:
            return []
        return [reply] * len(batch)

    def _start(self) -> Worker:
        """Return a worker that is ready. Retry if it is killed during its start, since no item can be the cause."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        for _ in range(MAX_KILLED_STARTS):
            try:
                worker = Worker(*self._limits)
            except WorkerEnded as end:
                if end.reason == "start":
                    raise
                continue
            self._live.add(worker)
            if self._closed:  # `close` ran during the start and did not see this worker
                worker.kill()
            return worker
        raise WorkerEnded("start", f"{MAX_KILLED_STARTS} in a row were killed from outside")


def _check_grader(grader: str) -> str:
    if grader == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("grader='math' needs the package math-verify: pip install 'math-verify[antlr4_13_2]'")
    if grader in BUILT_IN:
        return grader
    path, colon, name = grader.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"grader={grader!r}: allowed are 'math', 'answer_line' and 'path/to/file.py:function'")
    if not Path(path).is_file():
        raise ValueError(f"grader={grader!r}: there is no file {Path(path).resolve()}")
    return f"{Path(path).resolve()}:{name}"
