"""Throughput of the verifier on one core, compared with plain math-verify in the same run.

    python -m bench.verifier [--seconds 5]

There are two kinds of items. Each completion is a solution of about 600 characters that ends with a box:
    integers    a correct or incorrect integer: the fast path without a worker. Target: 20,000 per second.
    mixed       kinds in the proportions of MATH: 60 % numbers, the rest surds, expressions, intervals, matrices, text.
                Target: 850 per second.
"ours, one process" runs extraction, comparison and algebra in this process. "ours, 1 worker" is the Verifier as used in
training, in wall-clock time after its start. "math-verify" is verify(parse(boxed gold), parse(completion)) with its
time limits.
"""

import argparse
import itertools
import logging
import time
from collections.abc import Callable, Iterator

from math_verify import parse, verify

from rewards import Verifier
from rewards.math import compare, symbolic
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
    """Generate groups of 8 samples per problem, as in training: 2 are correct, the others have distinct answers."""
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


def rate(grade: Callable[[list[Item]], object], items: Iterator[Item], seconds: float) -> float:
    """Measure items per second over at least `seconds`, without the time to generate the items."""
    done, spent = 0, 0.0
    while spent < seconds:
        batch = list(itertools.islice(items, 500))
        start = time.perf_counter()
        grade(batch)
        spent += time.perf_counter() - start
        done += len(batch)
    return done / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    seconds = parser.parse_args().seconds
    logging.disable(logging.CRITICAL)
    leaf = compare.Leaf(symbolic.equal_expressions)
    with Verifier(workers=1, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        verifier.grade("\\boxed{x+1}", "1+x+0")  # the worker's start is not counted
        ways: dict[str, Callable[[list[Item]], object]] = {
            "ours, one process": lambda batch: [
                compare.compare(final_answers(text), gold, leaf) for text, gold in batch
            ],
            "ours, 1 worker": lambda batch: verifier.collect([verifier.submit(text, gold) for text, gold in batch]),
            "math-verify": lambda batch: [verify(parse(f"\\boxed{{{gold}}}"), parse(text)) for text, gold in batch],
        }
        print(f"{'items per second':<18}" + "".join(f"{name:>20}" for name in ways))
        for items in (integers, mixed):
            rates = [rate(grade, items(), seconds) for grade in ways.values()]
            print(f"{items.__name__:<18}" + "".join(f"{value:>20,.0f}" for value in rates), flush=True)


if __name__ == "__main__":
    main()
