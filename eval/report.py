"""Report of runs in one HTML file: curves, responses with per-token statistics, and a card per run.

    python -m eval.report runs/grpo runs/band --out runs/report.html

The file needs no network and no server. Runs that differ only in seed are grouped as in eval/compare.py. It reads
metrics.jsonl, config.yaml, environment.json, and samples/step_*.jsonl, one response per line (docs/evaluation.md).

The page holds all data as base64-encoded gzip, so no response can act as HTML. The tokens of a response are unpacked
when it is opened, which keeps large pages fast. For a run in progress, the report shows the steps so far.
"""

import base64
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from configs.schema import Config
from data.tables import read_json_object
from eval.compare import REPEAT_KEYS, Parser, group_runs, keys_of
from eval.plots import Group, describe, line_style, panel_of, spread
from eval.records import Record, load_record, read_lines

TEMPLATES = Path(__file__).with_suffix("")  # eval/report/
MAX_SAMPLE_BYTES = 250 * 2**20  # of samples/ in one page, which is then about 50 MB and opens in 1 to 2 s
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
SHOWN = ("problem", "answer", "gold", "extracted", "reason", "reward", "advantage", "tokens", "correct", "truncated")
TOKEN_LISTS = ("token_texts", "token_ids", "rollout_logprobs", "old_logprobs", "logprobs", "entropy", "weight", "clip")
FACTS = ("command", "time", "git", "hardware", "python", "platform", "packages")  # keys of environment.json


def write_report(run_folders: Sequence[Path], out: Path, steps: Sequence[int] = ()) -> None:
    """Write the page of these runs to `out`.

    steps: steps whose responses are shown. By default all, or every k-th including the last, so that the samples fit in
    MAX_SAMPLE_BYTES. The page lists broken lines and missing files, which are skipped.
    Raises ValueError for a path that is not a run, and for steps without responses.
    """
    runs = [load_record(folder) for folder in dict.fromkeys(map(Path, run_folders))]
    groups = group_runs(runs)
    files = [_sample_files(run.path) for run in runs]
    logged = sorted({step for of_run in files for step in of_run})
    if unknown := sorted(set(steps) - set(logged)):
        raise ValueError(f"steps: {unknown} have no answers; there are answers of {logged}")
    shown = sorted(set(steps)) or _steps_that_fit(files)
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
        # The browser runs only this script, independent of other page content.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        cards=[_card(run, runs, lines) for run, lines in zip(runs, notes, strict=True)],
        answers=len(answers),
        left_out=len(logged) - len(shown),
        steps=len(logged),
        index=_pack(index),
        tokens=tokens,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name may hold half a surrogate pair


# Curves


