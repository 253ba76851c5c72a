"""How many answers a second does the verifier grade on one core, against plain math-verify in the same run?

    python -m bench.verifier [--seconds 5]
    make bench-env
    .venv.bench/bin/python -m pip install --no-deps verl ray msgpack tensordict pyvers omegaconf pylatexenc
    python -m bench.verifier --against

Two kinds of item, each completion a solution of some 600 characters with a box at its end:
    integers    a right or wrong integer: the fast path, no process. Asked for: 20,000 a second.
    mixed       kinds in MATH's proportions: six in ten are numbers, the rest surds, expressions, intervals, matrices,
                text. Asked for: 150 a second.
"ours, one process" runs extraction, comparison and algebra in this process; "ours, 1 worker" is the Verifier as a run
uses it, wall clock, warm. "math-verify" is verify(parse(boxed gold), parse(completion)), its time limits on.

`--against` grades tests/rewards/verifier_cases.jsonl by ours and by the rules of other packages, each in a process of
its own, one answer after the other: accuracy, false positives, false negatives, hangs (no verdict within 10 s; counted
as unpaid), answers a second. Theirs run in .venv.bench, from the installed packages; a rule that cannot be loaded
there is named and left out.
"""

import argparse
import importlib
import itertools
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from rewards import Verifier, compare
from rewards.check import Case, read_cases
from rewards.extract import final_answers

ROOT = Path(__file__).resolve().parent.parent
BENCH_PYTHON = ROOT / ".venv.bench" / "bin" / "python"
CASES = ROOT / "tests" / "data" / "verifier_cases.jsonl"
HANG_S, START_S = 10.0, 120.0

Item = tuple[str, str]

SOLUTION = (
    "We are asked for a value that satisfies every condition of the problem. Let $n$ be that value. First, "
    "$n^2 - 3n + 2 = (n-1)(n-2)$, so that the sum telescopes, and by the first condition $17 < n < 1000$. "
    "Next we count: there are $\\binom{6}{2} = 15$ pairs, of which $4$ are excluded by symmetry, which leaves $11$. "
    "Combining the two observations, the generating function has the coefficients we need, and a short computation "
    "with $x = \\frac{1}{2}$ checks the case. Everything else cancels. "
)


def integers() -> Iterator[Item]:
    for n in itertools.count(1000):
        yield f"{SOLUTION}Therefore the answer is $\\boxed{{{n if n % 2 else n + 1}}}$.", str(n)


def mixed() -> Iterator[Item]:
    """Groups of 8 samples of one problem, as in training, each with an answer of its own; two in eight are right."""
    for n in itertools.count(11):
        pairs = [
            (f"{n}", "{k}"), (f"{n}", "{k}.0"), (f"{n}", "{k}^\\circ"), (f"{n}", "\\${k}"), (f"-{n}", "-{k}"), (f"{n}",
            "x={k}"),
            (f"\\frac{{{n}}}7", "\\frac{{{k}}}{{7}}"), (f"\\frac{{{n}}}{{8}}", "{k}/8"), (f"{n}", "{k}\\text{{ cm}}"),
            (f"{n / 50}", "{k}\\%"), (f"\\frac{{{2 * n + 1}}}{{2}}", "{k}.5"), (f"\\text{{team {n}}}",
            "\\text{{Team {k}}}"),
            (f"\\sqrt{{{2 * n * n}}}", "{k}\\sqrt{{2}}"), (f"{n}+x^2", "x^2+{k}"), (f"x^2+{2 * n}x+{n * n}",
            "(x+{k})^2"),
            (f"\\frac{{{n}}}{{3}}\\pi", "\\frac{{{k}\\pi}}{{3}}"), (f"-5i+{n}", "{k}-5i"), (f"({n},\\infty)", "x>{k}"),
            (f"\\begin{{bmatrix}}{n}\\\\1\\end{{bmatrix}}", "\\begin{{pmatrix}}{k}\\\\1\\end{{pmatrix}}"),
            (f"\\sqrt{{{n}}}, -3", "-3, \\sqrt{{{k}}}"),
        ]  # fmt: skip
        for gold, answer in pairs:
            for sample in (0, 1, 2, 3, 4, 5, 6, 0):
                text = answer.format(k=n + 1000 * sample)
                yield f"{SOLUTION}Therefore the answer is $\\boxed{{{text}}}$.", gold


def rate(grade: Callable[[str, str], object], items: Iterator[Item], seconds: float) -> float:
    """Items a second, one after the other, over at least `seconds`; making the items is not counted."""
    done, spent = 0, 0.0
    while spent < seconds:
        batch = list(itertools.islice(items, 200))
        start = time.perf_counter()
        for completion, gold in batch:
            grade(completion, gold)
        spent += time.perf_counter() - start
        done += len(batch)
    return done / spent


def worker_rate(verifier: Verifier, items: Iterator[Item], seconds: float) -> float:
    done, spent = 0, 0.0
    while spent < seconds:
        batch = list(itertools.islice(items, 1000))
        start = time.perf_counter()
        verifier.collect([verifier.submit(completion, gold) for completion, gold in batch])
        spent += time.perf_counter() - start
        done += len(batch)
    return done / spent


# ----------------------------------------------------------------------------------------------------- against others


def _plain(completion: str, gold: str) -> bool:
    return verify(parse(gold), parse(completion))


def _wrapped(completion: str, gold: str) -> bool:
    return verify(parse(f"\\boxed{{{gold}}}"), parse(completion))


