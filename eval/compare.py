"""Compare runs: a table with its noise, and one figure per metric family.

    python -m eval.compare runs/grpo_seed* runs/band_seed* --out figure.png

prints the table and writes figure.png/.svg (entropy, reward, clip fraction, mean@K side by side), figure_NAME.png/.svg
(one per family of eval/plots.FIGURES) and figure.md (the table); with --wandb they are an artifact there as well. Runs
whose config.yaml differs in nothing but REPEAT_KEYS are seeds of one group; the first run's group is the one that all
others are compared with. Works on runs that are running, crashed, or lack an eval: what is missing is a dash, what is
odd is a note under the table.
What it leaves out: tests over many groups at once. With many rows, expect one in twenty to differ by luck.
docs/evaluation.md says how each figure is computed.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import atan, cos, pi, sin, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any, NoReturn

import numpy as np

from eval.plots import Curve, Panel, describe, draw, sort_keys, stderr_of
from eval.records import Record, Series, load_record

# Config keys that do not make another experiment: a run that differs in these alone is a repeat.
REPEAT_KEYS = ("run_name", "seed", "output_dir", "wandb", "wandb_project", "dry_run")
# With fewer paired seeds nothing can be told: by luck alone all n differences have one sign in 2 of 2**n cases.
MIN_SEEDS = 5
SUFFIXES = (".png", ".svg", ".pdf")
OVERVIEW = (r"train/entropy", r"reward/mean", r"clip/up", r"eval/.+/mean@\d+")
MEAN_AT_K = r"eval/(?P<set>.+)/(?P<line>mean@\d+)"


@dataclass(frozen=True)
class Group:
    label: str
    runs: tuple[Record, ...]


@dataclass(frozen=True)
class Column:
    """One figure of every run, and how it is shown."""

    heading: str
    metric: str
    measure: Callable[[Series], float]  # the figure of one run
    scale: float  # 100 for percent


@dataclass(frozen=True)
class Cell:
    """One figure of a group: the mean over its seeds."""

    value: float
    stderr: float  # over seeds; of one seed, over problems where the metric has that, else nan
    of_problems: bool
    seeds: int


def compare(run_dirs: Sequence[Path], out: Path | None, until: int | None = None) -> str:
    """The table as text. With `out`, also writes the figures and the table there (see the head of this file).

    `until` cuts every run after that step, to compare a running run with a finished one at equal steps.
    Raises ValueError for a path that is no run, or no paths at all.
    """
    groups = load_groups(run_dirs, until)
    text = tables(groups)
    if out is not None:
        save(groups, text, Path(out))
    return text


def load_groups(run_dirs: Sequence[Path], until: int | None) -> list[Group]:
    """The runs, each once, by group. Raises ValueError for a path that is no run, or no paths at all."""
    if not run_dirs:
        raise ValueError("give at least one run folder, such as runs/NAME")
    runs = [load_record(path) for path in dict.fromkeys(map(Path, run_dirs))]
    return group_runs(runs if until is None else [cut(run, until) for run in runs])


def keys_of(groups: Sequence[Group]) -> list[str]:
    """Every metric of any run, in the order in which they are shown."""
    return sort_keys(list(dict.fromkeys(key for group in groups for run in group.runs for key in run.keys)))


def tables(groups: Sequence[Group]) -> str:
    """All that is told in words and numbers."""
    keys = keys_of(groups)
    parts = (*_tables(groups, keys), _differences(groups, keys), _notes(groups, keys))
    return "\n\n".join(part for part in parts if part)


def save(groups: Sequence[Group], text: str, out: Path) -> list[Path]:
    """Writes the figures that have something to show, and the text beside them; the files, the text's first."""
    keys = keys_of(groups)
    figures: dict[str, list[str]] = {"": [key for pattern in OVERVIEW for key in keys if re.fullmatch(pattern, key)]}
    for key in keys:
        if not key.endswith("_stderr"):
            figures.setdefault(f"_{describe(key)[0]}", []).append(key)
    caption = "line: mean over seeds; band: lowest to highest seed (one seed: ± standard error over problems)"
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out.with_suffix(".md")]
    written[0].write_text(text + "\n")
    for name, members in figures.items():
        panels = [panel for key in members if (panel := panel_of(groups, key))]
        suffixes = tuple(dict.fromkeys((".png", ".svg", out.suffix or ".png")))
        written += draw(panels, {}, out.with_name(f"{out.stem}{name}.png"), caption, suffixes)
    return written


