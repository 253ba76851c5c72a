"""Report of runs in one HTML file: curves, responses with the numbers of every token, and a card per run.

    python -m eval.report runs/grpo runs/band --out runs/report.html

The file needs no network and no server. Runs are grouped by configuration and seed as in eval/compare.py. It reads
metrics.jsonl, config.yaml, environment.json, and samples/step_*.jsonl, one response per line (docs/evaluation.md).

All data is in the page as gzip in base64, so nothing in an answer can act as HTML. The tokens of an answer are unpacked
when it is opened, which keeps a page of many megabytes fast.
A running run is shown as it is now; write the report again to see more.
"""

import argparse
import base64
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from configs.schema import Config
from eval.compare import REPEAT_KEYS, Group, Parser, group_runs, keys_of, panel_of
from eval.plots import describe, line_style, spread
from eval.records import Record, load_record, read_lines

TEMPLATES = Path(__file__).with_suffix("")  # eval/report/
MAX_SAMPLE_BYTES = 250 * 2**20  # of samples/ in one page, which then has some 50 MB and opens in a second or two
AT_A_GLANCE = (
    "train/entropy",
    r"eval/.+/mean@\d+",
    "reward/mean",
    "ratio/max",
    "optim/grad_norm",
    r"throughput/.+_per_s",
)
CLIPPED = {
    "Clipped at the upper bound, by old probability": r"clip/up(/.+)?",
    "Clipped at the lower bound, by old probability": r"clip/down(/.+)?",
}
TEXTS = ("problem", "answer", "gold", "extracted", "reason")
TOKEN_LISTS = ("token_ids", "rollout_logprobs", "old_logprobs", "logprobs", "entropy", "weight")
INTERVAL = ("lower", "upper")  # rules that give a weight instead have none


