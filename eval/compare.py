"""Compare runs: tables with paired tests and intervals, and one figure per metric family.

    python -m eval.compare runs/grpo_seed* runs/band_seed* --out figure.png --metric eval/aime24/mean@32

Prints the tables; writes figure.png (entropy, reward, clip fraction and mean@k), figure_NAME.png (one per family of
eval/plots.FIGURES) and figure.md (the tables). Runs whose config.yaml differs only in REPEAT_KEYS are seeds of one
group. The first run's group is the reference. Runs may be running, crashed or without evaluation: missing values are
dashes, and notes below the tables name what is odd. docs/evaluation.md defines each column.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import atan, cos, pi, sin, sqrt
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from eval.plots import Curve, Panel, describe, draw, sort_keys, stderr_of
from eval.records import Record, Series, load_record

# Config keys in which repeats of one experiment may differ.
REPEAT_KEYS = ("run_name", "seed", "output_dir", "wandb", "dry_run")
MIN_SEEDS = 5  # fewer pairs get no verdict: with n pairs all differences have one sign by chance in 2 of 2**n cases
LEVEL = 0.05
SUFFIXES = (".png", ".svg", ".pdf")
OVERVIEW = (r"train/entropy", r"reward/mean", r"clip/up", r"eval/.+/mean@\d+")
MEAN_AT_K = r"eval/(?P<set>.+)/(?P<line>mean@\d+)"


@dataclass(frozen=True)
class Group:
    """The seeds of one configuration."""

    label: str
    runs: tuple[Record, ...]


@dataclass(frozen=True)
class Column:
    """A number per run, and how it is shown."""

    heading: str
    metric: str
    measure: Callable[[Series], float]  # of the metric's series
    scale: float = 1.0  # 100 for percent


@dataclass(frozen=True)
class Cell:
    """A column's mean over the seeds of a group."""

    value: float
    stderr: float  # over seeds; for one seed, over problems where the metric has that, else nan
    of_problems: bool


def compare(run_dirs: Sequence[Path], out: Path | None, until: int | None = None, metric: str = "") -> str:
    """The tables as text; with `out`, also written there with the figures (see the head of this file).

    until: ignore later steps. metric: rank the groups by its final value. Raises ValueError for a path that is no run,
    for no paths, and for a metric that no run has.
    """
    groups = load_groups(run_dirs, until)
    text = tables(groups, metric)
    if out is not None:
        save(groups, text, Path(out))
    return text


def load_groups(run_dirs: Sequence[Path], until: int | None) -> list[Group]:
    """The runs by group, duplicates dropped. Raises ValueError for a path that is no run, or no paths."""
    if not run_dirs:
        raise ValueError("give at least one run folder, such as runs/NAME")
    runs = [load_record(path) for path in dict.fromkeys(map(Path, run_dirs))]
    return group_runs(runs if until is None else [cut(run, until) for run in runs])


def keys_of(groups: Sequence[Group]) -> list[str]:
    """Every metric of any run, in the order in which they are shown."""
    return sort_keys(list(dict.fromkeys(key for group in groups for run in group.runs for key in run.keys)))


def tables(groups: Sequence[Group], metric: str = "") -> str:
    """All tables and notes. Raises ValueError for a metric that no run has."""
    keys = keys_of(groups)
    if metric and metric not in keys:
        raise ValueError(f"metric: no run has {metric!r}; for example {', '.join(keys[:3]) or 'none yet'}")
    parts = (*_tables(groups, keys), _differences(groups, keys), ranking(groups, metric), _notes(groups, keys))
    return "\n\n".join(part for part in parts if part)


def save(groups: Sequence[Group], text: str, out: Path) -> list[Path]:
    """Write the text and the figures that have something to show; returns the files, the text's first."""
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
        written += draw(panels, out.with_name(f"{out.stem}{name}{out.suffix or '.png'}"), caption)
    return written