def cut(run: Record, until: int) -> Record:
    """The run as it was after step `until`."""
    rows = {step: row for step, row in run.rows.items() if step <= until}
    return Record(run.path, run.name, run.config, rows, (*run.notes, f"cut after step {until}"))


# Groups and their labels


def group_runs(runs: Sequence[Record]) -> list[Group]:
    """Seeds of one config together, groups in the order of their first run. A run without config is its own group."""
    members: dict[str, list[Record]] = {}
    for run in runs:
        kept = {key: value for key, value in run.config.items() if key not in REPEAT_KEYS}
        members.setdefault(json.dumps(kept, sort_keys=True, default=str) if kept else str(run.path), []).append(run)
    labels = label_configs([group[0].config for group in members.values()])
    return [
        Group(label if group[0].config else group[0].name, tuple(group))
        for label, group in zip(labels, members.values(), strict=True)
    ]


def label_configs(configs: Sequence[dict[str, Any]]) -> list[str]:
    """One short, unique label per config from the keys in which they differ: "fixed", "band divergence=tv".

    A value that is more common than every other goes unsaid, but for `clip`, whose bare value leads the label.
    """
    if len(configs) == 1:
        return [str(configs[0].get("clip") or configs[0].get("run_name") or "run")]
    with_config = [config for config in configs if config]
    differ, usual = [], {}
    for key in dict.fromkeys(key for config in with_config for key in config if key not in REPEAT_KEYS):
        values = [_short(config.get(key, "unset")) for config in with_config]
        counts = sorted((values.count(value) for value in set(values)), reverse=True)
        if len(counts) > 1:
            differ.append(key)
            usual[key] = max(values, key=values.count) if counts[0] > counts[1] else None
    differ.sort(key=lambda key: key != "clip")
    labels = []
    for config in configs:
        shown = {key: _short(config.get(key, "unset")) for key in differ}
        unusual = {key: value for key, value in shown.items() if key == "clip" or value != usual[key]}
        words = [value if key == "clip" else f"{key}={value}" for key, value in (unusual or shown).items()]
        labels.append(" ".join(words))
    return labels


def _short(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rsplit("/", 1)[-1]
    return f"{value:g}" if isinstance(value, float) else str(value)


# Figures of one run: of a metric that it has


def area_under(series: Series) -> float:
    """Mean height of the curve, by trapezoids over its steps."""
    steps, values = series
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else values[0])


def stretch(series: Series, start: float) -> float:
    """Mean over a tenth of the run (at least one step) that begins at `start` of its length: 0, .45 or .9."""
    values = series[1]
    width = max(1, round(len(values) / 10))
    first = min(round(start * len(values)), len(values) - width)
    return float(values[first : first + width].mean())


def start_of(series: Series) -> float:
    return stretch(series, 0.0)


def middle_of(series: Series) -> float:
    return stretch(series, 0.45)


def end_of(series: Series) -> float:
    return stretch(series, 0.9)


def last(series: Series) -> float:
    return float(series[1][-1])


def best(series: Series) -> float:
    return float(series[1].max())


def mean_of(series: Series) -> float:
    return float(series[1].mean())


def median_of(series: Series) -> float:
    return float(np.median(series[1]))


# The tables


