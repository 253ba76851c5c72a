"""How many answers a second does the verifier grade on one core, against plain math-verify in the same run?

    python -m bench.verifier [--seconds 5]

Two kinds of item, each completion a solution of some 600 characters with a box at its end:
    integers    a right or wrong integer: the fast path, no process. Asked for: 20,000 a second.
    mixed       kinds in MATH's proportions: six in ten are numbers, the rest surds, expressions, intervals, matrices,
                text. Asked for: 850 a second.
"ours, one process" runs extraction, comparison and algebra in this process; "ours, 1 worker" is the Verifier as a run
uses it, wall clock, warm. "math-verify" is verify(parse(boxed gold), parse(completion)), its time limits on.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator

from math_verify import parse, verify

from rewards import Verifier
from rewards.math import compare
from rewards.math.extract import final_answers

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    options = parser.parse_args()
    seconds = options.seconds
    logging.disable(logging.CRITICAL)

    from rewards.math import symbolic  # only a worker imports this otherwise

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
        for name, items, target in (("integers", integers, 20_000), ("mixed", mixed, 850)):
            rates = (
                rate(in_this_process, items(), seconds),
                worker_rate(verifier, items(), seconds),
                rate(plain, items(), seconds),
            )
            sys.stdout.write(f"{name:<16}{rates[0]:>20,.0f}{rates[1]:>18,.0f}{rates[2]:>14,.0f}{target:>12,}\n")


if __name__ == "__main__":
    main()
