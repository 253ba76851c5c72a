"""Figures of the clipping rules, and their table in docs/rules.md.

python -m bench.plot_rules docs/figures/bounds.png                       # clip bounds and room in probability
python -m bench.plot_rules --rules all docs/figures/rules.png            # the gradient weight of every rule
python -m bench.plot_rules --rules band,my_rule.py:my_rule mine.png      # of some, or of a user's own
python -m bench.plot_rules --table docs/rules.md                         # the table, in place
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from bandpo.rule import RULES, Rule, load_rule

# Okabe and Ito's palette, told apart with any colour vision; line styles repeat the distinction in grey.
INK, MUTED, GRID = "#222222", "#6f6f6f", "#e4e4e4"
STYLES = {
    "Band KL": ("#0072B2", "-", 2.4),
    "Band TV": ("#009E73", (0, (5, 1.5)), 1.8),
    "Band chi2": ("#CC79A7", (0, (3, 1, 1, 1)), 1.8),
    "DCPO": ("#E69F00", (0, (1.2, 1.2)), 2.0),
    "fixed": (INK, "-", 1.4),
    "Clip-Higher": (MUTED, (0, (6, 2)), 1.4),
}
TITLES = {
    "Band KL": "Band, KL  δ = 0.05",
    "Band TV": "Band, TV  δ = 0.158",
    "Band chi2": "Band, χ²  δ = 0.10",
    "DCPO": "DCPO  0.16 / 0.20",
    "fixed": "fixed  0.2 / 0.2",
    "Clip-Higher": "Clip-Higher  0.2 / 0.28",
}
# Radii of about equal strength: for small moves chi2 is twice KL, and TV is at most sqrt(KL / 2). No cap.
METHODS = {
    "Band KL": load_rule("band", {"divergence": "kl", "delta": 0.05, "ratio_cap": None}),
    "Band TV": load_rule("band", {"divergence": "tv", "delta": 0.158, "ratio_cap": None}),
    "Band chi2": load_rule("band", {"divergence": "chi2", "delta": 0.1, "ratio_cap": None}),
    "DCPO": load_rule("dcpo", {"low": 0.16, "high": 0.2, "ratio_cap": None}),
    "fixed": load_rule("fixed", {"low": 0.2, "high": 0.2}),
    "Clip-Higher": load_rule("fixed", {"low": 0.2, "high": 0.28}),
}
SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.4,
}


def save(figure: Figure, paths: list[Path]) -> None:
    """Write the figure to every path, in the format of its suffix."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    plt.close(figure)


# ---- intervals ----


def draw_bounds(paths: list[Path]) -> None:
    """The picture of intervals: ratios and room in probability, against p."""
    with plt.rc_context(SETTINGS):
        figure, (ratio, room) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
        draw_ratios(ratio)
        draw_room(room)
        handles = [
            Line2D([], [], color=c, linestyle=s, linewidth=w, label=TITLES[k]) for k, (c, s, w) in STYLES.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=2.6)
        save(figure, paths)


