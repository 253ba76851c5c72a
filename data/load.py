"""Named sets, local files and mixtures of them -> cleaned `Problem`s, with a count of all that was dropped and why.

    report = load_problems(["dapo_math_17k", "math_train_l3_5"])
    print("\n".join(report.lines))

A set is a name of data/registry.py, a local path, `name=path` (a local copy of a known set: its split, levels and
expected count apply), or a generated set: toy_... (data/toy.py), arith_... (data/arithmetic.py). Left out: comparing
golds with answers, which needs rewards/.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.formats import Parsed, find_layout
from data.problem import Problem
from data.registry import SETS, SetSpec, set_name
from data.tables import SUFFIXES, Table, read_hub, read_local


@dataclass(frozen=True)
class LoadReport:
    """problems: in published order, set after set. dropped: reason -> rows. lines: to print; warnings say "warning"."""

    problems: list[Problem]
    dropped: dict[str, int]
    lines: list[str]


def load_problems(sets: str | Sequence[str]) -> LoadReport:
    """Load one set, or a mixture: every problem once, in order; data/order.py shuffles.

    Raises ValueError for an unknown set, an unreachable hub, an unreadable file, a set with nothing left in it, and
    two sets with one name. Problems found in two sets of a mixture are kept in both, and counted in a line.
    """
    names = [sets] if isinstance(sets, str) else list(sets)
    if not names:
        raise ValueError(f"no set is named; known sets: {', '.join(SETS)}, or a path")
    twice = [name for name, count in Counter(map(set_name, names)).items() if count > 1]
    if twice:
        raise ValueError(f"two sets of {names} are called {twice[0]!r}; name each once, rename a file if need be")
    reports = [_load_one(name) for name in names]
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    problems = [problem for report in reports for problem in report.problems]
    lines = [line for report in reports for line in report.lines]
    shared = len(problems) - len({problem.problem for problem in problems})
    if shared:
        lines.append(f"note: {shared:,} problems are in more than one of these sets and stay in each")
    return LoadReport(problems, dict(dropped), lines)


def shared_problems(train: Sequence[Problem], held_out: Sequence[Problem]) -> list[str]:
    """Ids of the held-out problems whose text is also a training problem, letter case and white space aside."""
    texts = {_squeeze(problem.problem) for problem in train}
    return [problem.id for problem in held_out if _squeeze(problem.problem) in texts]


def _squeeze(text: str) -> str:
    return "".join(text.lower().split())


def _load_one(name: str) -> LoadReport:
    left, _, right = name.partition("=")
    exists = Path(name).expanduser().exists()
    is_path = exists or (name.endswith(SUFFIXES) or "/" in name) and not (right and "/" not in left)
    if name in SETS:
        spec = SETS[name]
        table = read_hub(name, spec)
    elif right and left in SETS:
        spec = SETS[left]
        table = read_local(Path(right).expanduser(), spec.split, spec.config)
    elif name.startswith(("toy", "arith")) and not is_path:
        from data.arithmetic import arithmetic_problems
        from data.toy import toy_problems

        problems = list(toy_problems(name) if name.startswith("toy") else arithmetic_problems(name))
        return LoadReport(problems, {}, [f"{name}: {len(problems):,} problems, generated"])
    elif is_path:
        spec = None
        table = read_local(Path(name).expanduser(), None, None)
    else:
        raise ValueError(
            f"unknown set {name!r}. Known: {', '.join(SETS)}, toy_..., arith_...; or the path of a file or folder "
            f"({', '.join(SUFFIXES)}); or NAME=PATH for a local copy of a known set."
        )
    return _clean(table, set_name(name), spec)


def _clean(table: Table, source: str, spec: SetSpec | None) -> LoadReport:
    """Parse every row, drop what cannot be trained on or graded, keep one of each problem. Rows = kept + dropped."""
    levels = spec.levels if spec else None
    try:
        layout = find_layout(table.columns)
    except ValueError as error:
        raise ValueError(f"{table.where}: {error}") from error
    if levels and "level" not in table.columns:
        raise ValueError(f"{table.where}: {source} needs column 'level' to keep levels {levels}; found {table.columns}")

    first: dict[str, Problem] = {}  # by problem text
    copies: Counter[str] = Counter()
    conflicting: set[str] = set()
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    ids: set[str] = set()
    n_rows = 0
    for n_rows, row in enumerate(table.rows(layout.columns(table.columns)), 1):
        try:
            parsed = layout.parse(row)
            _check_text(parsed)
        except ValueError as error:
            raise ValueError(
                f"{table.where}, row {n_rows}: {error} (read as {layout.name}). Correct or remove the row."
            ) from error
        reason = _reason_to_drop(parsed, levels)
        if reason:
            dropped[reason] += 1
            continue
        copies[parsed.problem] += 1
        if parsed.problem in first:
            if first[parsed.problem].gold != parsed.gold:
                conflicting.add(parsed.problem)
            continue
        if parsed.note:
            notes[parsed.note] += 1
        id = f"{source}/{n_rows - 1 if parsed.key is None else parsed.key}"
        id = f"{id}#{n_rows - 1}" if id in ids else id
        ids.add(id)
        first[parsed.problem] = Problem(id, parsed.problem, parsed.gold, source, parsed.level)

    if conflicting:
        dropped["conflicting gold"] = sum(copies[text] for text in conflicting)
    problems = [problem for text, problem in first.items() if text not in conflicting]
    duplicates = sum(copies.values()) - dropped["conflicting gold"] - len(problems)
    dropped = +(dropped + Counter({"duplicate": duplicates}))
    assert len(problems) + dropped.total() == n_rows, "every row is kept or counted"
    why = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    if not problems:
        raise ValueError(f"{table.where}: no problem left of {n_rows:,} rows" + (f" (dropped: {why})" if why else ""))
    lines = [f"{source}: {n_rows:,} rows -> {len(problems):,} problems from {table.where}"]
    lines[0] += f" (dropped: {why})" if why else ""
    lines += [f"{source}: {count:,} problems {note}" for note, count in notes.items()]
    if spec:
        lines += _compare(source, "rows", n_rows, spec.rows)
        lines += _compare(source, "problems", len(problems), spec.problems)
    return LoadReport(problems, dict(dropped), lines)


def _check_text(parsed: Parsed) -> None:
    """Raise ValueError for half of a surrogate pair, as JSON may spell it: no tokenizer and no file takes it."""
    for what, text in (("problem", parsed.problem), ("gold answer", parsed.gold), ("id", str(parsed.key))):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise ValueError(f"the {what} holds half of a surrogate pair, {half}, which is not text") from None


def _reason_to_drop(parsed: Parsed, levels: tuple[int, ...] | None) -> str | None:
    if levels and parsed.level not in levels:
        return f"outside levels {levels[0]}-{levels[-1]}"
    if not parsed.problem:
        return "empty problem"
    return None if parsed.gold else "empty gold"


def _compare(source: str, what: str, found: int, published: int | None) -> list[str]:
    if published is None or found == published:
        return []
    return [
        f"warning: {source}: {found:,} {what}, not the {published:,} published; the upload or this copy has changed"
    ]