def _sections(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the sections: main metrics, clipped shares (`bins`, on one scale), other metrics by family, folded."""
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
    """Return one metric with a line per group: mean and range over seeds, or one seed with its standard error."""
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
    title = (describe(key)[3] or "all tokens") if kind == "bins" else panel.title  # the section's heading has the rest
    return {"key": key, "title": title, "unit": panel.unit, "curves": curves}


# Responses


def _sample_files(run_folder: Path) -> dict[int, Path]:
    """Return the file of responses of each step, steps ascending."""
    return {int(path.stem[5:]): path for path in sorted((run_folder / "samples").glob("step_*.jsonl"))}


def _steps_that_fit(files: Sequence[dict[int, Path]]) -> list[int]:
    """Return every k-th step counted back from the last, with the smallest k that fits in MAX_SAMPLE_BYTES."""
    sizes: dict[int, int] = {}
    for of_run in files:
        for step, path in of_run.items():
            sizes[step] = sizes.get(step, 0) + path.stat().st_size
    thinned = (sorted(sizes)[::-1][::stride][::-1] for stride in count(1))
    return next(steps for steps in thinned if len(steps) <= 1 or sum(sizes[step] for step in steps) <= MAX_SAMPLE_BYTES)


def _answers(
    files: Sequence[dict[int, Path]], steps: Sequence[int], notes: Sequence[list[str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return every response of these steps, and its packed tokens. Broken lines are added to the notes of the run."""
    answers, tokens = [], []
    for number, of_run in enumerate(files):
        for step, path in of_run.items():
            for row in read_lines(path, (*SHOWN, *TOKEN_LISTS), notes[number]) if step in steps else []:
                if len({len(row[key]) for key in TOKEN_LISTS}) > 1:
                    notes[number].append(f"{path.name}: token lists of different lengths; a response is left out")
                    continue
                lists = _token_lists(row)
                clips = {"up": lists["clip"].count(1), "down": lists["clip"].count(-1)}
                shown = {key: _finite(row[key]) for key in SHOWN}
                answers.append({**shown, **clips, "run": number, "step": step, "prompt": row["prompt_id"]})
                tokens.append(_pack(lists))
    return answers, tokens


def _token_lists(row: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the per-token statistics of the page, to four significant digits.

    `r` is exp(logprobs - old_logprobs). None is a number that is not finite, or a missing bound.
    """

    def column(key: str, missing: float) -> np.ndarray:
        values = row.get(key) or [None] * len(row["token_texts"])  # rules that give a weight have no bounds
        return np.array([missing if value is None else value for value in values], dtype=float)  # (T,)

    old = column("old_logprobs", np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(column("logprobs", np.nan) - old)
    return {
        "text": row["token_texts"],
        "id": row["token_ids"],
        "p": _digits(np.exp(old), 4),
        "rollout": _digits(np.exp(column("rollout_logprobs", np.nan)), 4),
        "r": _digits(ratio, 4),
        "lower": _digits(column("lower", -np.inf), 4),
        "upper": _digits(column("upper", np.inf), 4),
        "weight": _digits(column("weight", np.nan), 4),
        "entropy": _digits(column("entropy", np.nan), 4),
        "clip": [int(mark) for mark in row["clip"]],
    }


# Cards


def _card(run: Record, runs: Sequence[Record], notes: list[str]) -> dict[str, Any]:
    """Return notes of a run, config keys that differ between runs or from the defaults, and environment.json."""
    defaults = asdict(Config())
    differing = {key for other in runs for key in run.config if other.config.get(key) != run.config[key]}
    differing -= set(REPEAT_KEYS)
    shown = [key for key in run.config if key in differing or run.config[key] != defaults.get(key)]
    shown.sort(key=lambda key: key not in differing)
    known = {key: value for key, value in run.config.items() if key in defaults}
    warnings, environment = [*notes, *Config(**known).warnings()], {}
    try:
        environment = read_json_object(run.path / "environment.json")
    except (OSError, ValueError) as error:
        warnings.append(str(error))
    return {
        "name": run.name,
        "last_step": run.last_step,
        "warnings": warnings,
        "facts": {key: _words(environment[key]) for key in FACTS if key in environment},
        "config": [(key, run.config[key], defaults.get(key, ""), key in differing) for key in shown],
    }


def _words(value: Any) -> str:
    """Format a JSON value as text without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return " ".join(map(_words, value)) if isinstance(value, list) else str(value)


# Numbers and bytes


def _finite(value: Any) -> Any:
    """Replace a number that is not finite by None, because JSON lacks it."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _digits(values: np.ndarray, digits: int) -> list[float | None]:
    """Round to `digits` significant digits; None for numbers that are not finite."""
    return [_finite(float(f"{value:.{digits}g}")) for value in values.tolist()]


def _pack(value: Any) -> str:
    """Encode as JSON, gzip and base64: short, without special characters of HTML."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode(), 3, mtime=0)).decode()


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval.report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's group is the reference")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run's folder, or next to it for several runs",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=(),
        help="whose responses to show, such as 10 20 200; default: all that fit",
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
