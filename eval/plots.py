"""Curves of one run or of several groups of runs, readable in print and by the colour-blind.

    plot_run(Path("runs/band"))          # writes runs/band/plots/entropy.png and .svg

FIGURES is the one place that says which metric is drawn where and in which unit; a metric it does not name is drawn in
a figure of its prefix, so a new metric needs no line here. matplotlib is imported when the first figure is drawn.
Colours: Okabe and Ito's palette, grey for its yellow (too pale on paper); dashes tell lines apart in black and white.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from eval.records import Record, Series, load_record

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
    "svg.hashsalt": "bandpo",  # the same runs give the same file
}


Colours = Mapping[str, str]  # label -> colour


@dataclass(frozen=True)
class Axis:
    title: str  # may name groups of `pattern`, as {set}
    unit: str  # y label; a unit that starts with % shows shares times 100
    pattern: str  # full match of the metric; its group `line` tells several metrics of one axis apart


# Figure name -> its axes.
FIGURES: dict[str, tuple[Axis, ...]] = {
    "entropy": (Axis("Policy entropy", "nats per token", "train/entropy"),),
    "reward": (
        Axis("Mean reward", "reward", "reward/mean"),
        Axis("Answers graded right", "% of answers", "reward/accuracy"),
        Axis("Prompts with every answer right", "% of prompts", "reward/solved_all"),
        Axis("Prompts with no answer right", "% of prompts", "reward/solved_none"),
        Axis("Prompts without a signal", "% of prompts", "reward/no_signal"),
    ),
    "verifier": (
        Axis("Not compared:", "% of answers", "reward/(?P<line>timeout|crash|guard|no_answer|contradiction)"),
    ),
    "clip": (
        Axis("Clipped at the upper bound", "% of tokens with A > 0", "clip/up"),
        Axis("Clipped at the lower bound", "% of tokens with A < 0", "clip/down"),
        Axis("Clipped up, old probability", "% of the bin, A > 0", "clip/up/(?P<line>.+)"),
        Axis("Clipped down, old probability", "% of the bin, A < 0", "clip/down/(?P<line>.+)"),
        Axis("Clipped, dual clip included", "% of tokens", "clip/fraction"),
    ),
    "bounds": (
        Axis("Interval of the ratio, mean", "ratio", "band/(?P<line>lower|upper)_mean"),
        Axis("Ratio, mean", "ratio", "ratio/mean"),
        Axis("Ratio, largest", "ratio", "ratio/max"),
    ),
    "eval": (Axis("{set}", "% of problems", r"eval/(?P<set>.+)/(?P<line>(mean|pass|maj|strict_mean)@\d+)"),),
    "eval_answers": (
        Axis("{set}: answer length", "tokens", "eval/(?P<set>.+)/response_length_mean"),
        Axis("{set}: truncated", "% of answers", "eval/(?P<set>.+)/truncated"),
    ),
    "response": (
        Axis("Response length", "tokens", "response/length_(?P<line>.+)"),
        Axis("Truncated responses", "% of responses", "response/truncated"),
    ),
    "train": (
        Axis("Loss", "loss", "train/loss"),
        Axis("Radius of the Band", "divergence", "train/delta"),
        Axis("Tokens trained on", "tokens", "train/tokens_seen"),
    ),
    "mismatch": (
        Axis("Sampler against trainer: KL", "nats per token", "mismatch/kl"),
        Axis("Sampler against trainer: largest gap", "nats", "mismatch/max"),
    ),
    "optim": (
        Axis("Gradient norm", "norm before clipping", "optim/grad_norm"),
        Axis("Learning rate", "learning rate", "optim/lr"),
        Axis("Skipped updates", "updates", "optim/skipped"),
    ),
    "speed": (
        Axis("Throughput", "tokens per second", "throughput/tokens_per_s"),
        Axis("Time:", "seconds per step", "time/(?P<line>.+)_s"),
        Axis("Computed on tokens, not padding", "% of positions", "throughput/real_token_share"),
        Axis("Peak memory", "GiB", "memory/peak_gib"),
    ),
}


@dataclass(frozen=True)
class Curve:
    """One line with its band: the mean over seeds and the range from the lowest to the highest seed."""

    label: str
    seeds: tuple[Series, ...]
    stderr: Series | None  # one seed only: the band is this standard error (of an eval metric, over problems)


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]


def plot_run(run_dir: Path) -> list[Path]:
    """Draw the entropy of one run, and below it what it reached, into run_dir/plots/entropy.png and .svg.

    Everything else of a run is on its page (eval/view.py). Returns the files written; [] for a run without entropies.
    """
    run = load_record(Path(run_dir))
    panels: dict[str, Panel] = {}
    for key in sort_keys(run.keys):
        if re.fullmatch(r"train/entropy|eval/.+/mean@\d+", key) and len(run.series(key)[0]):
            _, title, unit, line = describe(key)
            panels[key] = Panel(title.rstrip(":"), unit, (Curve(line, (run.series(key),), stderr_of(run, key)),))
    if "train/entropy" not in panels:
        return []
    path = Path(run_dir) / "plots" / "entropy.png"
    return draw(list(panels.values()), {}, path, f"{run.name}, to step {run.last_step}", (".png", ".svg"))


def describe(key: str) -> tuple[str, str, str, str]:
    """(figure, title, unit, line) of a metric name. Example: clip/up/p<0.2 is the line `p<0.2` of a panel of `clip`."""
    for figure, axes in FIGURES.items():
        for axis in axes:
            if match := re.fullmatch(axis.pattern, key):
                groups = match.groupdict()
                return figure, axis.title.format(**groups), axis.unit, groups.get("line", "")
    return key.split("/")[0], key, "", ""


def sort_keys(keys: Sequence[str]) -> list[str]:
    """In the order of FIGURES; probability bins by their number (p<0.01 before p<0.2, p<=1 last)."""
    patterns = [axis.pattern for axes in FIGURES.values() for axis in axes]

    def place(key: str) -> tuple[int, float, int]:
        axis = next((i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, key)), len(patterns))
        bound = re.search(r"p<=?([\d.]+)$", key)
        return axis, float(bound[1]) if bound else 0.0, keys.index(key)

    return sorted(keys, key=place)


def stderr_of(run: Record, key: str) -> Series | None:
    return run.series(f"{key}_stderr") if f"{key}_stderr" in run.keys else None


def draw(panels: Sequence[Panel], colours: Colours, path: Path, caption: str, suffixes: Sequence[str]) -> list[Path]:
    """Write one figure, at most four panels wide, as path with each of `suffixes`. Returns the files written.

    colours: of lines that keep theirs from figure to figure, by label; the others take one after the other.
    """
    # Here and not above: nothing but drawing needs it. A bare Figure renders with Agg and leaves the backend alone.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not panels:
        return []
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    shared = len(labels) > 1 and len(panels) > 1 and _same_lines(panels)  # one legend below, or one beside each panel
    widest = 4 if shared else 3
    rows = -(-len(panels) // widest)
    columns = -(-len(panels) // rows)
    legend_width = 0.7 + 0.075 * max(map(len, labels))  # inches
    width = columns * (3.5 if shared else 3.5 + legend_width * (len(labels) > 1))
    across = max(1, min(len(labels), int(width / legend_width)))
    height = 2.6 * rows + 0.4 + (0.2 * -(-len(labels) // across) if shared else 0.0)
    if not shared:
        height = max(height, 0.6 + 0.2 * max(len(panel.curves) for panel in panels) * rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, colours, labels if shared else [curve.label for curve in panel.curves])
            if not shared and any(curve.label for curve in panel.curves):
                axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=3)
        limits = [axis.get_xlim() for axis in axes.flat[: len(panels)]]
        for axis in axes.flat[: len(panels)]:  # a metric that begins late must not look as if it began early
            axis.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        if shared:
            lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
            handles = [lines[label] for label in labels]
            figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False, handlelength=3)
        return _write(figure, path, caption, suffixes)


def _same_lines(panels: Sequence[Panel]) -> bool:
    """Whether all panels tell the same lines apart, so that one legend serves them all."""
    longest = max(({curve.label for curve in panel.curves} for panel in panels), key=len)
    return all({curve.label for curve in panel.curves} <= longest for panel in panels)


def line_style(number: int) -> tuple[str, str]:
    """Colour and dashes of the line with this number; no two of the first 32 are alike."""
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def _draw_panel(axis, panel: Panel, colours: Colours, labels: Sequence[str]) -> None:
    scale = 100.0 if panel.unit.startswith("%") else 1.0
    few_points = max(len(steps) for curve in panel.curves for steps, _ in curve.seeds) <= 12
    for curve in panel.curves:
        colour, dash = line_style(labels.index(curve.label))
        colour = colours.get(curve.label, colour)
        steps, mean, low, high = spread(curve)
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": "o" if few_points else None}
        axis.plot(steps, scale * mean, linewidth=1.5, markersize=3, label=curve.label, **look)
        axis.fill_between(steps, scale * low, scale * high, color=colour, alpha=0.15, linewidth=0)
    axis.set_title(panel.title, fontsize=9.5)
    axis.set_xlabel("step")
    axis.set_ylabel(panel.unit)
    if panel.unit.startswith("%"):  # a share's axis starts at nothing, so that noise does not look like a trend
        axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)


def spread(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps up to where the first seed ends, the mean over the seeds that have a value there, the edges of the band."""
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