def cut(run: Record, until: int) -> Record:
    """The run as it was after step `until`."""
    rows = {step: row for step, row in run.rows.items() if step <= until}
    return replace(run, rows=rows, notes=(*run.notes, f"cut after step {until}"))


# ---- groups and their labels ----


def group_runs(runs: Sequence[Record]) -> list[Group]:
    """Seeds of one config together, groups in the order of their first run. A run without config is its own group."""
    members: dict[str, list[Record]] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in REPEAT_KEYS}
        members.setdefault(json.dumps(config, sort_keys=True, default=str) if config else str(run.path), []).append(run)
    labels = label_configs([group[0].config for group in members.values()])
    return [
        Group(label if group[0].config else group[0].name, tuple(group))
        for label, group in zip(labels, members.values(), strict=True)
    ]


def label_configs(configs: Sequence[dict[str, Any]]) -> list[str]:
    """One short, unique label per config from the keys in which they differ: "fixed", "band divergence=tv".

    The rule comes first and bare. Other keys are left out where the config has the most common value; the arguments of
    a rule are compared among configs with that rule.
    """
    if len(configs) == 1:
        return [str(configs[0].get("rule") or configs[0].get("run_name") or "run")]
    flat = [_texts(config) for config in configs]
    keys = sorted(dict.fromkeys(key for config in flat for key in config), key=lambda key: key != "rule")
    labels = []
    for config in flat:
        different, unusual = {}, {}
        for key in keys:
            peers = [c for c in flat if c and (not key.startswith("rule_args.") or c.get("rule") == config.get("rule"))]
            own, *counts = config.get(key, "unset"), *Counter(c.get(key, "unset") for c in peers).most_common(2)
            if len(counts) > 1:
                different[key] = own
                if key == "rule" or own != counts[0][0] or counts[0][1] == counts[1][1]:
                    unusual[key] = own
        words = (unusual or different).items()
        labels.append(" ".join(value if key == "rule" else f"{key.split('.')[-1]}={value}" for key, value in words))
    return labels


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of mappings as keys of their own: {"rule_args": {"delta": 0.05}} becomes {"rule_args.delta": 0.05}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """One short text per key, without those of REPEAT_KEYS."""
    kept = {key: value for key, value in config.items() if key not in REPEAT_KEYS}
    return {key: _short(value) for key, value in flatten(kept).items()}


def _short(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rsplit("/", 1)[-1]
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- numbers per run, of a metric that it has ----


def area_under(series: Series) -> float:
    """Mean height of the curve, by trapezoids over its steps."""
    steps, values = series
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else values[0])


def mean_from(start: float) -> Callable[[Series], float]:
    """Mean over a tenth of the run (at least one step) that begins at `start` of its length: 0, 0.45 or 0.9."""

    def measure(series: Series) -> float:
        values = series[1]
        width = max(1, round(len(values) / 10))
        first = min(round(start * len(values)), len(values) - width)
        return float(values[first : first + width].mean())

    return measure


def last(series: Series) -> float:
    return float(series[1][-1])


def best(series: Series) -> float:
    return float(series[1].max())


def mean_of(series: Series) -> float:
    return float(series[1].mean())


def median_of(series: Series) -> float:
    return float(np.median(series[1]))


# ---- tables ----


