"""Compare runs: tables with paired tests and confidence intervals, and one figure per metric family.

    python -m eval.compare runs/grpo_seed* runs/band_seed* --out figure.png --metric eval/aime24/mean@32

Prints the tables. Writes figure.png (entropy, reward, clip/up and mean@k), figure_NAME.png (one per family of
eval/plots.FIGURES) and figure.md (the tables). Runs whose config.yaml differs only in seed, run_name or the like form
one group. The first run's group is the reference. Runs may be incomplete: missing values are dashes, and notes below
the tables list the gaps. docs/evaluation.md defines each column.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import atan, ceil, cos, isfinite, pi, sin, sqrt
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from eval.plots import Group, describe, draw, panel_of, sort_keys
from eval.records import Record, Series, load_record

# Config keys in which repeats of one experiment may differ.
REPEAT_KEYS = ("run_name", "seed", "output_dir", "wandb", "dry_run")
MIN_SEEDS = 5  # fewer pairs get no verdict: under the null, n differences have the same sign with probability 2 / 2**n
LEVEL = 0.05
OVERVIEW = (r"train/entropy", r"reward/mean", r"clip/up", r"eval/.+/mean@\d+")
MEAN_AT_K = r"eval/(?P<set>.+)/mean@\d+"
CAPTION = "line: mean over seeds; band: lowest to highest seed (one seed: ± standard error over problems)"
LEGEND = (
    "final: last evaluation; best: highest evaluation (biased upwards). AUC: mean height of the reward curve. "
    "start, middle, end: means over a tenth of the steps. ±: standard error over seeds; "
    "† one seed: standard error over problems, which says nothing about other seeds."
)


@dataclass(frozen=True)
class Column:
    """Table column: one number per run, with heading and scale."""

    heading: str
    metric: str
    measure: Callable[[Series], float]  # reduces the metric's series to the number
    scale: float = 1.0  # 100 for percent


def compare(run_dirs: Sequence[Path], out: Path | None, metric: str = "") -> str:
    """Return the tables as text. With `out`, also write them and the figures (see the module docstring).

    metric: rank the groups by its final value. Raises ValueError for a path that is not a run and for a metric that no
    run has.
    """
    groups = group_runs([load_record(path) for path in dict.fromkeys(map(Path, run_dirs))])
    text = tables(groups, metric)
    if out is not None:
        save(groups, text, Path(out))
    return text


def keys_of(groups: Sequence[Group]) -> list[str]:
    """List the metrics of all runs, in display order."""
    return sort_keys(list(dict.fromkeys(key for group in groups for run in group.runs for key in run.keys)))


def tables(groups: Sequence[Group], metric: str = "") -> str:
    """Format all tables and notes. Raises ValueError for a metric that no run has."""
    keys = keys_of(groups)
    if metric and metric not in keys:
        raise ValueError(f"metric: no run has {metric!r}; for example {', '.join(keys[:3]) or 'none yet'}")
    evals = [key for key in keys if re.fullmatch(MEAN_AT_K, key)]
    training = [
        Column("reward AUC", "reward/mean", area_under),
        Column("reward end", "reward/mean", mean_from(0.9)),
        Column("entropy start", "train/entropy", mean_from(0.0)),
        Column("entropy middle", "train/entropy", mean_from(0.45)),
        Column("entropy end", "train/entropy", mean_from(0.9)),
        Column("tokens/s", "throughput/tokens_per_s", lambda series: float(np.median(series[1]))),
    ]
    finals = [Column(f"{heading(key)} final", key, last, 100.0) for key in evals]
    bests = [Column(f"{heading(key)} best", key, best, 100.0) for key in evals]
    parts = [table("Training", groups, training), table("Evaluation, %", groups, finals + bests)]
    for side, word, sign in (("up", "upper", "positive"), ("down", "lower", "negative")):
        bins = [key for key in keys if re.fullmatch(f"clip/{side}(/.+)?", key)]
        columns = [Column(key[len(f"clip/{side}/") :] or "all", key, mean_from(0.0, 1.0), 100.0) for key in bins]
        title = f"Clipped at the {word} bound by old probability p, % of tokens with {sign} advantage, mean over steps"
        parts.append(table(title, groups, columns))
    tested = [Column(f"{heading(key)} %", key, last, 100.0) for key in evals] + [training[0], training[4]]
    parts += [difference_table(groups, tested), ranking(groups, metric), notes(groups, evals)]
    return "\n\n".join(filter(None, parts))


def save(groups: Sequence[Group], text: str, out: Path) -> None:
    """Write the text and the figures that have data."""
    keys = keys_of(groups)
    figures: dict[str, list[str]] = {"": [key for pattern in OVERVIEW for key in keys if re.fullmatch(pattern, key)]}
    for key in keys:
        if not key.endswith("_stderr"):
            figures.setdefault(f"_{describe(key)[0]}", []).append(key)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text + "\n")
    for name, members in figures.items():
        panels = [panel for key in members if (panel := panel_of(groups, key))]
        draw(panels, out.with_name(f"{out.stem}{name}{out.suffix or '.png'}"), CAPTION)


# ---- groups and their labels ----


def group_runs(runs: Sequence[Record]) -> list[Group]:
    """Group the seeds of each config, in the order of their first runs. A run without config is its own group."""
    members: dict[str, list[Record]] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in REPEAT_KEYS}
        members.setdefault(json.dumps(config or str(run.path), sort_keys=True, default=str), []).append(run)
    labels = label_configs([group[0].config for group in members.values()])
    return [
        Group(label if group[0].config else group[0].name, tuple(group))
        for label, group in zip(labels, members.values(), strict=True)
    ]


def label_configs(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a short, unique label per config from the keys in which they differ: "fixed", "band divergence=tv".

    The rule comes first, without its key. Other keys are omitted where the config has the most common value. Arguments
    of a rule are compared among configs with that rule.
    """
    flat = [{k: str(v) for k, v in flatten(config).items() if k not in REPEAT_KEYS} for config in configs]
    keys = sorted(dict.fromkeys(key for config in flat for key in config), key=lambda key: key != "rule")
    labels = []
    for config in flat:
        different, unusual = {}, {}
        for key in keys:
            peers = [c for c in flat if c and (not key.startswith("rule_args.") or c.get("rule") == config.get("rule"))]
            own, counts = config.get(key, "unset"), Counter(c.get(key, "unset") for c in peers)
            if len(counts) > 1:
                (usual, most), (_, next_most) = counts.most_common(2)
                distinct = len({Path(value).name for value in counts}) == len(counts)
                different[key] = Path(own).name if distinct else own
                if key == "rule" or own != usual or most == next_most:
                    unusual[key] = different[key]
        words = (unusual or different or {"rule": config.get("rule", "run")}).items()
        labels.append(" ".join(value if key == "rule" else f"{key.split('.')[-1]}={value}" for key, value in words))
    return labels


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings. Example: {"rule_args": {"delta": 0.05}} -> {"rule_args.delta": 0.05}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


