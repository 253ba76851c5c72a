"""How right is the verifier on a labelled set? False positives and negatives by kind, every mistake listed.

    python -m rewards.check tests/data/verifier_cases.jsonl [--grader math|answer_line|FILE.py:FUNCTION] [--workers N]

Each line of the file: {"completion": str, "gold": str, "expected": bool, "kind": str (optional)}. Exit status 1 when
there was a false positive: paying for a wrong answer is the mistake that a policy learns to repeat.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from . import Grade, GraderError, Verifier


class Case(NamedTuple):
    completion: str
    gold: str
    expected: bool
    kind: str


def read_cases(path: Path) -> list[Case]:
    """The cases of a JSONL file. Raises ValueError naming the line that is not a case."""
    cases = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        missing = ", ".join(sorted({"completion", "gold", "expected"} - row.keys()))
        if missing:
            raise ValueError(f"{path} line {number}: without {missing}; see `python -m rewards.check -h`")
        cases.append(Case(row["completion"], row["gold"], bool(row["expected"]), row.get("kind", "-")))
    return cases


def report(cases: list[Case], grades: list[Grade]) -> str:
    """The table: cases, accuracy, false positives and negatives by kind, then each mistake on a line of its own."""
    counts: dict[str, Counter[str]] = {}
    mistakes = []
    for case, grade in zip(cases, grades, strict=True):
        outcome = "ok" if grade.correct == case.expected else "FP" if grade.correct else "FN"
        for kind in (case.kind, "all"):
            counts.setdefault(kind, Counter())[outcome] += 1
        if outcome != "ok":
            said = f"{grade.reason}, read {grade.extracted!r:.80}"
            mistakes.append(f"{outcome} {case.kind}: {case.completion[-120:]!r} gold {case.gold[:80]!r} ({said})")
    lines = [f"{'kind':<16}{'cases':>7}{'accuracy':>10}{'FP':>5}{'FN':>5}"]
    for kind in sorted(counts, key=lambda kind: (kind == "all", kind)):
        ok, paid, refused, total = *(counts[kind][outcome] for outcome in ("ok", "FP", "FN")), counts[kind].total()
        lines.append(f"{kind:<16}{total:>7}{ok / total:>10.4f}{paid:>5}{refused:>5}")
    reasons = Counter(grade.reason for grade in grades)
    lines.append("reasons: " + ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()))
    return "\n".join([*lines, *mistakes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--grader", default="math")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout_s", type=float, default=2.0)
    options = parser.parse_args()
    cases = read_cases(options.file)
    try:
        with Verifier(options.workers, options.timeout_s, memory_gib=2.0, grader=options.grader) as verifier:
            grades = verifier.collect([verifier.submit(case.completion, case.gold) for case in cases])
    except (GraderError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(report(cases, grades) + "\n")
    return int(any(grade.correct and not case.expected for case, grade in zip(cases, grades, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