def _tables(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    training = [
        Column("reward AUC", "reward/mean", area_under, 1.0),
        Column("reward end", "reward/mean", end_of, 1.0),
        Column("entropy start", "train/entropy", start_of, 1.0),
        Column("entropy middle", "train/entropy", middle_of, 1.0),
        Column("entropy end", "train/entropy", end_of, 1.0),
        Column("tokens/s", "throughput/tokens_per_s", median_of, 1.0),
    ]
    evals: list[Column] = []
    for key in keys:
        if match := re.fullmatch(MEAN_AT_K, key):
            heading = f"{match['set']} {match['line']}"
            evals += [Column(f"{heading} final", key, last, 100.0), Column(f"{heading} best", key, best, 100.0)]
    tables = [_table("Training", groups, training), _table("Evaluation, %", groups, evals)]
    for side, word, sign in (("up", "upper", "positive"), ("down", "lower", "negative")):
        bins = [key for key in keys if re.fullmatch(f"clip/{side}(/.+)?", key)]
        columns = [Column(key.removeprefix(f"clip/{side}").lstrip("/") or "all", key, mean_of, 100.0) for key in bins]
        title = f"Clipped at the {word} bound by old probability p, % of tokens with {sign} advantage, mean over steps"
        tables.append(_table(title, groups, columns) if columns else "")
    return tables


def _table(title: str, groups: Sequence[Group], columns: Sequence[Column]) -> str:
    if not columns:
        return f"{title}: none logged"
    header = ["group", "seeds", "steps", *(column.heading for column in columns)]
    cells = zip(*(_format([cell_of(group, column) for group in groups]) for column in columns), strict=True)
    rows = [
        [group.label, str(len(group.runs)), steps_of(group), *texts] for group, texts in zip(groups, cells, strict=True)
    ]
    return f"{title}\n\n" + text_table(header, rows)


def steps_of(group: Group) -> str:
    """The last step of its runs: "20", or "11-20" where they differ."""
    reached = [run.last_step for run in group.runs]
    return str(max(reached)) if len(set(reached)) == 1 else f"{min(reached)}-{max(reached)}"


def values_of(group: Group, column: Column) -> list[float]:
    """The figure of every run that has the metric, scaled."""
    having = [series for run in group.runs if len((series := run.series(column.metric))[0])]
    return [column.scale * column.measure(series) for series in having]


def cell_of(group: Group, column: Column) -> Cell | None:
    """Mean of one figure over the seeds that have it; None where no seed has."""
    values = values_of(group, column)
    if not values:
        return None
    if len(values) > 1:
        return Cell(float(np.mean(values)), float(np.std(values, ddof=1) / sqrt(len(values))), False, len(values))
    (run,) = [run for run in group.runs if len(run.series(column.metric)[0])]
    errors = stderr_of(run, column.metric)
    if errors is None or column.measure not in (last, best):
        return Cell(values[0], float("nan"), False, 1)
    steps, curve = run.series(column.metric)
    step = steps[-1] if column.measure is last else steps[curve.argmax()]
    return Cell(values[0], column.scale * dict(zip(*errors, strict=True)).get(step, float("nan")), True, 1)


def _format(cells: Sequence[Cell | None]) -> list[str]:
    """One column, with as many decimals as show two digits of its largest error (three of its largest value)."""
    errors = [cell.stderr for cell in cells if cell and cell.stderr > 0]
    size = max(errors) if errors else max((abs(cell.value) for cell in cells if cell), default=0.0) / 10
    decimals = int(np.clip(1 - np.floor(np.log10(size)), 0, 5)) if size > 0 else 0
    texts = []
    for cell in cells:
        text = f"{cell.value:.{decimals}f}" if cell else "-"
        if cell and np.isfinite(cell.stderr):
            text += f" ± {cell.stderr:.{decimals}f}" + ("†" if cell.of_problems else "")
        texts.append(text)
    return texts


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well in a terminal and is Markdown as well."""
    cells = [[cell.replace("|", "/") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# Differences and their noise


def paired_interval(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """Bootstrap interval for the mean of paired differences, one per seed (at least two).

    Percentiles of the resampled means, expanded for small samples as in Hesterberg 2015 (The American Statistician
    69:4, section 4.3): plain percentiles would be as much too narrow as sqrt((n-1)/n) z is below the t quantile. Up to
    six seeds every resample is counted; beyond, 20,000 drawn with a fixed seed, so that the answer repeats.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    assert n >= 2 and np.isfinite(values).all(), "two seeds at least, and finite differences"
    if n <= 6:
        draws = np.array(list(product(range(n), repeat=n)))
    else:
        draws = np.random.default_rng(0).integers(0, n, size=(20_000, n))
    means = values[draws].mean(axis=1)
    z, df = NormalDist().inv_cdf((1 + confidence) / 2), n - 1
    # Student's t quantile from the normal one (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    tail = NormalDist().cdf(-t * sqrt(n / df))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t-test that the mean difference is zero; 1 where all differences are zero.

    Abramowitz and Stegun 26.7.3 and 26.7.4, the finite sums for a whole number of degrees of freedom.
    """
    values = np.asarray(differences, dtype=float)
    n, mean, spread = len(values), float(values.mean()), float(values.std(ddof=1))
    assert n >= 2 and np.isfinite(values).all(), "two seeds at least, and finite differences"
    if spread == 0:
        return float(mean == 0)
    df = n - 1
    angle = atan(abs(mean) / spread * sqrt(n / df))
    term, total = (1.0, 0.0) if df % 2 == 0 else (cos(angle), 0.0)
    for k in range(df % 2, df - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = sin(angle) * total if df % 2 == 0 else 2 / pi * (angle + sin(angle) * total)
    return max(0.0, 1 - inside)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values that hold for all of the tests together (Holm 1979), in the given order."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = running
    return adjusted


def differences(base: Group, group: Group, column: Column) -> list[float]:
    """group - base of one figure, scaled: one for each seed of both, at the steps that both runs have."""
    values = []
    for theirs, ours in pair_by_seed(base, group):
        steps = _common_steps(theirs, ours, column.metric)
        if len(steps):
            ends = [column.measure(_at(run.series(column.metric), steps)) for run in (theirs, ours)]
            values.append(column.scale * (ends[1] - ends[0]))
    return values


def _common_steps(theirs: Record, ours: Record, key: str) -> np.ndarray:
    return np.intersect1d(theirs.series(key)[0], ours.series(key)[0])


def _differences(groups: Sequence[Group], keys: Sequence[str]) -> str:
    """Each group against the first."""
    columns = [Column(f"{' '.join(_set_and_k(k))} %", k, last, 100.0) for k in keys if re.fullmatch(MEAN_AT_K, k)]
    columns.append(Column("reward AUC", "reward/mean", area_under, 1.0))
    columns.append(Column("entropy end", "train/entropy", end_of, 1.0))
    rows = [
        [group.label, column.heading, *_difference(groups[0], group, column)]
        for group in groups[1:]
        for column in columns
    ]
    if not rows:
        return ""
    title = f"Difference from {groups[0].label!r}, same seeds paired at the steps both have, 95 % bootstrap interval"
    return f"{title}\n\n" + text_table(["group", "figure", "pairs", "difference", "interval", "verdict"], rows)


def _set_and_k(key: str) -> tuple[str, str]:
    match = re.fullmatch(MEAN_AT_K, key)
    assert match, key
    return match["set"], match["line"]


def _difference(base: Group, group: Group, column: Column) -> tuple[str, str, str, str]:
    """(pairs, difference, interval, verdict) of one figure."""
    values = differences(base, group, column)
    if not values:
        return "0", "-", "-", "nothing to compare: no seed (or no step) in common"
    mean = float(np.mean(values))
    decimals = 2 if column.scale == 100.0 else 3
    shown = f"{mean:+.{decimals}f}"
    if len(values) == 1:
        error = column.scale * _error_of_problems(base, group, column.metric)
        if np.isnan(error):
            return "1", shown, "-", "one seed: cannot tell"
        low, high = mean - 1.96 * error, mean + 1.96 * error
        verdict = "within the noise of the problems alone†" if low <= 0 <= high else "beyond the problems' noise†"
        return "1", shown, f"{low:+.{decimals}f} .. {high:+.{decimals}f}", f"{verdict}; one seed: cannot tell"
    low, high = paired_interval(values, 0.95)
    side = "higher" if mean > 0 else "lower"
    if low <= 0 <= high:
        verdict = "within noise"
    elif len(values) < MIN_SEEDS:
        agree = sum(np.sign(value) == np.sign(mean) for value in values)
        verdict = f"{side} in {agree} of {len(values)} seeds; too few to tell ({MIN_SEEDS} needed)"
    else:
        verdict = side
    return str(len(values)), shown, f"{low:+.{decimals}f} .. {high:+.{decimals}f}", verdict


def _error_of_problems(base: Group, group: Group, key: str) -> float:
    """Standard error over problems of the difference between the one pair of runs, at its last common step; or nan."""
    for pair in pair_by_seed(base, group):
        steps = _common_steps(*pair, key)
        if len(steps):
            return sqrt(sum(run.value(f"{key}_stderr", int(steps[-1])) ** 2 for run in pair))
    return float("nan")


def pair_by_seed(base: Group, group: Group) -> list[tuple[Record, Record]]:
    """Runs of both groups with the same config seed; of a repeated seed, the first."""
    theirs, ours = ({run.config.get("seed"): run for run in reversed(each.runs)} for each in (base, group))
    return [(theirs[seed], ours[seed]) for seed in sorted(theirs, key=str) if seed in ours]


def _at(series: Series, steps: np.ndarray) -> Series:
    kept = np.isin(series[0], steps)
    return series[0][kept], series[1][kept]


# Notes and figures


def _notes(groups: Sequence[Group], keys: Sequence[str]) -> str:
    """Everything a reader must know about single runs and about how the groups differ."""
    lines = [
        "final: last evaluation; best: highest evaluation (biased upwards). AUC: mean height of the reward curve. "
        "start, middle, end: means over a tenth of the steps. ±: standard error over seeds; "
        "† one seed: standard error over problems, which says nothing of other seeds.",
    ]
    evals = [key for key in keys if re.fullmatch(MEAN_AT_K, key)]
    for group in groups:
        if len(group.runs) == 1:
            lines.append(f"{group.label}: one seed")
        seeds = [run.config.get("seed") for run in group.runs]
        for seed in dict.fromkeys(seed for seed in seeds if seeds.count(seed) > 1):
            lines.append(f"{group.label}: {seeds.count(seed)} runs with seed {seed}; the first is used for pairs")
        for run in group.runs:
            lines += [f"{run.name}: {note}" for note in run.notes]
            missing = [" ".join(_set_and_k(key)) for key in evals if not len(run.series(key)[0])]
            if not evals or len(missing) == len(evals):
                lines.append(f"{run.name}: no evaluation")
            elif missing:
                lines.append(f"{run.name}: no evaluation on {', '.join(missing)}")
    reached = sorted({run.last_step for group in groups for run in group.runs if run.rows})
    if len(reached) > 1:
        lines.append(
            f"runs reached different steps: the tables show each at its own last; --until {reached[0]} cuts all"
        )
    return "Notes\n\n" + "\n".join(f"- {line}" for line in lines)


def panel_of(groups: Sequence[Group], key: str) -> Panel | None:
    """One metric with a line per group; None where it has no finite value."""
    curves = []
    for group in groups:
        having = [run for run in group.runs if len(run.series(key)[0])]
        if having:
            stderr = stderr_of(having[0], key) if len(having) == 1 else None
            curves.append(Curve(group.label, tuple(run.series(key) for run in having), stderr))
    _, title, unit, line = describe(key)
    return Panel(f"{title} {line}".strip(), unit, tuple(curves)) if curves else None


class Parser(argparse.ArgumentParser):
    """Of a program `python -m MODULE`; a mistake is one line and exit code 2, as everywhere here."""

    def __init__(self, module: str, description: str | None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m {module}", description=description, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def picture(text: str) -> Path:
    """What --out names."""
    if Path(text).suffix not in ("", *SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text} is not a picture; end it in one of {', '.join(SUFFIXES)}")
    return Path(text)


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval.compare", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's group is the reference")
    parser.add_argument(
        "--out", type=picture, default=Path("compare/figure.png"), help="overview figure (default %(default)s)"
    )
    parser.add_argument("--until", type=int, metavar="STEP", help="cut every run after this step")
    parser.add_argument("--wandb", choices=["auto", "online", "offline"], help="keep table and figures on wandb")
    parser.add_argument("--wandb_project", default="bandpo", metavar="NAME", help="where (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        groups = load_groups(args.runs, args.until)
        text = tables(groups)
        print(text)
        files = save(groups, text, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    pictures = len(files) - 1
    print(f"\n{pictures} pictures and the table: {args.out.with_suffix('')}*" if pictures else "\nNothing to draw yet")
    if args.wandb:
        keep_on_wandb(files, args.out.with_name(f"{args.out.stem}_wandb"), args.wandb, args.wandb_project)
    return 0


def keep_on_wandb(files: Sequence[Path], folder: Path, mode: Any, project: str) -> None:
    """Table and figures as the artifact `comparison` of a wandb run of their own, whose files are in `folder`."""
    from trainer.logging import Tracker  # draws wandb in, which takes a second

    names = {"files": sorted(file.name for file in files)}
    tracker = Tracker(folder, names, mode=mode, project=project, run_id=None, max_steps=0, is_main=True)
    tracker.artifact(sorted(files), "comparison")
    tracker.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