# ---- reductions of a metric's series to a number per run ----


def area_under(series: Series) -> float:
    """Mean height of the curve: trapezoidal area divided by the range of steps."""
    steps, values = series
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else values[0])


def mean_from(start: float, width: float = 0.1) -> Callable[[Series], float]:
    """Return a function: mean over a share `width` of the values (at least one value), from the share `start` on."""

    def measure(series: Series) -> float:
        count = max(1, round(width * len(series[1])))
        first = min(ceil(start * len(series[1])), len(series[1]) - count)
        return float(series[1][first : first + count].mean())

    return measure


def last(series: Series) -> float:
    return float(series[1][-1])


def best(series: Series) -> float:
    return float(series[1].max())


# ---- tables ----


def heading(key: str) -> str:
    """Return the heading of a metric. Example: eval/aime24/mean@32 -> "aime24 mean@32"."""
    return key.removeprefix("eval/").replace("/", " ")


def table(title: str, groups: Sequence[Group], columns: Sequence[Column]) -> str:
    """Format a table with one row per group; "" without columns."""
    header = ["group", "seeds", "steps", *(column.heading for column in columns)]
    texts = zip(*(format_column(groups, column) for column in columns), strict=True)
    rows = []
    for group, cells in zip(groups, texts, strict=False):  # no texts without columns
        reached = [run.last_step for run in group.runs]
        steps = dict.fromkeys((str(min(reached)), str(max(reached))))
        rows.append([group.label, str(len(group.runs)), "-".join(steps), *cells])
    return f"{title}\n\n" + text_table(header, rows) if columns else ""


def values_of(group: Group, column: Column) -> list[float]:
    """Return the scaled number of every run that has the metric."""
    curves = [series for run in group.runs if len((series := run.series(column.metric))[0])]
    return [column.scale * column.measure(series) for series in curves]