def inputs(p: Tensor, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Inputs of a rule for single tokens, each a response of its own."""
    old, ids = p.log(), torch.arange(len(p))
    given = {"old_logprobs": old, "logprobs": old + ratio.log(), "advantages": advantages}
    return {**given, "entropy": torch.zeros_like(p), "sequence_ids": ids}


def bounds(method: str, p: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) of the method at probabilities p; no ratio can be above 1/p."""
    lower, upper = METHODS[method](**inputs(p, torch.ones_like(p), torch.ones_like(p)))
    return lower, torch.minimum(upper, 1 / p)


def draw_ratios(axes: Axes) -> None:
    """Ratio bounds over log p; what no distribution can reach is grey."""
    p = torch.logspace(-4, 0, 1200, dtype=torch.float64)[:-1]
    axes.fill_between(p, 1 / p, 1e4, color=GRID, linewidth=0, zorder=0)
    axes.text(0.37, 21, "p r > 1:\nno such\ndistribution", color=MUTED, fontsize=8.5, ha="center", va="center")
    axes.axhline(1, color=GRID, linewidth=1, zorder=0)
    axes.axhline(10, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.text(1.1e-4, 10.6, "ratio cap 10", color=MUTED, fontsize=8.5, va="bottom")
    for method, (colour, style, width) in STYLES.items():
        lower, upper = bounds(method, p)
        for bound in (lower, upper):
            axes.plot(p, bound.where(bound > 1e-9, torch.nan), color=colour, linestyle=style, linewidth=width)
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(0.05, 40))
    axes.set_xlabel("probability p of the token under the old policy")
    axes.set_title("Ratio bounds: how far new / old may go", loc="left", fontsize=11, fontweight="bold")
    axes.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.text(2.4e-3, 2.2, "upper bounds", color=MUTED, fontsize=8.5)
    axes.text(2.4e-3, 0.34, "lower bounds", color=MUTED, fontsize=8.5)


def draw_room(axes: Axes) -> None:
    """Probability that a token may gain or lose in a step, over p."""
    p = torch.linspace(0.0005, 0.9995, 1500, dtype=torch.float64)
    axes.fill_between(p, 1 - p, 1, color=GRID, linewidth=0, zorder=0)
    axes.fill_between(p, -p, -1, color=GRID, linewidth=0, zorder=0)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for method, (colour, style, width) in STYLES.items():
        for bound in bounds(method, p):
            axes.plot(p, p * (bound - 1), color=colour, linestyle=style, linewidth=width)
    axes.set(xlim=(0, 1), ylim=(-0.34, 0.32))
    axes.set_xlabel("probability p of the token under the old policy")
    axes.set_title("Room in probability: p (bound − 1)", loc="left", fontsize=11, fontweight="bold")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+.1f}".replace("-", "−") if abs(y) > 1e-9 else "0"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.text(0.995, 0.285, "p + gain > 1", color=MUTED, fontsize=8.5, ha="right")
    axes.text(0.02, -0.305, "p − loss < 0", color=MUTED, fontsize=8.5, ha="left")


# ---- weights ----

# Where the published values affect too few tokens to see.
DRAWN_WITH: dict[str, dict[str, float]] = {"clip_cov": {"share": 1.0}}
KEPT, MORE, BACK = "#5b9bd0", "#123a63", "#a4133c"
COLOURS = LinearSegmentedColormap.from_list(
    "weights", [(0, BACK), (1 / 3 - 1e-6, "#f7c9d4"), (1 / 3, "#ffffff"), (2 / 3, KEPT), (1, MORE)]
)
RATIOS, PROBABILITIES = (
    torch.logspace(-1, 1, 161, dtype=torch.float64),
    torch.logspace(-3, -1e-3, 121, dtype=torch.float64),
)


def example_batch() -> dict[str, Tensor]:
    """A micro-batch for rules with statistics over tokens: most tokens confident, ratios around 1."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20000, generator=generator, dtype=torch.float64).pow(0.5).clamp(1e-3, 0.999)
    shift = 0.35 * torch.randn(20000, generator=generator, dtype=torch.float64)
    ratio = torch.minimum(shift.exp(), 0.999 / p)
    return inputs(p, ratio, torch.randn(20000, generator=generator, dtype=torch.float64))


def weights(rule: Rule, sign: float) -> Tensor:
    """(len(RATIOS), len(PROBABILITIES)) w / r at A = sign, of tokens that join the example batch."""
    r, p = (x.flatten() for x in torch.meshgrid(RATIOS, PROBABILITIES, indexing="ij"))
    r = torch.minimum(r, 0.9999 / p)  # beyond, nothing is drawn
    drawn, others = inputs(p, r, torch.full_like(p, sign)), example_batch()
    others["sequence_ids"] = others["sequence_ids"] + len(p)
    result = rule(**{name: torch.cat([drawn[name], others[name]]) for name in drawn})
    if isinstance(result, tuple):
        lower, upper = (bound[: len(p)] for bound in result)
        result = torch.where(r > upper if sign > 0 else r < lower, 0.0, r)
    return (result[: len(p)] / r).view(len(RATIOS), len(PROBABILITIES))


def draw_rules(names: list[str], paths: list[Path]) -> None:
    """The picture of weights: a pair of panels a rule, A > 0 and A < 0."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    width, height = 3.1 * columns + 0.7, 1.95 * rows + 1.15  # inches
    framed: dict[Any, Any] = SETTINGS | {"axes.spines.top": True, "axes.spines.right": True}
    with plt.rc_context(framed):
        figure = plt.figure(figsize=(width, height))
        mesh = ScalarMappable()
        grid = figure.add_gridspec(
            rows, columns, left=0.6 / width, right=1 - 0.1 / width, bottom=1.35 / height, top=1 - 0.3 / height,
            wspace=0.16, hspace=0.28,
        )  # fmt: skip
        for k, name in enumerate(names):
            cell = grid[divmod(k, columns)].subgridspec(1, 2, wspace=0.06)
            left = figure.add_subplot(cell[0])
            right = figure.add_subplot(cell[1], sharey=left)
            rule, last = load_rule(name, DRAWN_WITH.get(name, {})), k + columns >= len(names)
            for axes, sign in ((left, 1.0), (right, -1.0)):
                mesh = draw_weights(axes, rule, sign)
                axes.tick_params(labelbottom=last, labelleft=axes is left, labelsize=7.5)
            given = ", ".join(f"{key} {value:g}" for key, value in DRAWN_WITH.get(name, {}).items())
            title = f"{rule.name}  ({given})" if given else rule.name
            left.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=3)
            if k % columns == 0:
                left.set_ylabel("ratio r", fontsize=8.5, labelpad=1)
            if last:
                left.set_xlabel("old probability p", fontsize=8.5, loc="left", labelpad=2)
        legend = figure.add_axes((0.25, 0.55 / height, 0.5, 0.14 / height))
        bar = figure.colorbar(mesh, cax=legend, orientation="horizontal", extend="both")
        bar.set_ticks([-1, -0.5, 0, 0.5, 1, 1.5, 2])
        bar.ax.tick_params(labelsize=8.5)
        bar.set_label(
            "what is left of the unclipped gradient, w / r:  1 untouched,  0 (white) cut off,  below 0 (hatched) "
            "turned back",
            fontsize=9.5,
        )
        save(figure, paths)