def _tables(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    training = [
        Column("reward AUC", "reward/mean", area_under),
        Column("reward end", "reward/mean", mean_from(0.9)),
        Column("entropy start", "train/entropy", mean_from(0.0)),
        Column("entropy middle", "train/entropy", mean_from(0.45)),
        Column("entropy end", "train/entropy", mean_from(0.9)),
        Column("tokens/s", "throughput/tokens_per_s", median_of),
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
        [group.label, str(len(group.runs)), _steps_of(group), *texts]
        for group, texts in zip(groups, cells, strict=True)
    ]
    return f"{title}\n\n" + text_table(header, rows)


def _steps_of(group: Group) -> str:
    """The last step of its runs: "20", or "11-20" where they differ."""
    reached = [run.last_step for run in group.runs]
    return str(max(reached)) if len(set(reached)) == 1 else f"{min(reached)}-{max(reached)}"


def values_of(group: Group, column: Column) -> list[float]:
    """The scaled number of every run that has the metric."""
    found = [series for run in group.runs if len((series := run.series(column.metric))[0])]
    return [column.scale * column.measure(series) for series in found]


def cell_of(group: Group, column: Column) -> Cell | None:
    """Mean over the seeds that have the metric; None where no seed has it."""
    values = values_of(group, column)
    if not values:
        return None
    if len(values) > 1:
        return Cell(float(np.mean(values)), float(np.std(values, ddof=1) / sqrt(len(values))), False)
    (run,) = [run for run in group.runs if len(run.series(column.metric)[0])]
    if stderr_of(run, column.metric) is None or column.measure not in (last, best):
        return Cell(values[0], float("nan"), False)
    steps, curve = run.series(column.metric)
    step = steps[-1] if column.measure is last else steps[curve.argmax()]
    return Cell(values[0], column.scale * run.value(f"{column.metric}_stderr", int(step)), True)


def _format(cells: Sequence[Cell | None]) -> list[str]:
    """A column, with enough decimals to show two digits of its largest error (three of its largest value)."""
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
    """A Markdown table with aligned columns."""
    cells = [[cell.replace("|", "/") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# ---- tests and intervals ----


def two_sided_p(t: float, df: int) -> float:
    """P(|T| >= t) of Student's t with `df` degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(df))
    term, total = (1.0, 0.0) if df % 2 == 0 else (cos(angle), 0.0)
    for k in range(df % 2, df - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = sin(angle) * total if df % 2 == 0 else 2 / pi * (angle + sin(angle) * total)
    return max(0.0, 1 - inside)


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t-test that the mean difference is 0; 1 where all differences are 0."""
    mean, error = _mean_and_error(differences)
    return two_sided_p(abs(mean) / error, len(differences) - 1) if error else float(mean == 0)


def paired_interval(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """Student's t interval for the mean of at least two paired differences."""
    mean, error = _mean_and_error(differences)
    low, high = 0.0, 1e6
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if two_sided_p(t, len(differences) - 1) > 1 - confidence else (low, t)
    return mean - high * error, mean + high * error


def _mean_and_error(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    values = np.asarray(differences, dtype=float)
    assert len(values) >= 2 and np.isfinite(values).all(), "at least two differences, all finite"
    return float(values.mean()), float(values.std(ddof=1) / sqrt(len(values)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the given order: they hold for all tests together."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = running
    return adjusted


def differences(base: Group, group: Group, column: Column) -> list[float]:
    """group - base, scaled: one per seed that both have, at the steps that both runs have."""
    values = []
    for pair in pair_by_seed(base, group):
        steps = _common_steps(*pair, column.metric)
        if len(steps):
            theirs, ours = (column.measure(_at(run.series(column.metric), steps)) for run in pair)
            values.append(column.scale * (ours - theirs))
    return values


def pair_by_seed(base: Group, group: Group) -> list[tuple[Record, Record]]:
    """Runs of both groups with the same config seed; of a repeated seed, the first."""
    theirs, ours = ({run.config.get("seed"): run for run in reversed(each.runs)} for each in (base, group))
    return [(theirs[seed], ours[seed]) for seed in sorted(theirs, key=str) if seed in ours]


def _common_steps(theirs: Record, ours: Record, key: str) -> np.ndarray:
    return np.intersect1d(theirs.series(key)[0], ours.series(key)[0])


def _at(series: Series, steps: np.ndarray) -> Series:
    found = np.isin(series[0], steps)
    return series[0][found], series[1][found]


def _differences(groups: Sequence[Group], keys: Sequence[str]) -> str:
    """A table: each group against the first. Holm's correction is over the groups, per metric."""
    columns = [Column(f"{' '.join(_set_and_k(k))} %", k, last, 100.0) for k in keys if re.fullmatch(MEAN_AT_K, k)]
    columns += [Column("reward AUC", "reward/mean", area_under), Column("entropy end", "train/entropy", mean_from(0.9))]
    rows: list[list[str]] = []
    for column in columns:
        found = [differences(groups[0], group, column) for group in groups[1:]]
        tested = [values for values in found if len(values) > 1]
        adjusted = iter(holm([paired_p(values) for values in tested]))
        for group, values in zip(groups[1:], found, strict=True):
            p = next(adjusted) if len(values) > 1 else None
            rows.append([group.label, column.heading, *_difference(groups[0], group, column, values, p)])
    if not rows:
        return ""
    rows.sort(key=lambda row: [group.label for group in groups].index(row[0]))
    title = f"Difference from {groups[0].label!r}, same seeds paired at the steps that both have"
    header = ["group", "metric", "pairs", "difference", "95 % interval", "Holm p", "verdict"]
    return f"{title}\n\n" + text_table(header, rows)


def _difference(base: Group, group: Group, column: Column, values: Sequence[float], p: float | None) -> list[str]:
    """Pairs, difference, interval, p and verdict."""
    if not values:
        return ["0", "-", "-", "-", "nothing to compare: no seed (or no step) in common"]
    mean, decimals = float(np.mean(values)), 2 if column.scale == 100.0 else 3
    if p is None:
        low, high, verdict = _over_problems(base, group, column, mean)
    else:
        low, high = paired_interval(values, 1 - LEVEL)
        verdict = "not significant" if p >= LEVEL else "higher" if mean > 0 else "lower"
        if len(values) < MIN_SEEDS:
            agree = sum(np.sign(value) == np.sign(mean) for value in values)
            verdict = f"same sign in {agree} of {len(values)} seeds; no verdict below {MIN_SEEDS} seeds"
    interval = f"{low:+.{decimals}f} .. {high:+.{decimals}f}" if np.isfinite(low) else "-"
    return [str(len(values)), f"{mean:+.{decimals}f}", interval, "-" if p is None else f"{p:.2g}", verdict]


def _over_problems(base: Group, group: Group, column: Column, mean: float) -> tuple[float, float, str]:
    """Interval over problems of the difference between the one pair of runs, and the verdict.

    Paired by problem where both runs have per-problem scores (evals/); else it adds the variances of the two runs.
    """
    pairs = [pair for pair in pair_by_seed(base, group) if len(_common_steps(*pair, column.metric))]
    theirs, ours = pairs[0]
    step = int(_common_steps(theirs, ours, column.metric)[-1])
    match = re.fullmatch(MEAN_AT_K, column.metric)
    before, after = (run.scores(match["set"], step) if match else {} for run in (theirs, ours))
    if len(before) > 1 and before.keys() == after.keys():
        error, how = _mean_and_error([after[problem] - before[problem] for problem in before])[1], "paired"
    else:
        error = sqrt(sum(run.value(f"{column.metric}_stderr", step) ** 2 for run in (theirs, ours)))
        how = "assumes independent problems"
    low, high = mean - 1.96 * column.scale * error, mean + 1.96 * column.scale * error
    if not np.isfinite(error):
        return low, high, "one seed: no verdict"
    return low, high, f"{'within' if low <= 0 <= high else 'beyond'} the noise of the problems ({how}); one seed"


def ranking(groups: Sequence[Group], metric: str) -> str:
    """A table: groups by the final value of `metric`, highest first, every pair tested; "" without a metric."""
    column = Column(metric, metric, last, 100.0 if describe(metric)[2].startswith("%") else 1.0)
    ranked = sorted(
        (group for group in groups if values_of(group, column)), key=lambda g: -np.mean(values_of(g, column))
    )
    pairs = [(a, b, differences(b, a, column)) for a, b in combinations(ranked, 2)]
    pairs = [(a.label, b.label, values) for a, b, values in pairs if len(values) >= MIN_SEEDS]
    significant = [pair[:2] for pair, p in zip(pairs, holm([paired_p(v) for *_, v in pairs]), strict=True) if p < LEVEL]
    rows = []
    for group in ranked:
        values = values_of(group, column)
        low, high = paired_interval(values, 1 - LEVEL) if len(values) > 1 else (np.nan, np.nan)
        lower = ", ".join(b for a, b in significant if a == group.label)
        rows.append([group.label, str(len(values)), f"{np.mean(values):.3g}", f"{low:.3g} .. {high:.3g}", lower or "-"])
    unit = ", %" if column.scale == 100.0 else ""
    title = f"Ranking by final {metric}{unit} ({len(pairs)} pairs of groups tested, Holm-corrected p < {LEVEL})"
    header = ["group", "seeds", "mean", "95 % interval over seeds", "significantly higher than"]
    return f"{title}\n\n{text_table(header, rows)}" if metric and rows else ""


def _set_and_k(key: str) -> tuple[str, str]:
    match = re.fullmatch(MEAN_AT_K, key)
    assert match, key
    return match["set"], match["line"]


# ---- notes and figures ----


def _notes(groups: Sequence[Group], keys: Sequence[str]) -> str:
    """What a reader must know about single runs and about how the groups differ."""
    lines = [
        "final: last evaluation; best: highest evaluation (biased upwards). AUC: mean height of the reward curve. "
        "start, middle, end: means over a tenth of the steps. ±: standard error over seeds; "
        "† one seed: standard error over problems, which says nothing about other seeds.",
    ]
    evals = [key for key in keys if re.fullmatch(MEAN_AT_K, key)]
    for group in groups:
        if len(group.runs) == 1:
            lines.append(f"{group.label}: one seed")
        for seed, count in Counter(run.config.get("seed") for run in group.runs).items():
            if count > 1:
                lines.append(f"{group.label}: {count} runs with seed {seed}; the first is used for pairs")
        for run in group.runs:
            lines += [f"{run.name}: {note}" for note in run.notes]
            missing = [" ".join(_set_and_k(key)) for key in evals if not len(run.series(key)[0])]
            if len(missing) == len(evals):
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
        found = [run for run in group.runs if len(run.series(key)[0])]
        if found:
            stderr = stderr_of(found[0], key) if len(found) == 1 else None
            curves.append(Curve(group.label, tuple(run.series(key) for run in found), stderr))
    _, title, unit, line = describe(key)
    return Panel(f"{title} {line}".strip(), unit, tuple(curves)) if curves else None


class Parser(argparse.ArgumentParser):
    """Command line of `python -m MODULE`: invalid arguments give a one-line error, exit code 2."""

    def __init__(self, module: str, description: str | None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m {module}", description=description, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def picture(text: str) -> Path:
    """The path that --out gives."""
    if Path(text).suffix not in ("", *SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text} is not a picture; end it in one of {', '.join(SUFFIXES)}")
    return Path(text)


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval.compare", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's group is the reference")
    parser.add_argument(
        "--out", type=picture, default=Path("compare/figure.png"), help="overview figure (default %(default)s)"
    )
    parser.add_argument("--until", type=int, metavar="STEP", help="ignore later steps")
    parser.add_argument("--metric", default="", help="rank the groups by its final value, all pairs tested")
    args = parser.parse_args(argv)
    try:
        groups = load_groups(args.runs, args.until)
        text = tables(groups, args.metric)
        print(text)
        files = save(groups, text, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = len(files) - 1
    print(f"\n{count} figures and the tables: {args.out.with_suffix('')}*" if count else "\nNothing to draw yet")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