def format_column(groups: Sequence[Group], column: Column) -> list[str]:
    """Format mean ± standard error of every group, to two digits of the largest error (else three of the largest mean).

    The standard error is over seeds. For one seed it is over problems of the evaluation, marked with a dagger.
    """
    group_values = [values_of(group, column) for group in groups]
    errors = [standard_error(values) for values in group_values]
    marks = ["" for _ in groups]
    for i, group in enumerate(groups):
        if len(group_values[i]) == 1 and column.measure in (last, best):
            (run,) = [run for run in group.runs if len(run.series(column.metric)[0])]
            steps, curve = run.series(column.metric)
            step = steps[-1] if column.measure is last else steps[curve.argmax()]
            errors[i], marks[i] = column.scale * run.value(f"{column.metric}_stderr", int(step)), "†"
    sizes = [error for error in errors if error > 0] or [abs(np.mean(values)) / 10 for values in group_values if values]
    decimals = int(np.clip(1 - np.floor(np.log10(max(sizes, default=1) or 1)), 0, 5))
    return [
        (f"{np.mean(values):.{decimals}f}" if values else "-")
        + (f" ± {error:.{decimals}f}{mark}" if isfinite(error) else "")
        for values, error, mark in zip(group_values, errors, marks, strict=True)
    ]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns."""
    cells = [[cell.replace("|", "/") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


# ---- tests and intervals ----


def two_sided_p(t: float, df: int) -> float:
    """Return P(|T| >= t) of Student's t with `df` degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(df))
    term, total = (1.0, 0.0) if df % 2 == 0 else (cos(angle), 0.0)
    for k in range(df % 2, df - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = sin(angle) * total if df % 2 == 0 else 2 / pi * (angle + sin(angle) * total)
    return max(0.0, 1 - inside)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; nan for fewer than two values."""
    return float(np.std(values, ddof=1) / sqrt(len(values))) if len(values) > 1 else float("nan")


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test for mean difference 0; 1 if all differences are 0."""
    mean, error = float(np.mean(differences)), standard_error(differences)
    return two_sided_p(abs(mean) / error, len(differences) - 1) if error else float(mean == 0)


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's t confidence interval at 1 - LEVEL for the mean of paired differences; nan for fewer than two."""
    low, high = 0.0, 1e6
    for _ in range(100 if len(differences) > 1 else 0):
        t = (low + high) / 2
        low, high = (t, high) if two_sided_p(t, len(differences) - 1) > LEVEL else (low, t)
    mean, half = float(np.mean(differences)), high * standard_error(differences)
    return mean - half, mean + half


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the given order. They control the family-wise error rate."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = running
    return adjusted


def pair_by_seed(base: Group, group: Group, key: str) -> list[tuple[Record, Record, np.ndarray]]:
    """Pair runs by seed (the first run of a repeated seed), with the steps at which both have `key`."""
    theirs, ours = ({run.config.get("seed"): run for run in reversed(each.runs)} for each in (base, group))
    pairs = [(theirs[seed], ours[seed]) for seed in sorted(theirs, key=str) if seed in ours]
    triples = [(a, b, np.intersect1d(a.series(key)[0], b.series(key)[0])) for a, b in pairs]
    return [pair for pair in triples if len(pair[2])]


def differences(base: Group, group: Group, column: Column) -> list[float]:
    """Scaled differences group - base: one per common seed, at the steps that both runs have."""
    values = []
    for *pair, steps in pair_by_seed(base, group, column.metric):
        series = [(steps, np.array([run.value(column.metric, step) for step in steps])) for run in pair]
        values.append(column.scale * (column.measure(series[1]) - column.measure(series[0])))
    return values


def difference_table(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    """Compare each group with the first; "" for one group. Holm's correction is over the groups, per metric."""
    base, *others = groups
    rows: dict[str, list[list[str]]] = {group.label: [] for group in others}
    for column in columns:
        group_values = [differences(base, group, column) for group in others]
        adjusted = iter(holm([paired_p(values) for values in group_values if len(values) > 1]))
        for group, values in zip(others, group_values, strict=True):
            p = next(adjusted) if len(values) > 1 else None
            rows[group.label].append([group.label, column.heading, *difference_cells(base, group, column, values, p)])
    title = f"Difference from {base.label!r}, same seeds paired at the steps that both have"
    header = ["group", "metric", "pairs", "difference", "95 % interval", "Holm p", "verdict"]
    return f"{title}\n\n" + text_table(header, sum(rows.values(), [])) if others else ""


def difference_cells(base: Group, group: Group, column: Column, values: Sequence[float], p: float | None) -> list[str]:
    """Format number of pairs, difference, interval, p and verdict."""
    if not values:
        return ["0", "-", "-", "-", "nothing to compare: no seed (or no step) in common"]
    mean, decimals = float(np.mean(values)), 2 if column.scale == 100.0 else 3
    if p is None:
        error, how = problem_error(base, group, column)
        low, high = mean - 1.96 * error, mean + 1.96 * error
        verdict = f"{'within' if low <= 0 <= high else 'beyond'} the noise of the problems ({how}); one seed"
        verdict = verdict if isfinite(error) else "one seed: no verdict"
    else:
        low, high = paired_interval(values)
        verdict = "not significant" if p >= LEVEL else "higher" if mean > 0 else "lower"
        if len(values) < MIN_SEEDS:
            agree = sum(np.sign(value) == np.sign(mean) for value in values)
            verdict = f"same sign in {agree} of {len(values)} seeds; no verdict below {MIN_SEEDS} seeds"
    interval = f"{low:+.{decimals}f} .. {high:+.{decimals}f}" if isfinite(low) else "-"
    return [str(len(values)), f"{mean:+.{decimals}f}", interval, "-" if p is None else f"{p:.2g}", verdict]


def problem_error(base: Group, group: Group, column: Column) -> tuple[float, str]:
    """Standard error over problems of the difference between a single pair of runs, and its assumption.

    Paired by problem if both runs have per-problem scores (evals/). Otherwise adds the variances of the two runs.
    """
    ((*pair, steps),) = pair_by_seed(base, group, column.metric)
    match, step = re.fullmatch(MEAN_AT_K, column.metric), int(steps[-1])
    before, after = (run.scores(match["set"], step) if match else {} for run in pair)
    if before and before.keys() == after.keys():
        return column.scale * standard_error([after[problem] - before[problem] for problem in before]), "paired"
    errors = [column.scale * run.value(f"{column.metric}_stderr", step) for run in pair]
    return sqrt(errors[0] ** 2 + errors[1] ** 2), "assumes independent problems"


def ranking(groups: Sequence[Group], metric: str) -> str:
    """Rank groups by the final value of `metric`, highest first, and test every pair; "" without a metric."""
    if not metric:
        return ""
    column = Column(metric, metric, last, 100.0 if describe(metric)[2].startswith("%") else 1.0)
    values = {group.label: values_of(group, column) for group in groups}
    ranked = sorted((g for g in groups if values[g.label]), key=lambda g: -np.mean(values[g.label]))
    pairs = [(a.label, b.label, differences(b, a, column)) for a, b in combinations(ranked, 2)]
    pairs = [pair for pair in pairs if len(pair[2]) >= MIN_SEEDS]
    levels = holm([paired_p(v) for *_, v in pairs])
    higher = [(a, b) for (a, b, v), p in zip(pairs, levels, strict=True) if p < LEVEL and np.mean(v) > 0]
    rows = []
    for label in (group.label for group in ranked):
        low, high = paired_interval(values[label])
        lower = ", ".join(b for a, b in higher if a == label)
        mean = f"{np.mean(values[label]):.3g}"
        rows.append([label, str(len(values[label])), mean, f"{low:.3g} .. {high:.3g}", lower or "-"])
    unit = ", %" if column.scale == 100.0 else ""
    title = f"Ranking by final {metric}{unit} ({len(pairs)} pairs of groups tested, Holm-corrected p < {LEVEL})"
    header = ["group", "seeds", "mean", "95 % interval over seeds", "significantly higher than"]
    return f"{title}\n\n{text_table(header, rows)}"


# ---- notes and the command line ----


def notes(groups: Sequence[Group], evals: Sequence[str]) -> str:
    """Notes on incomplete runs, repeated or single seeds, and different last steps."""
    lines = [LEGEND]
    for group in groups:
        seeds = Counter(run.config.get("seed") for run in group.runs)
        lines += [f"{group.label}: one seed"] * (len(group.runs) == 1)
        lines += [
            f"{group.label}: {n} runs with seed {s}; the first is used for pairs" for s, n in seeds.items() if n > 1
        ]
        for run in group.runs:
            missing = [heading(key) for key in evals if key not in run.keys]
            lines += [f"{run.name}: {note}" for note in run.notes]
            lines += [f"{run.name}: no evaluation on {', '.join(missing)}"] * bool(missing)
    if len({run.last_step for group in groups for run in group.runs}) > 1:
        lines.append("runs reached different steps: each table but the differences shows a run at its own last step")
    return "Notes\n\n" + "\n".join(f"- {line}" for line in lines)


class Parser(argparse.ArgumentParser):
    """Argument parser of `python -m MODULE`. Invalid arguments give a one-line error, exit code 2."""

    def __init__(self, module: str, description: str | None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m {module}", description=description, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval.compare", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's group is the reference")
    parser.add_argument(
        "--out", type=Path, default=Path("compare/figure.png"), help="overview figure (default %(default)s)"
    )
    parser.add_argument(
        "--metric", default="", help="metric for ranking the groups and testing all pairs, by its final value"
    )
    args = parser.parse_args(argv)
    try:
        print(compare(args.runs, args.out, args.metric))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"\nTables and figures: {args.out.with_suffix('')}*")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