# Many runs at once


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved until no two are nearer than `gap`, in their order."""
    order, out = np.argsort(places, kind="stable"), np.array(places, dtype=float)
    for _ in range(50 * len(out)):
        for low, high in pairwise(order):
            lack = max(0.0, gap - (out[high] - out[low]))
            out[low], out[high] = out[low] - lack / 2, out[high] + lack / 2
    return out.tolist()


def _canvas(rows: int, columns: int, size: tuple[float, float], **shared: Any):
    """A figure of axes, `size` inches each; to be used within the STYLE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _write(figure, path: Path, caption: str, suffixes: Sequence[str] = (".png", ".svg")) -> list[Path]:
    """The figure as path with each of `suffixes`."""
    figure.suptitle("\n".join(wrap(caption, int(15 * figure.get_figwidth()))), fontsize=8, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in suffixes]
    for file in written:
        figure.savefig(file, dpi=160)
    return written


def _label_ends(axis, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Labels right of the axis, each led to from its point: (label, x, y, colour)."""
    low, high = axis.get_ylim()
    places = apart([end[2] for end in ends], 0.065 * (high - low))
    shift = max(0.0, low - min(places)) - max(0.0, max(places) - high)  # none above or below the axis
    for (label, x, y, colour), place in zip(ends, [place + shift for place in places], strict=True):
        across = axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[0]
        axis.annotate(
            label,
            (across, y),
            (1.04, place),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def draw_dots(panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]], colours: Colours, path: Path, caption: str):
    """A panel for each figure (its title; values by label): a row for each label, a dot for each seed, their mean."""
    from matplotlib import rc_context

    labels = list(dict.fromkeys(label for _, values in panels for label in values))
    with rc_context(STYLE):
        size = (3.1 + 1.2 / len(panels), 0.32 * len(labels) + 1.0)
        figure, axes = _canvas(1, len(panels), size, sharey=True)
        for axis, (title, of_label) in zip(axes[0], panels, strict=True):
            for row, label in enumerate(labels):
                values, colour = of_label.get(label, ()), colours[label]
                axis.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
                if len(values):
                    axis.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
            axis.set_title(title, fontsize=9.5)
            axis.margins(x=0.1)
            axis.locator_params(axis="x", nbins=5)
            axis.set_yticks(range(len(labels)), labels)
        axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)
        _write(figure, path, caption)


def draw_sweeps(panels: Sequence[Panel], colours: Colours, path: Path, caption: str, x_label: str, each: bool):
    """Lines over a quantity, on a logarithmic axis if it is never zero: the mean over seeds, lowest to highest shaded.

    each: a row for each panel and in it a small panel for each line, the others grey behind it. Otherwise a panel for
    each, its lines labelled where they end.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import NullFormatter

    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    with rc_context(STYLE):
        rows, columns = (len(panels), len(labels)) if each else (1, len(panels))
        figure, axes = _canvas(rows, columns, (1.45, 1.5) if each else (3.3, 2.6), sharey="row")
        line_ends: list[Any] = []
        for place, axis in np.ndenumerate(axes):
            panel = panels[place[0] if each else place[1]]
            ends = []
            for curve in sorted(panel.curves, key=lambda curve: each and curve.label == labels[place[1]]):
                x, mean, low, high = spread(curve)
                shown = not each or curve.label == labels[place[1]]
                colour = colours[curve.label] if shown else "0.85"
                axis.plot(
                    x, mean, color=colour, linewidth=1.6 if shown else 0.7, marker="o" if shown else "", markersize=2.5
                )
                if shown:
                    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                    ends.append((curve.label, x[-1], mean[-1], colour))
            if min(values[0] for curve in panel.curves for values, _ in curve.seeds) > 0:
                axis.set_xscale("log")
            if each and place[0] == 0:
                axis.set_title(labels[place[1]], fontsize=9, color=colours[labels[place[1]]])
            elif not each:
                axis.set_title(panel.title, fontsize=9.5)
                axis.set_xlabel(panel.unit)
                line_ends.append((axis, ends))
            if each and place[1] == 0:
                axis.set_ylabel("\n".join(wrap(panel.title, 20)), fontsize=8)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(labelsize=7)
        for axis, ends in line_ends:  # now that the common height is known
            _label_ends(axis, ends)
        if each:
            figure.supxlabel(x_label, fontsize=9)
        else:
            axes[0, 0].set_ylabel(x_label)
        _write(figure, path, caption)


def draw_points(
    panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
    colours: Colours,
    path: Path,
    caption: str,
    axis_labels: tuple[str, str],
):
    """A panel for each title, a point (x, y) for each run, each label led to from the mean of its points."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, axes = _canvas(1, len(panels), (4.0, 3.2))
        for axis, (title, of_label) in zip(axes[0], panels, strict=True):
            ends = []
            for label, points in of_label.items():
                x, y = np.array(points).T
                axis.plot(x, y, "o", color=colours[label], markersize=4, alpha=0.5, markeredgewidth=0)
                ends.append((label, x.mean(), y.mean(), colours[label]))
            axis.set_title(title, fontsize=9.5)
            axis.set_xlabel(axis_labels[0])
            _label_ends(axis, ends)
        axes[0, 0].set_ylabel(axis_labels[1])
        _write(figure, path, caption)
