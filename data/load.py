"""Loading of named sets, hub data sets, local files and mixtures as cleaned `Problem`s, with counts of dropped rows.

    report = load_problems(["dapo_math_17k", "org/name:train", "mine.jsonl"])
    print("\n".join(report.lines))

A set is a name of data/registry.py, ORG/NAME[[:CONFIG]:SPLIT] of the hub, a local path, `name=path` (a local copy of a
known set: its split, levels and expected count apply), or a generated set: toy_... (data/toy.py), arith_...
(data/arithmetic.py). Golds are verified elsewhere, since this needs rewards/.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.formats import OTHER_COLUMNS, find_columns, parse
from data.problem import Problem
from data.registry import SETS, SUFFIXES, SetSpec, check_names, is_hub_id, set_name, split_name
from data.tables import HubUnreachable, Table, read_hub, read_local


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_problems`.

    problems: in published order, set after set. dropped: reason -> number of rows. lines: text to print.
    """

    problems: list[Problem]
    dropped: dict[str, int]
    lines: list[str]


def load_problems(
    sets: str | Sequence[str],
    *,
    prefer: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    keep_rows: bool = True,
    key: str = "train_data",
) -> LoadReport:
    """Load one set or a mixture: every problem of a set once, in order. data/order.py shuffles.

    prefer: split to use if a set has several and its name has none. prompt_column, answer_column: columns of sets
    outside the registry; None: detect. keep_rows: fill `Problem.row`. key: option with the sets, named by errors.
    Problems in two sets of a mixture are kept in both, and a line gives their number.
    Raises ValueError for an unknown set, an unreachable hub, an unreadable file, a set without usable problems, and
    two sets with the same name.
    """
    names = [sets] if isinstance(sets, str) else list(sets)
    check_names(key, names)
    try:
        reports = [_load_one(name, prefer, prompt_column, answer_column, keep_rows) for name in names]
    except HubUnreachable:
        raise
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    problems = [problem for report in reports for problem in report.problems]
    lines = [line for report in reports for line in report.lines]
    shared = len(problems) - len({problem.problem for problem in problems})
    if shared and len(names) > 1:
        lines.append(f"note: {shared:,} problems are in more than one of these sets and stay in each")
    return LoadReport(problems, dict(sum((Counter(report.dropped) for report in reports), Counter())), lines)


def shared_problems(train: Sequence[Problem], held_out: Sequence[Problem]) -> list[str]:
    """Return ids of held-out problems that are also training problems, ignoring letter case and white space."""
    texts = {_squeeze(problem.problem) for problem in train}
    return [problem.id for problem in held_out if _squeeze(problem.problem) in texts]


def _squeeze(text: str) -> str:
    return "".join(text.lower().split())


def _load_one(
    name: str, prefer: str, prompt_column: str | None, answer_column: str | None, keep_rows: bool
) -> LoadReport:
    left, _, path = name.partition("=")
    if left in SETS:
        spec = SETS[left]
        if path:
            table = read_local(Path(path).expanduser(), spec.config, None, spec.split)
        else:
            table = read_hub(name, spec.hub_id, spec.config, spec.split, spec.split)
        return _clean(table, left, spec, None, None, keep_rows)
    if generated := _generated(name):
        return LoadReport(generated, {}, [f"{name}: {len(generated):,} problems, generated"])
    place, config, split = split_name(name)
    if is_hub_id(place):
        table = read_hub(name, place, config, split, prefer)
    elif Path(place).expanduser().exists() or "/" in left or (not path and place.endswith(SUFFIXES)):
        table = read_local(Path(place).expanduser(), config, split, prefer)
    else:
        raise ValueError(
            f"unknown set {name!r}; use {', '.join(SETS)}, toy_... or arith_...; or ORG/NAME:CONFIG:SPLIT of the hub; "
            f"or a file or folder ({', '.join(SUFFIXES)}); or NAME=PATH for a local copy of a known set"
        )
    return _clean(table, set_name(name), None, prompt_column, answer_column, keep_rows)


def _generated(name: str) -> list[Problem]:
    """Return the problems of a generated set; [] for other names."""
    if not name.startswith(("toy_", "arith_")) or "/" in name or Path(name).exists() or name.endswith(SUFFIXES):
        return []
    from data.arithmetic import arithmetic_problems
    from data.toy import toy_problems

    return list(toy_problems(name) if name.startswith("toy") else arithmetic_problems(name))


def _clean(
    table: Table,
    source: str,
    spec: SetSpec | None,
    prompt_column: str | None,
    answer_column: str | None,
    keep_rows: bool,
) -> LoadReport:
    """Parse all rows, and drop unusable and duplicate problems. The report accounts for every row."""
    levels = spec.levels if spec else None
    question, answer = find_columns(table.where, table.columns, prompt_column, answer_column)
    if levels and "level" not in table.columns:
        raise ValueError(f"{table.where}: {source} needs column 'level' to keep levels {levels}; found {table.columns}")
    worked = not answer_column and answer == "solution" and question != "prompt"
    read = {column.partition(".")[0] for column in (question, answer)} | {question, answer, *OTHER_COLUMNS}

    first: dict[str, Problem] = {}  # text of the problem or conversation -> its first occurrence
    copies: Counter[str] = Counter()
    conflicting: set[str] = set()
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    ids: set[str] = set()
    n_rows = 0
    for n_rows, row in enumerate(table.rows([c for c in table.columns if keep_rows or c in read]), 1):
        try:
            problem, key, note = parse(row, question, answer, worked)
            texts = (problem.problem, problem.gold, str(key), *(turn["content"] for turn in problem.messages))
            "".join(texts).encode()  # raises UnicodeEncodeError for half of a surrogate pair, which JSON can escape
        except ValueError as error:
            raise ValueError(
                f"{table.where}, row {n_rows}: {error} (read as {question} + {answer}). Correct or remove the row."
            ) from error
        reason = "empty problem" if not problem.problem else "" if problem.gold else "empty gold"
        if levels and problem.level not in levels:
            reason = f"outside levels {levels[0]}-{levels[-1]}"
        if reason:
            dropped[reason] += 1
            continue
        text = f"{problem.problem}{problem.messages or ''}"
        copies[text] += 1
        if text in first:
            if first[text].gold != problem.gold:
                conflicting.add(text)
            continue
        notes[note] += 1
        id = f"{source}/{n_rows - 1 if key is None else key}"
        id = f"{id}#{n_rows - 1}" if id in ids else id
        ids.add(id)
        row_copy = json.loads(json.dumps(row, default=str)) if keep_rows else {}
        first[text] = replace(problem, id=id, source=source, row=row_copy)

    dropped["conflicting gold"] = sum(copies[text] for text in conflicting)
    problems = [problem for text, problem in first.items() if text not in conflicting]
    dropped["duplicate"] = sum(copies.values()) - dropped["conflicting gold"] - len(problems)
    dropped = +dropped  # without zeros
    why = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    why = f" (dropped: {why})" if why else ""
    if not problems:
        raise ValueError(f"{table.where}: no problem left of {n_rows:,} rows{why}")
    lines = [f"{source}: {n_rows:,} rows -> {len(problems):,} problems from {table.where}{why}"]
    lines += [f"{source}: {count:,} problems {note}" for note, count in notes.items() if note]
    for what, actual, published in (
        ("rows", n_rows, spec and spec.rows),
        ("problems", len(problems), spec and spec.problems),
    ):
        if published and actual != published:
            lines.append(
                f"warning: {source}: {actual:,} {what}, not the {published:,} published; the upload or this copy has "
                "changed"
            )
    return LoadReport(problems, dict(dropped), lines)
