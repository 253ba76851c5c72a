"""Grade broken and hostile answers: nothing may come out but a Grade, in time, and never a reward.

    make fuzz                                                       # two minutes
    PYTHONPATH=. python tests/fuzzing.py --minutes 2 [--seed 7]

Inputs are random chains of LaTeX fragments, control characters, code, deep nesting and long runs, in boxes, on
"Answer:" lines, after open and closed thinking. No fragment spells the gold, so every reward is a mistake. After each
batch an ordinary item must be graded right. A failure prints the input and the seed, and exits with status 1. Time is
processor time of the caller, which nothing else limits; a worker's is limited by the kernel.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from rewards import Verifier, vote_key

GOLD = "90210.53171"
LIMIT_S = 2.0  # processor time of the caller for a single item
ORDINARY = ("so $\\boxed{2\\sqrt{2}+x}$", "x+\\sqrt8")

FRAGMENTS = (
    r"""
0 1 2 7 9 42 999 0.5 .5 1e9 1e999 3,000 x y z n i e a_1 + - * / ^ _ = < > \leq \neq \in \cup \pm \mp , ; : . !
!! ' " | || ( ) [ ] { } \{ \} \left( \right) \langle \rangle \frac \frac12 \frac{1}{2} \frac{ \sqrt \sqrt{2}
\sqrt[3]{ ^{ _{ ^2 ^{10} ^{9^9} ** \pi \infty \emptyset \mathbb{R} \sin \cos \ln \log \log_2 \exp \binom{5}{2}
\binom \int \sum_{k=1}^{9} \lim \prod \det \gcd \overline{3} \bar \dot{1} \ldots ... % \% $ \$ $$ \( \) \[ \] °
^\circ \degree \text{cm} \text{ \text \mathrm{ \mathbf{ cm seconds \begin{pmatrix} \end{pmatrix} \begin{ \end{ &
\\ \\\\ \boxed{ \boxed \fbox{ \phantom{ and or not <think> </think> Answer: answer \over \color{red} \underline{
\approx \mod \operatorname{ \vec \, \! ~ \quad ** ` # million percent per square
\begin{cases} \end{cases} \setminus \equiv \pmod{ \bmod \choose x= (x,y)= f'(x)= 万 厘米 ± ½ ² √ ∞ − 😀 ✅
__import__('os')
""".split()
    + ["\x00", "\ud800", "\udfff", "\u202e", "\u0661", "\n", " ", "\t", "\r"]
)
FRAMES = r"\boxed{%s} $\boxed{%s}$ Answer:%s Answer:$%s$ <think>%s</think>\boxed{%s} %s \boxed{%s}or\boxed{%s}".split()


def random_answer(rng: random.Random) -> str:
    """A chain of fragments, sometimes with one of them repeated many times or wrapped around the rest."""
    parts = [rng.choice(FRAGMENTS) for _ in range(rng.choice((1, 2, 3, 5, 8, 13, 40)))]
    if rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(FRAGMENTS) * rng.choice((10, 100, 1000)))
    text = rng.choice(("", " ")).join(parts)
    if rng.random() < 0.15:
        opening, closing = rng.choice(("( )", "{ }", "\\sqrt{ }", "\\frac{1}{ }", "\\sin( )", "x^{ }")).split()
        times = rng.choice((3, 8, 12, 60))
        text = opening * times + text + closing * times
    return text


def fuzz(verifier: Verifier, seed: int, batch: int, go_on: Callable[[int], bool]) -> tuple[Counter[str], str | None]:
    """(how often each reason came, what went wrong or None). Grades batches while `go_on(number of items)`."""
    rng, reasons = random.Random(seed), Counter()
    while go_on(reasons.total()):
        for _ in range(batch):
            completion = rng.choice(FRAMES).replace("%s", random_answer(rng))
            start = time.thread_time()
            grade = verifier.grade(completion, GOLD)
            took = time.thread_time() - start
            reasons[grade.reason] += 1
            if grade.correct or took > LIMIT_S:
                return reasons, f"{'paid for' if grade.correct else f'{took:.1f} s for'} {completion!r}"
            vote_key(grade.extracted or "")
            verifier.grade("\\boxed{42}", completion)  # as a gold it must not raise either
        if not verifier.grade(*ORDINARY).correct:
            return reasons, "an ordinary item was graded wrong after this batch"
    return reasons, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with Verifier(workers=2, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        stop = time.monotonic() + 60 * options.minutes
        reasons, trouble = fuzz(verifier, options.seed, batch=20, go_on=lambda _: time.monotonic() < stop)
    sys.stdout.write(f"seed {options.seed}: {reasons.total()} items, {dict(reasons.most_common())}\n")
    if trouble:
        sys.stdout.write(f"FAILED: {trouble}\n")
    return int(trouble is not None)


if __name__ == "__main__":
    sys.exit(main())