def write_report(run_folders: Sequence[Path], out: Path, steps: Sequence[int] | None = None) -> None:
    """Write the page of these runs to `out`.

    steps: whose answers are in the page; None for all of them, or every k-th, the last one included, where all would
    be more than MAX_SAMPLE_BYTES. Broken lines and missing files are said on the page and left out.
    Raises ValueError for a path that is no folder, no paths at all, or steps without answers.
    """
    if not run_folders:
        raise ValueError("give at least one run folder, such as runs/NAME")
    folders = list(dict.fromkeys(Path(folder) for folder in run_folders))
    runs = [load_record(folder) for folder in folders]
    groups = group_runs(runs)
    files = [_sample_files(run.path) for run in runs]
    logged = sorted({step for of_run in files for step in of_run})
    if steps is not None and (unknown := sorted(set(steps) - set(logged))):
        raise ValueError(f"steps: {unknown} have no answers; there are answers of {logged}")
    shown = sorted(set(steps)) if steps is not None else _steps_that_fit(files)

    notes = [list(run.notes) for run in runs]
    answers, tokens = _answers(files, shown, notes)
    styles = [line_style(number) for number in range(len(groups))]
    index = {
        "groups": [
            {"label": group.label, "runs": [run.name for run in group.runs], "colour": colour, "dash": dash}
            for group, (colour, dash) in zip(groups, styles, strict=True)
        ],
        "runs": [run.name for run in runs],
        "sections": _sections(groups),
        "answers": answers,
    }
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    text = page.render(
        title=", ".join(run.name for run in runs) if len(runs) < 4 else ", ".join(group.label for group in groups),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        # The browser runs this script and no other, whatever else the page may hold.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        cards=[_card(run, runs, lines) for run, lines in zip(runs, notes, strict=True)],
        answers=len(answers),
        with_tokens=sum(map(bool, tokens)),
        left_out=len(logged) - len(shown),
        steps=len(logged),
        index=_pack(index),
        tokens=tokens,
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name may hold half a surrogate pair


# Curves


def _sections(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What is read first, the clipped shares (`bins`, on one scale), and all other metrics, folded, by their family."""
    keys = [key for key in keys_of(groups) if not key.endswith("_stderr")]
    glance = [key for pattern in AT_A_GLANCE for key in keys if re.fullmatch(pattern, key)]
    bins = {title: [key for key in keys if re.fullmatch(pattern, key)] for title, pattern in CLIPPED.items()}
    shown = {key for members in (glance, *bins.values()) for key in members}
    folded: dict[str, list[str]] = {}
    for key in keys:
        if key not in shown:
            folded.setdefault(describe(key)[0], []).append(key)
    sections = [("At a glance", "glance", glance)]
    sections += [(title, "bins", members) for title, members in bins.items()]
    sections += [(f"More of {family.replace('_', ' ')}", "folded", members) for family, members in folded.items()]
    return [
        {"title": title, "kind": kind, "panels": [panel for key in members if (panel := _panel(groups, key, kind))]}
        for title, kind, members in sections
        if members
    ]


def _panel(groups: Sequence[Group], key: str, kind: str) -> dict[str, Any] | None:
    """A line per group: the mean over its seeds with their range, or of one seed with its standard error."""
    panel, numbers = panel_of(groups, key), {group.label: number for number, group in enumerate(groups)}
    if panel is None:
        return None
    curves = []
    for curve in panel.curves:
        steps, mean, low, high = spread(curve)
        several = len(curve.seeds) > 1
        curves.append(
            {
                "group": numbers[curve.label],
                "steps": steps.tolist(),
                "mean": _digits(mean, 6),
                "low": _digits(low, 6),
                "high": _digits(high, 6),
                "spread": "seeds" if several else "stderr" if curve.stderr else "",
                "seeds": [[at.tolist(), _digits(values, 6)] for at, values in curve.seeds] if several else [],
            }
        )
    title = (describe(key)[3] or "all tokens") if kind == "bins" else panel.title  # the section's heading says the rest
    return {"key": key, "title": title, "unit": panel.unit, "curves": curves}


# Answers


def _sample_files(run_folder: Path) -> dict[int, Path]:
    """Step -> its file of answers, steps ascending."""
    found = [(re.fullmatch(r"step_(\d+)\.jsonl", path.name), path) for path in (run_folder / "samples").glob("*")]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _steps_that_fit(files: Sequence[dict[int, Path]]) -> list[int]:
    """All steps, or every k-th counted back from the last, with the smallest k that keeps within MAX_SAMPLE_BYTES."""
    sizes: dict[int, int] = {}
    for of_run in files:
        for step, path in of_run.items():
            sizes[step] = sizes.get(step, 0) + path.stat().st_size
    for stride in count(1):
        kept = sorted(sizes)[::-1][::stride]
        if len(kept) <= 1 or sum(sizes[step] for step in kept) <= MAX_SAMPLE_BYTES:
            return kept[::-1]
    raise AssertionError("unreachable")


def _answers(
    files: Sequence[dict[int, Path]], steps: Sequence[int], notes: Sequence[list[str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every answer of these steps, and its tokens packed ("" without); what is odd joins the notes of its run."""
    answers, tokens = [], []
    for number, of_run in enumerate(files):
        for step in steps:
            for row in read_lines(of_run[step], "answer", str, notes[number]) if step in of_run else []:
                lists = _token_lists(row, of_run[step].name, notes[number])
                answers.append(_answer(row, number, step, lists))
                tokens.append(_pack(lists) if lists else "")
    return answers, tokens


def _answer(row: dict[str, Any], run: int, step: int, lists: dict[str, list[Any]] | None) -> dict[str, Any]:
    """What the list of answers and the head of an opened one show; None for what the file does not have."""
    texts = {key: None if row.get(key) is None else str(row[key]) for key in TEXTS}
    others = {key: row.get(key) for key in ("reward", "advantage", "tokens", "correct", "truncated")}
    if isinstance(others["advantage"], list):  # one per token
        others["advantage"] = float(np.mean(others["advantage"])) if others["advantage"] else None
    clips = lists["clip"] if lists else None
    return {
        **texts,
        **{
            key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in others.items()
        },
        "run": run,
        "step": step,
        "prompt": str(row.get("prompt_id") or row.get("problem")),  # equal for answers that can be put side by side
        "up": clips.count(1) if clips else None,
        "down": clips.count(-1) if clips else None,
    }


def _token_lists(row: dict[str, Any], name: str, notes: list[str]) -> dict[str, list[Any]] | None:
    """The numbers of every token as the page shows them, four significant digits; None where the row has none.

    `r` is exp(logprobs - old_logprobs). `clip` is 1 for A > 0 and r > upper, -1 for A < 0 and r < lower, else 0; of a
    rule without an interval, the sign of A where the weight is 0. None in a list is a number that is not finite, or no
    bound.
    """
    texts = row.get("token_texts")
    if texts is None:
        note = "answers without numbers for their tokens are shown as plain text"
        if note not in notes:
            notes.append(note)
        return None
    has_interval = any(key in row for key in INTERVAL)
    lists = {key: row.get(key) for key in (*TOKEN_LISTS, *(INTERVAL if has_interval else ()))}
    wrong = [key for key, values in lists.items() if not isinstance(values, list) or len(values) != len(texts)]
    if wrong:
        notes.append(f"{name}: {', '.join(wrong)} not as long as token_texts ({len(texts)}); shown without colours")
        return None

    def column(key: str, missing: float) -> np.ndarray:
        values = lists.get(key) or [None] * len(texts)
        return np.array([missing if value is None else value for value in values], dtype=float)  # (T,)

    old, weight = column("old_logprobs", np.nan), column("weight", np.nan)
    sign = np.sign(np.broadcast_to(row.get("advantage") or 0.0, len(texts))).astype(int)  # (T,)
    lower, upper = column("lower", -np.inf), column("upper", np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(column("logprobs", np.nan) - old)
    clipped = np.where(sign > 0, ratio > upper, ratio < lower) if has_interval else weight == 0
    return {
        "text": texts,
        "id": row["token_ids"],
        "p": _digits(np.exp(old), 4),
        "rollout": _digits(np.exp(column("rollout_logprobs", np.nan)), 4),
        "r": _digits(ratio, 4),
        "lower": _digits(lower, 4),
        "upper": _digits(upper, 4),
        "weight": _digits(weight, 4),
        "entropy": _digits(column("entropy", np.nan), 4),
        "clip": (sign * clipped).tolist(),
    }


# Cards


def _card(run: Record, runs: Sequence[Record], notes: list[str]) -> dict[str, Any]:
    """What the run was: its notes, the keys of its config that are not the defaults, and environment.json."""
    defaults = asdict(Config())
    differing = {key for other in runs for key in run.config if other.config.get(key) != run.config[key]}
    differing -= set(REPEAT_KEYS)
    told = [key for key in run.config if key in differing or key not in defaults or run.config[key] != defaults[key]]
    told.sort(key=lambda key: key not in differing)
    known = {field.name: run.config[field.name] for field in fields(Config) if field.name in run.config}
    warnings = [*notes, *Config(**known).warnings()]
    environment: dict[str, Any] = {}
    try:
        environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        warnings.append("no environment.json")
    except (ValueError, RecursionError) as error:
        warnings.append(f"environment.json cannot be read ({error})")
    warnings += environment.get("warnings", [])
    hardware = environment.get("hardware", {})
    gpus = [f"{gpu.get('name')} ({gpu.get('memory_gib')} GiB)" for gpu in hardware.get("gpus", [])]
    machine = [hardware.get("cpu"), f"{hardware.get('cores')} cores", f"{hardware.get('memory_gib')} GiB", *gpus]
    git = environment.get("git", {})
    launches = len(environment.get("earlier_launches", []))
    facts = {
        "command": " ".join(environment.get("command", [])),
        "started": environment.get("time", "") + (f", after {launches} earlier launches" if launches else ""),
        "commit": (git.get("commit") or "") + (" with uncommitted changes" if git.get("dirty") else ""),
        "hardware": ", ".join(map(str, machine)) if hardware else "",
        "python": f"{environment.get('python', '')} on {environment['platform']}" if "platform" in environment else "",
        "packages": ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
    }
    return {
        "name": run.name,
        "last_step": run.last_step,
        "warnings": warnings,
        "facts": {name: text for name, text in facts.items() if text},
        "config": [(key, run.config[key], defaults.get(key, ""), key in differing) for key in told],
    }


# Numbers and bytes


def _digits(values: np.ndarray, digits: int) -> list[float | None]:
    """With `digits` significant digits; None for what is not finite."""
    with np.errstate(all="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * scale) / scale
    rounded = np.where(np.isfinite(rounded), rounded, values)  # zero has no leading digit
    return [value if abs(value) < np.inf else None for value in rounded.tolist()]


def _pack(value: Any) -> str:
    """JSON, gzip, base64: short, without characters that HTML treats specially."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode(), 3, mtime=0)).decode()


def steps_of(text: str) -> list[int]:
    """What --steps names: 10,20,200."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps such as 10,20,200")
    return [int(step) for step in text.split(",")]


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval.report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's group is the reference")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page; without it report.html in the run's folder, of several beside it",
    )
    parser.add_argument(
        "--steps", type=steps_of, help="whose answers to show, such as 10,20,200; without it all that fit"
    )
    args = parser.parse_args(argv)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else args.runs[0].parent) / "report.html"
    try:
        write_report(args.runs, out, args.steps)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