def draw_weights(axes: Axes, rule: Rule, sign: float) -> ScalarMappable:
    """One panel: w / r over p and r, both logarithmic; what no distribution can reach is grey."""
    values = weights(rule, sign)
    mesh = axes.pcolormesh(
        PROBABILITIES, RATIOS, values, cmap=COLOURS, norm=Normalize(-1, 2), shading="nearest", rasterized=True
    )
    if (values < 0).any():
        axes.contourf(PROBABILITIES, RATIOS, values, levels=[-1e9, 0], colors="none", hatches=["////"])
    axes.fill_between(PROBABILITIES, 1 / PROBABILITIES, 10, where=1 / PROBABILITIES < 10, color=GRID, linewidth=0)
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(0.1, 10))
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator([1e-2, 1e-1, 1]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".removeprefix("0")))
    label = {"facecolor": "#ffffff", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    axes.text(0.05, 0.93, "A > 0" if sign > 0 else "A < 0", transform=axes.transAxes, fontsize=8, va="top", bbox=label)
    return mesh


# ---- the table ----

FIRST, LAST = "<!-- written by python -m bench.plot_rules --table -->\n", "<!-- end -->\n"


def table() -> str:
    """The table of all rules, in Markdown, generated from their docstrings and published values."""
    lines = [
        "| rule | what it does | w of w A grad log pi | parameters | source | checked against |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in RULES.items():
        text = " ".join((rule.function.__doc__ or "").split())
        what, _, rest = text.partition(" w = ")
        weight, _, rest = rest.partition(" Source: ")
        source, _, checked = rest.partition(" Checked: ")
        parameters = ", ".join(
            f"`{k}` {v:g}" if isinstance(v, float) else f"`{k}` {v or 'none'}" for k, v in rule.defaults.items()
        )
        cells = (f"`{name}`", what, weight, parameters or "none", source, checked)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """A page of Markdown with the table of today between its two marks."""
    before, _, rest = page.partition(FIRST)
    return before + FIRST + table() + LAST + rest.partition(LAST)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="files to write; with --table a page")
    parser.add_argument("--rules", metavar="RULE,...", help="all, or names and FILE.py:FUNCTION")
    parser.add_argument("--table", action="store_true", help="write the table of rules into the pages")
    args = parser.parse_args()
    if args.table:
        for path in args.paths:
            path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    elif args.rules:
        draw_rules(list(RULES) if args.rules == "all" else args.rules.split(","), args.paths)
    else:
        draw_bounds(args.paths)


if __name__ == "__main__":
    main()
