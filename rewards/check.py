"""Measure the verifier on a labelled set: false positives and negatives by kind, with a list of all errors.

    python -m rewards.check tests/rewards/verifier_cases.jsonl [--grader math|answer_line|FILE.py:FUNCTION]

Each line of the file: {"completion": str, "gold": str, "expected": bool}, optionally "kind" and "problem" (text of the
problem). Exit code: 1 for a false positive, which a policy would learn to exploit; 2 for an invalid file or option.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import Grade, GraderError, Verifier


class Case(NamedTuple):
    """One labelled completion."""

    completion: str
    gold: str
    expected: bool
    kind: str
    problem: str

    def about(self) -> dict[str, dict[str, str]]:
        """Return the `about` argument of `Verifier.submit`."""
        return {"problem": {"problem": self.problem}}


def read_cases(path: Path) -> list[Case]:
    """Load the cases of a JSONL file. Raises ValueError with the number of an invalid line."""
    cases = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: not JSON ({error})") from None
        texts = isinstance(row, dict) and [row.get("completion"), row.get("gold")]
        if not texts or not all(isinstance(text, str) for text in texts) or row.get("expected") not in (True, False):
            raise ValueError(f"{path} line {number}: completion and gold must be texts, and expected a bool")
        kind, problem = row.get("kind", "-"), row.get("problem", "")
        cases.append(Case(row["completion"], row["gold"], bool(row["expected"]), kind, problem))
    return cases


def report(cases: list[Case], grades: list[Grade]) -> str:
    """Format the table of cases, accuracy, false positives and negatives by kind, then one line per error."""
    counts: dict[str, Counter[str]] = {}
    mistakes = []
    for case, grade in zip(cases, grades, strict=True):
        outcome = "ok" if grade.correct == case.expected else "FP" if grade.correct else "FN"
        for kind in (case.kind, "all"):
            counts.setdefault(kind, Counter())[outcome] += 1
        if outcome != "ok":
            reading = f"{grade.reason}, read {grade.extracted!r:.80}"
            mistakes.append(f"{outcome} {case.kind}: {case.completion[-120:]!r} gold {case.gold[:80]!r} ({reading})")
    lines = [f"{'kind':<16}{'cases':>7}{'accuracy':>10}{'FP':>5}{'FN':>5}"]
    for kind in sorted(counts, key=lambda kind: (kind == "all", kind)):
        ok, paid, refused, total = *(counts[kind][outcome] for outcome in ("ok", "FP", "FN")), counts[kind].total()
        lines.append(f"{kind:<16}{total:>7}{ok / total:>10.4f}{paid:>5}{refused:>5}")
    reasons = Counter(grade.reason for grade in grades)
    lines.append("reasons: " + ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()))
    return "\n".join([*lines, *mistakes])


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 1 after a false positive, 2 for an invalid file or option."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSONL file, as above")
    parser.add_argument("--grader", default="math", help="math (default), answer_line or FILE.py:FUNCTION")
    parser.add_argument("--workers", type=int, default=2, help="grading processes (default 2)")
    parser.add_argument(
        "--timeout_s", type=float, default=2.0, help="CPU time limit per response, in seconds (default 2)"
    )
    options = parser.parse_args(argv)
    try:
        cases = read_cases(options.file)
        with Verifier(options.workers, options.timeout_s, memory_gib=2.0, grader=options.grader) as verifier:
            grades = verifier.collect([verifier.submit(case.completion, case.gold, case.about()) for case in cases])
    except (ValueError, OSError, GraderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(cases, grades))
    return int(any(grade.correct and not case.expected for case, grade in zip(cases, grades, strict=True)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
