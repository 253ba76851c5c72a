"""Figures of clip bounds and of gradient weights of rules, and the list of docs/rules.md.

python -m bench.plot_rules docs/figures/bounds.png                          # clip bounds by probability
python -m bench.plot_rules --rules all docs/figures/rules.png               # gradient weight of every rule
python -m bench.plot_rules --rules band,my_rule.py:my_rule mine.png         # gradient weight of chosen rules
python -m bench.plot_rules --list docs/rules.md                             # rewrite the list of the page
"""

import argparse
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

import bandpo.rules  # noqa: F401  (fills RULES)
from bandpo.rule import RULES, Rule, load_rule

# Okabe and Ito's palette, safe for colour blindness. Line styles also distinguish the curves in grey.
INK, MUTED, GRID = "#222222", "#6f6f6f", "#e4e4e4"
# Comparable radii: for small changes, chi2 is twice KL, and TV is at most sqrt(KL / 2). No ratio cap.
METHODS: list[tuple[str, str, dict[str, Any], tuple[str, Any, float]]] = [
    ("Band, KL  δ = 0.05", "band", {"delta": 0.05, "ratio_cap": None}, ("#0072B2", "-", 2.4)),
    ("Band, TV  δ = 0.158", "band", {"delta": 0.158, "divergence": "tv", "ratio_cap": None}, ("#009E73", "--", 1.8)),
    ("Band, χ²  δ = 0.10", "band", {"delta": 0.1, "divergence": "chi2", "ratio_cap": None}, ("#CC79A7", "-.", 1.8)),
    ("DCPO  0.16 / 0.20", "dcpo", {"ratio_cap": None}, ("#E69F00", ":", 2.0)),
    ("fixed  0.2 / 0.2", "fixed", {}, (INK, "-", 1.4)),
    ("Clip-Higher  0.2 / 0.28", "fixed", {"high": 0.28}, (MUTED, (0, (6, 2)), 1.4)),
]
SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "hatch.linewidth": 0.4,
}
OPEN = {"axes.spines.top": False, "axes.spines.right": False}


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def apply(rule: Rule, p: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Apply a rule to single tokens, each the only one of its response, with entropy 0."""
    old = p.log()
    return rule(
        logprobs=old + ratio.log(),
        old_logprobs=old,
        advantages=advantages,
        entropy=torch.zeros_like(p),
        sequence_ids=torch.arange(len(p)),
    )


# ---- clip bounds ----


def bounds(name: str, parameters: dict[str, Any], p: Tensor) -> tuple[Tensor, Tensor]:
    """Return (lower, upper) at probabilities p, with upper at most 1/p."""
    one = torch.ones_like(p)
    result = apply(load_rule(name, parameters), p, one, one)
    assert isinstance(result, tuple), f"{name} gives a weight"
    return result[0], torch.minimum(result[1], 1 / p)


def draw_bounds(path: Path) -> None:
    """Draw two panels: ratio bounds, and the allowed change of probability. Grey: no distribution exists."""
    p = torch.cat([torch.logspace(-4, -1, 600), torch.linspace(0.1, 0.9999, 900)]).double()
    with plt.rc_context(SETTINGS | OPEN):  # type: ignore[arg-type]
        figure, (ratio, change) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
        for label, name, parameters, (colour, style, width) in METHODS:
            look = {"color": colour, "linestyle": style, "linewidth": width}
            for bound in bounds(name, parameters, p):
                ratio.plot(p, bound.where(bound > 1e-9, torch.nan), **look)
                change.plot(p, p * (bound - 1), **look)
            ratio.plot([], [], label=label, **look)
        ratio.fill_between(p, 1 / p, 1e4, color=GRID, linewidth=0)
        ratio.text(0.37, 21, "p r > 1:\nno such\ndistribution", color=MUTED, fontsize=8.5, ha="center", va="center")
        ratio.axhline(10, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
        ratio.text(1.1e-4, 10.6, "ratio cap 10", color=MUTED, fontsize=8.5, va="bottom")
        ratio.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(0.05, 40))
        plain_numbers(ratio, [1e-4, 1e-3, 1e-2, 1e-1, 1], [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40])
        change.fill_between(p, 1 - p, 1, color=GRID, linewidth=0)
        change.fill_between(p, -p, -1, color=GRID, linewidth=0)
        change.axhline(0, color=MUTED, linewidth=0.8)
        change.set(xlim=(0, 1), ylim=(-0.34, 0.32))
        titles = ("Clip bounds of the ratio new / old", "Allowed change of probability: p (bound − 1)")
        for axes, title in zip((ratio, change), titles, strict=True):
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.set_xlabel("probability p of the token under the old policy")
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=2.6)
        save(figure, path)


def plain_numbers(axes: Axes, x: list[float], y: list[float]) -> None:
    """Set ticks of logarithmic axes at these places, without exponents."""
    for axis, places in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(FixedLocator(places))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))


# ---- gradient weights ----

# Rules whose weight depends on other tokens of the micro-batch or the response, and is no function of (p, r).
NOT_DRAWN = {"bapo", "acpo", "m2po", "gspo", "clip_cov", "kl_cov"}
COLOURS = LinearSegmentedColormap.from_list(
    "weights",
    [(0, "#a4133c"), (1 / 3 - 1e-6, "#f7c9d4"), (1 / 3, "#ffffff"), (2 / 3, "#5b9bd0"), (1, "#123a63")],
)
RATIOS = torch.logspace(-1, 1, 161, dtype=torch.float64)
PROBABILITIES = torch.logspace(-3, -1e-3, 121, dtype=torch.float64)


def relative_weights(rule: Rule, sign: float) -> Tensor:
    """Compute w / r at A = sign, of shape (len(RATIOS), len(PROBABILITIES))."""
    r, p = (x.flatten() for x in torch.meshgrid(RATIOS, PROBABILITIES, indexing="ij"))
    r = torch.minimum(r, 0.9999 / p)  # larger ratios do not exist and are drawn grey
    result = apply(rule, p, r, torch.full_like(p, sign))
    if isinstance(result, tuple):
        w = torch.where((r > result[1]) if sign > 0 else (r < result[0]), 0.0, r)
    else:
        w = result
    return (w / r).view(len(RATIOS), len(PROBABILITIES))


def draw_rules(names: list[str], path: Path) -> None:
    """Draw a pair of panels per rule: A > 0 and A < 0."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    width, height = 3.1 * columns + 0.7, 1.95 * rows + 1.15  # inches
    with plt.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = plt.figure(figsize=(width, height))
        mesh = ScalarMappable()
        grid = figure.add_gridspec(
            rows, columns, left=0.6 / width, right=1 - 0.1 / width, bottom=1.35 / height, top=1 - 0.3 / height,
            wspace=0.16, hspace=0.28,
        )  # fmt: skip
        for k, name in enumerate(names):
            cell = grid[divmod(k, columns)].subgridspec(1, 2, wspace=0.06)
            left = figure.add_subplot(cell[0])
            rule, last = load_rule(name, {}), k + columns >= len(names)
            for axes, sign in ((left, 1.0), (figure.add_subplot(cell[1], sharey=left), -1.0)):
                mesh = draw_weights(axes, rule, sign)
                axes.tick_params(labelbottom=last, labelleft=axes is left, labelsize=7.5)
            left.set_title(name, fontsize=10, fontweight="bold", loc="left", pad=3)
            if k % columns == 0:
                left.set_ylabel("ratio r", fontsize=8.5, labelpad=1)
            if last:
                left.set_xlabel("old probability p", fontsize=8.5, loc="left", labelpad=2)
        bar = figure.colorbar(
            mesh,
            cax=figure.add_axes((0.25, 0.55 / height, 0.5, 0.14 / height)),
            orientation="horizontal",
            extend="both",
        )
        bar.set_ticks([-1, -0.5, 0, 0.5, 1, 1.5, 2])
        bar.ax.tick_params(labelsize=8.5)
        bar.set_label(
            "w / r:  1 (blue) as without a rule,  0 (white) clipped,  below 0 (hatched) reversed", fontsize=9.5
        )
        save(figure, path)


def draw_weights(axes: Axes, rule: Rule, sign: float) -> ScalarMappable:
    """Draw one panel: w / r over p and r, both logarithmic. Grey: no distribution exists."""
    values = relative_weights(rule, sign)
    mesh = axes.pcolormesh(
        PROBABILITIES, RATIOS, values, cmap=COLOURS, norm=Normalize(-1, 2), shading="nearest", rasterized=True
    )
    if (values < 0).any():
        axes.contourf(PROBABILITIES, RATIOS, values, levels=[-1e9, 0], colors="none", hatches=["////"])
    axes.fill_between(PROBABILITIES, 1 / PROBABILITIES, 10, where=1 / PROBABILITIES < 10, color=GRID, linewidth=0)
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(0.1, 10))
    plain_numbers(axes, [1e-2, 1e-1, 1], [0.1, 0.2, 0.5, 1, 2, 5, 10])
    label = {"facecolor": "#ffffff", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    axes.text(0.05, 0.93, "A > 0" if sign > 0 else "A < 0", transform=axes.transAxes, fontsize=8, va="top", bbox=label)
    return mesh


# ---- list ----

FIRST, LAST = "<!-- written by python -m bench.plot_rules --list -->\n", "<!-- end -->\n"


def rule_list() -> str:
    """Format a Markdown list of all rules from their docstrings and published values."""
    lines = []
    for name, rule in RULES.items():
        effect, _, rest = " ".join((rule.function.__doc__ or "").split()).partition(" w = ")
        w, _, source = rest.partition(" Checked: ")[0].partition(" Source: ")
        values = {k: f"{v:g}" if isinstance(v, float) else "null" if v is None else v for k, v in rule.defaults.items()}
        parameters = ", ".join(f"{k}={v}" for k, v in values.items())
        title = f"**`{name}`** `{parameters}`" if values else f"**`{name}`**"
        text = f"- {title}: {effect} w = {w}. [{source.replace('arXiv ', '')}]"
        lines += wrap(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def with_list(page: str) -> str:
    """Replace the list between the two marks of a Markdown page by the current one."""
    before, _, rest = page.partition(FIRST)
    return before + FIRST + rule_list() + LAST + rest.partition(LAST)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="PNG file to write; with --list the page")
    parser.add_argument("--rules", metavar="RULE,...", help="all, or names and FILE.py:FUNCTION")
    parser.add_argument("--list", action="store_true", help="write the list of rules into the page")
    args = parser.parse_args()
    if args.list:
        args.path.write_text(with_list(args.path.read_text(encoding="utf-8")), encoding="utf-8")
    elif args.rules:
        draw_rules(
            [n for n in RULES if n not in NOT_DRAWN] if args.rules == "all" else args.rules.split(","), args.path
        )
    else:
        draw_bounds(args.path)


if __name__ == "__main__":
    main()