def _trl() -> Callable[[str, str], bool]:
    from trl.rewards import accuracy_reward  # type: ignore[import-not-found]

    return lambda completion, gold: accuracy_reward([[{"content": completion}]], [f"${gold}$"])[0] == 1.0


def _verl(name: str) -> Callable[[str, str], bool]:
    module = importlib.import_module(f"verl.utils.reward_score.{name}")

    def grade(completion: str, gold: str) -> bool:
        score: Any = module.compute_score(completion, gold)
        score = score["score"] if isinstance(score, dict) else score[0] if isinstance(score, (tuple, list)) else score
        return float(score) > 0

    return grade


VERL = ("math_verify", "math_dapo", "math_reward", "prime_math")
RULES: dict[str, Callable[[], Callable[[str, str], bool]]] = {
    "math-verify": lambda: _plain,
    "math-verify, gold in \\boxed{}": lambda: _wrapped,
    "TRL accuracy_reward, gold in $": _trl,
    **{
        f"verl {name}": lambda name=name: _verl(name)
        for name in ("math_verify", "math_dapo", "math_reward", "prime_math")
    },
}


def serve(rule: str) -> None:
    """Answer the items on standard input, one JSON line each way; what a rule prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    try:
        grade = RULES[rule]()
    except Exception as error:
        logging.getLogger(__name__).debug("not loadable", exc_info=True)
        answers.write(json.dumps(f"{type(error).__name__}: {error}") + "\n")
        return
    answers.write("true\n")
    for line in sys.stdin:
        try:
            verdict = bool(grade(*json.loads(line)))
        except Exception:
            logging.getLogger(__name__).debug("the rule raised", exc_info=True)
            verdict = False
        answers.write(json.dumps(verdict) + "\n")


class Served:
    """A rule in a process of its own, replaced when it hangs."""

    def __init__(self, rule: str):
        self.rule, self.hangs = rule, 0
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [str(BENCH_PYTHON), "-m", "bench.verifier", "--serve", self.rule],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        said = self._read(START_S)
        if said is not True:
            self.close()
            raise ImportError(said or "did not start")

    def _read(self, seconds: float) -> Any:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return json.loads(self._process.stdout.readline() or "null") if ready else None

    def grade(self, completion: str, gold: str) -> bool:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([completion, gold]) + "\n")
        self._process.stdin.flush()
        verdict = self._read(HANG_S)
        if verdict is None:
            self.hangs += 1
            self.close()
            self._start()
        return bool(verdict)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def against() -> None:
    cases = read_cases(CASES)
    sys.stdout.write(f"{len(cases)} labelled answers, {sum(case.expected for case in cases)} of them right\n\n")
    columns = "rule | accuracy | paid but wrong | right but unpaid | hangs | answers a second"
    sys.stdout.write(f"| {columns} |\n{'|---' * 6}|\n")
    with Verifier(workers=1, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        verifier.grade("\\boxed{x+1}", "1+x+0")
        _row("ours", cases, lambda completion, gold: verifier.grade(completion, gold).correct, lambda: 0)
    missing = []
    for rule in RULES:
        try:
            served = Served(rule)
        except ImportError as error:
            missing.append(f"{rule}: {error}")
            continue
        _row(rule, cases, served.grade, lambda served=served: served.hangs)
        served.close()
    sys.stdout.write("".join(f"left out: {line}\n" for line in missing))


def _row(name: str, cases: list[Case], grade: Callable[[str, str], bool], hangs: Callable[[], int]) -> None:
    start = time.perf_counter()
    verdicts = [grade(case.completion, case.gold) for case in cases]
    took = time.perf_counter() - start
    paid = sum(verdict and not case.expected for verdict, case in zip(verdicts, cases, strict=True))
    unpaid = sum(case.expected and not verdict for verdict, case in zip(verdicts, cases, strict=True))
    accuracy = 1 - (paid + unpaid) / len(cases)
    sys.stdout.write(f"| {name} | {accuracy:.3f} | {paid} | {unpaid} | {hangs()} | {len(cases) / took:.0f} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--against", action="store_true", help="the labelled set by the rules of other packages")
    parser.add_argument("--serve", metavar="RULE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seconds = options.seconds
    if options.serve:
        return serve(options.serve)
    if options.against:
        return against()
    logging.disable(logging.CRITICAL)

    from rewards import symbolic  # only a worker imports this otherwise

    leaf = compare.Leaf(symbolic.equal_expressions)

    def in_this_process(completion: str, gold: str) -> object:
        return compare.compare(final_answers(completion), gold, leaf)

    def plain(completion: str, gold: str) -> object:
        return verify(parse(f"\\boxed{{{gold}}}"), parse(completion))

    sys.stdout.write(
        f"{'items a second':<16}{'ours, one process':>20}{'ours, 1 worker':>18}{'math-verify':>14}{'asked for':>12}\n"
    )
    with Verifier(workers=1, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        verifier.grade("\\boxed{x+1}", "1+x+0")  # the worker's start is not counted
        for name, items, target in (("integers", integers, 20_000), ("mixed", mixed, 150)):
            rates = (
                rate(in_this_process, items(), seconds),
                worker_rate(verifier, items(), seconds),
                rate(plain, items(), seconds),
            )
            sys.stdout.write(f"{name:<16}{rates[0]:>20,.0f}{rates[1]:>18,.0f}{rates[2]:>14,.0f}{target:>12,}\n")


if __name__ == "__main__":
    main()
