"""Curves of one run or of several groups of runs, safe for colour blindness and black-and-white print.

    plot_run(Path("runs/band"))          # writes runs/band/plots/entropy.png

FIGURES maps each metric to its figure, title and unit. A metric that is not listed is drawn in a figure named after its
prefix. matplotlib is imported when the first figure is drawn.
Colours: Okabe and Ito's palette, with grey instead of yellow. Dashes distinguish the lines in black and white.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from eval.records import Record, Series, load_record
from rewards import NOT_COMPARED

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
DASHES = ("solid", "dashed", "dashdot", "dotted")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.1,  # inches
    "figure.constrained_layout.h_pad": 0.08,
}


@dataclass(frozen=True)
class Axis:
    """Axis of a figure, for the metrics that match `pattern`."""

    title: str  # may contain groups of `pattern`, such as {set}
    unit: str  # y label; if it starts with %, values are multiplied by 100
    pattern: str  # full match of the metric; its group `line` labels one of several metrics of the axis


# Figure name -> its axes.
FIGURES: dict[str, tuple[Axis, ...]] = {
    "entropy": (Axis("Policy entropy", "nats per token", "train/entropy"),),
    "reward": (
        Axis("Mean reward", "reward", "reward/mean"),
        Axis("Correct responses", "% of responses", "reward/accuracy"),
        Axis("Groups with all responses correct", "% of groups", "reward/solved_all"),
        Axis("Groups with no response correct", "% of groups", "reward/solved_none"),
        Axis("Zero-advantage groups", "% of groups", "reward/zero_std"),
    ),
    "verifier": (Axis("Not compared:", "% of responses", f"reward/(?P<line>{'|'.join(NOT_COMPARED)})"),),
    "clip": (
        Axis("Clipped at the upper bound", "% of tokens with A > 0", "clip/up"),
        Axis("Clipped at the lower bound", "% of tokens with A < 0", "clip/down"),
        Axis("Clipped up, old probability", "% of the bin, A > 0", "clip/up/(?P<line>.+)"),
        Axis("Clipped down, old probability", "% of the bin, A < 0", "clip/down/(?P<line>.+)"),
        Axis("Clipped, dual clip included", "% of tokens", "clip/fraction"),
        Axis("Gradient weight, mean", "weight", "clip/weight_mean"),
    ),
    "bounds": (
        Axis("Clip bounds, mean", "ratio", "band/(?P<line>lower|upper)_mean"),
        Axis("Ratio, mean", "ratio", "ratio/mean"),
        Axis("Ratio, largest", "ratio", "ratio/max"),
    ),
    "eval": (Axis("{set}", "% of problems", r"eval/(?P<set>.+)/(?P<line>(mean|pass|maj|strict_mean)@\d+)"),),
    "eval_responses": (
        Axis("{set}: response length", "tokens", "eval/(?P<set>.+)/response_length_mean"),
        Axis("{set}: truncated", "% of responses", "eval/(?P<set>.+)/truncated"),
    ),
    "response": (
        Axis("Response length", "tokens", "response/length_(?P<line>.+)"),
        Axis("Truncated responses", "% of responses", "response/truncated"),
    ),
    "train": (
        Axis("Loss", "loss", "train/loss"),
        Axis("Radius of the Band", "divergence", "train/delta"),
        Axis("Tokens trained on", "tokens", "train/tokens_seen"),
        Axis("Staleness", "steps", "train/staleness"),
        Axis("KL to the reference", "nats per token", "kl/reference"),
    ),
    "rollout": (
        Axis("KL(rollout, trainer)", "nats per token", "rollout/kl"),
        Axis("Log-prob difference to the rollout, largest", "nats", "rollout/logprob_diff_max"),
        Axis("Importance weight (TIS), mean", "weight", "rollout/tis_mean"),
    ),
    "optim": (
        Axis("Gradient norm", "norm before clipping", "optim/grad_norm"),
        Axis("Learning rate", "learning rate", "optim/lr"),
        Axis("Skipped updates", "updates", "optim/skipped"),
    ),
    "speed": (
        Axis("Throughput", "tokens per second", "throughput/tokens_per_s"),
        Axis("Time:", "seconds per step", "time/(?P<line>.+)_s"),
        Axis("Positions that are tokens, not padding", "% of positions", "throughput/real_token_share"),
        Axis("Peak memory", "GiB", "memory/peak_gib"),
    ),
}


@dataclass(frozen=True)
class Curve:
    """One line with its band: mean over seeds, lowest to highest seed."""

    label: str
    seeds: tuple[Series, ...]
    stderr: Series | None  # for one seed, the band: standard error over problems of an evaluation metric


@dataclass(frozen=True)
class Panel:
    """One metric with its curves."""

    title: str
    unit: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Group:
    """The seeds of one configuration."""

    label: str
    runs: tuple[Record, ...]


def plot_run(run_dir: Path) -> list[Path]:
    """Draw entropy and mean@k of one run into run_dir/plots/entropy.png; return the files, [] if it has neither.

    All other metrics of a run are in its report (eval/report.py).
    """
    run = load_record(Path(run_dir))
    keys = [key for key in sort_keys(run.keys) if re.fullmatch(r"train/entropy|eval/.+/mean@\d+", key)]
    panels = [panel for key in keys if (panel := panel_of([Group("", (run,))], key))]
    return draw(panels, run.path / "plots" / "entropy.png", f"{run.name}, to step {run.last_step}")


def panel_of(groups: Sequence[Group], key: str) -> Panel | None:
    """Return one metric with a line per group; None if it has no finite value."""
    curves = []
    for group in groups:
        runs = [run for run in group.runs if len(run.series(key)[0])]
        if runs:
            has_error = len(runs) == 1 and f"{key}_stderr" in runs[0].keys
            stderr = runs[0].series(f"{key}_stderr") if has_error else None
            curves.append(Curve(group.label, tuple(run.series(key) for run in runs), stderr))
    _, title, unit, line = describe(key)
    return Panel(f"{title} {line}".strip(), unit, tuple(curves)) if curves else None


def describe(key: str) -> tuple[str, str, str, str]:
    """Return (figure, title, unit, line) of a metric. Example: clip/up/p<0.2 is the line `p<0.2` in figure `clip`."""
    for figure, axes in FIGURES.items():
        for axis in axes:
            if match := re.fullmatch(axis.pattern, key):
                groups = match.groupdict()
                return figure, axis.title.format(**groups), axis.unit, groups.get("line", "")
    return key.split("/")[0], key, "", ""


def sort_keys(keys: Sequence[str]) -> list[str]:
    """Sort metrics in the order of FIGURES, and probability bins by their bound (p<0.01 before p<0.2, p<=1 last)."""
    patterns = [axis.pattern for axes in FIGURES.values() for axis in axes]

    def place(key: str) -> tuple[int, float, int]:
        axis = next((i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, key)), len(patterns))
        bound = re.search(r"p<=?([\d.]+)$", key)
        return axis, float(bound[1]) if bound else 0.0, keys.index(key)

    return sorted(keys, key=place)


def draw(panels: Sequence[Panel], path: Path, caption: str) -> list[Path]:
    """Write one figure, at most four panels wide; return the list of files, [] without panels."""
    # Imported here, because only drawing needs it. A bare Figure renders with Agg without changing the backend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not panels:
        return []
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    legend_width = 0.7 + 0.075 * max(map(len, labels))  # inches
    across = max(1, min(len(labels), int(3.5 * columns / legend_width)))
    height = 2.6 * rows + 0.4 + 0.2 * -(-len(labels) // across)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * columns, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, labels)
        limits = [axis.get_xlim() for axis in axes.flat[: len(panels)]]
        for axis in axes.flat[: len(panels)]:  # the same range of steps, so that a late start of a metric is visible
            axis.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        if len(labels) > 1:
            lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
            handles = [lines[label] for label in labels]
            figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False, handlelength=3)
        figure.suptitle("\n".join(wrap(caption, int(15 * figure.get_figwidth()))), fontsize=8, color="0.35")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    return [path]


def line_style(number: int) -> tuple[str, str]:
    """Return colour and dashes of the line with this number. The first 32 are distinct."""
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def _draw_panel(axis, panel: Panel, labels: Sequence[str]) -> None:
    scale = 100.0 if panel.unit.startswith("%") else 1.0
    few_points = max(len(steps) for curve in panel.curves for steps, _ in curve.seeds) <= 12
    for curve in panel.curves:
        colour, dash = line_style(labels.index(curve.label))
        steps, mean, low, high = spread(curve)
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": "o" if few_points else None}
        axis.plot(steps, scale * mean, linewidth=1.5, markersize=3, label=curve.label, **look)
        axis.fill_between(steps, scale * low, scale * high, color=colour, alpha=0.15, linewidth=0)
    axis.set_title(panel.title, fontsize=9.5)
    axis.set_xlabel("step")
    axis.set_ylabel(panel.unit)
    if panel.unit.startswith("%"):  # from 0, so that noise does not look like a trend
        axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)


def spread(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, mean, lower and upper edge of the band.

    Steps end where the first seed ends. The mean is over the seeds that have a value at that step.
    """
    end = min(seed_steps[-1] for seed_steps, _ in curve.seeds)
    steps = np.unique(np.concatenate([seed_steps for seed_steps, _ in curve.seeds]))
    steps = steps[steps <= end]
    values = np.full((len(curve.seeds), len(steps)), np.nan)  # (seeds, steps); nan where a seed has no value
    for row, (seed_steps, seed_values) in zip(values, curve.seeds, strict=True):
        row[np.isin(steps, seed_steps)] = seed_values[seed_steps <= end]
    mean = np.nanmean(values, axis=0)
    if len(curve.seeds) == 1 and curve.stderr is not None:
        known = dict(zip(*curve.stderr, strict=True))
        error = np.array([known.get(step, 0.0) for step in steps])
        return steps, mean, mean - error, mean + error
    return steps, mean, np.nanmin(values, axis=0), np.nanmax(values, axis=0)
