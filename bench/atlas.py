"""Which clipping rule when? Every run of docs/atlas.md, its tables and its figures, from nothing.

    python -m bench.atlas                                   # everything, about an hour on two cores; resumable
    python -m bench.atlas --part rare --seeds 0,1           # one part, fewer seeds
    python -m bench.atlas --report --figures docs/figures   # tables and figures of what is there, no training
    python -m bench.atlas --replay 2                        # two runs drawn by chance, again: the same last digit

Runs, folders and resuming are those of bench/study.py: a run is (setting, rule, seed). A setting has one part that
ranks all rules over ten seeds, and two sweeps over fewer: the learning rate, and each rule's own radius or interval.

Left out: choosing what to show after seeing it. Plan and deciding figures stand in docs/atlas.md since before the runs.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from bench.study import (
    CPU,
    RULE_COLOURS,
    SMALL,
    Job,
    Keys,
    Part,
    Setting,
    Study,
    jobs_of,
    load_groups,
    published,
    run_all,
    verdict,
)
from eval.compare import (
    Column,
    Group,
    area_under,
    best,
    end_of,
    holm,
    last,
    paired_interval,
    paired_p,
    text_table,
    values_of,
)
from eval.plots import Curve, Panel, draw_dots, draw_points, draw_sweeps, spread
from eval.records import Record, is_of_clock, load_record

# ---- what is run ----

RULES: dict[str, Keys] = {
    "GRPO": published("grpo"),
    "Clip-Higher": published("clip_higher"),
    "Band KL": published("band"),
    "Band TV": published("band_tv"),
    "Band chi2": published("band_chi2"),
    "DCPO": published("dcpo"),
    "fixed .8-3": published("grpo") | {"clip_high": "2.0"},
    "no clip": published("noclip"),
    "DPPO TV": published("dppo_tv"),
    "SAPO": published("sapo"),
    "GSPO": published("gspo"),
    "CISPO": published("cispo"),
    "GPPO": published("gppo"),
    "Band early": {
        "rule": f"{Path(__file__).with_name('radii.py')}:early"
    },  # ours: the best of those in bench/radii.py
}
SWEPT = ("GRPO", "Clip-Higher", "Band KL", "DCPO", "fixed .8-3", "no clip", "DPPO TV", "SAPO")

# One number each: what a family of rules has to be tuned by. The published value is the rule above.
FAMILIES: dict[str, dict[float, str]] = {}
VARIANTS = dict(RULES)


def family(title: str, known: dict[float, str], values: Sequence[float], keys: Callable[[float], Keys]) -> None:
    FAMILIES[title] = {value: known.get(value, f"{title} {value:g}") for value in values}
    VARIANTS.update({FAMILIES[title][value]: keys(value) for value in values if value not in known})


family(
    "Band KL delta",
    {0.05: "Band KL"},
    (0.002, 0.01, 0.05, 0.2, 0.8),
    lambda delta: published("band") | {"delta": f"{delta:g}"},
)
family(
    "eps of both bounds",
    {0.2: "GRPO"},
    (0.05, 0.1, 0.2, 0.4, 0.8),
    lambda eps: {"clip": "fixed", "clip_low": f"{eps:g}", "clip_high": f"{eps:g}"},
)
family(
    "eps of the upper bound",
    {0.2: "GRPO", 2.0: "fixed .8-3"},
    (0.1, 0.2, 0.5, 2.0, 8.0),
    lambda eps: {"clip": "fixed", "clip_low": "0.2", "clip_high": f"{eps:g}"},
)
family(
    "DPPO TV delta",
    {0.2: "DPPO TV"},
    (0.02, 0.06, 0.2, 0.5),
    lambda delta: published("dppo_tv") | {"rule_parameters": json.dumps({"delta_low": delta, "delta_high": delta})},
)


NOISY_GRADER = f"{Path(__file__).with_name('noisy_grader.py')}:noisy"
QUICK = SMALL | {"max_prompt_tokens": 6, "max_response_tokens": 10, "samples_per_prompt": 8, "lr": 6e-4}
QUICK |= {"updates_per_step": 16, "epochs_per_step": 4, "eval_samples": 8, "save_every": 0}
RARE = QUICK | {"prompts_per_step": 128, "max_steps": 5, "eval_every": 5}
NOISY = QUICK | {"prompts_per_step": 64, "max_steps": 6, "eval_every": 6, "reward": NOISY_GRADER}
RATES = (6e-5, 2e-4, 6e-4, 2e-3, 6e-3)
# Title, the setting at its own learning rate, all rates of the sweep.
SETTINGS: dict[str, tuple[str, Setting, tuple[float, ...]]] = {
    "rare": ("a rare good strategy", Setting("toy_quick", 0, RARE), RATES),
    "noisy": ("a grader that errs", Setting("toy_words", 0, NOISY), RATES),
    "stale": (
        "rare, stale answers",
        Setting("toy_quick", 0, RARE | {"lag": 2, "max_steps": 8, "eval_every": 8}),
        RATES,
    ),
}


def at(name: str, lr: float) -> str:
    return f"{name}_lr{lr:g}"


def atlas() -> Study:
    """For each setting three parts: NAME (all rules), NAME_lrX (a learning rate), NAME_radius (own numbers)."""
    settings, parts = {}, {}
    for name, (title, setting, rates) in SETTINGS.items():
        home = at(name, setting.keys["lr"])
        settings |= {at(name, lr): replace(setting, keys=setting.keys | {"lr": lr}) for lr in rates}
        parts[name] = Part(title, home, tuple(RULES))
        parts |= {
            f"{name}_lr{lr:g}": Part(title, at(name, lr), SWEPT, (0, 1, 2)) for lr in rates if at(name, lr) != home
        }
        own = tuple(dict.fromkeys(label for values in FAMILIES.values() for label in values.values()))
        parts[f"{name}_radius"] = Part(title, home, own, (0, 1, 2))
    return replace(CPU, variants=VARIANTS, settings=settings, parts=parts, seeds=tuple(range(10)))


# ---- what is shown ----


def accuracy(setting: Setting) -> Column:
    """The deciding figure of every setting: answers right at the last evaluation, on problems held out."""
    return Column("right at the end, %", f"eval/{setting.task}_eval/mean@{setting.keys['eval_samples']}", last, 100.0)


def scores(group: Group, setting: Setting) -> dict[int, float]:
    """seed -> accuracy at the end, 0 for a run that did not get there."""
    key, end = accuracy(setting).metric, setting.keys["max_steps"]
    return {run.config["seed"]: 100 * float(np.nan_to_num(run.value(key, end))) for run in group.runs}


Scores = Mapping[str, Mapping[str, Mapping[int, float]]]  # setting -> rule -> seed -> accuracy at the end, %
Ps = Mapping[tuple[str, str, str], float]  # (setting, rule, rule) -> adjusted p


def adjusted(by_setting: Scores) -> dict[tuple[str, str, str], float]:
    """p of every pair of rules in every setting, seeds paired, after Holm's correction over all of them together."""
    pairs, ps = [], []
    for name, by_rule in by_setting.items():
        for a, b in combinations(by_rule, 2):
            seeds = sorted(by_rule[a].keys() & by_rule[b].keys())
            if len(seeds) > 1:
                pairs.append((name, a, b))
                ps.append(paired_p([by_rule[b][seed] - by_rule[a][seed] for seed in seeds]))
    return dict(zip(pairs, holm(ps), strict=True))


def cliques(items: Sequence[str], joined: Callable[[str, str], bool]) -> list[tuple[str, ...]]:
    """Every largest set of items that are all joined to each other (Bron and Kerbosch), in the order of the items."""
    found: list[tuple[str, ...]] = []

    def grow(chosen: tuple[str, ...], open_: list[str], done: list[str]) -> None:
        if not open_ and not done:
            found.append(tuple(item for item in items if item in chosen))
        for item in list(open_):
            near = [[other for other in others if other != item and joined(item, other)] for others in (open_, done)]
            grow((*chosen, item), *near)
            open_.remove(item)
            done.append(item)

    grow((), list(items), [])
    return sorted(found, key=lambda clique: [items.index(item) for item in clique])


OTHERS = (
    Column("reward AUC", "reward/mean", area_under, 1.0),
    Column("entropy end, nats", "train/entropy", end_of, 1.0),
    Column("clipped, share", "clip/fraction", lambda series: float(series[1].mean()), 1.0),
)
GRADIENT = Column("largest gradient", "optim/grad_norm", best, 1.0)


def letters(rules: Sequence[str], apart: Callable[[str, str], bool]) -> dict[str, str]:
    """Rules that share a letter are not told apart. rules: best first."""
    sets = cliques(rules, lambda a, b: not apart(a, b))
    return {rule: "".join(chr(ord("a") + i) for i, members in enumerate(sets) if rule in members) for rule in rules}


def ranking(name: str, study: Study, groups: Sequence[Group], ps: Ps) -> str:
    """A table of all rules, best first, and what it tells apart."""
    setting = study.settings[study.parts[name].setting]
    of_rule = {group.label: scores(group, setting) for group in groups}
    rules = sorted(of_rule, key=lambda rule: -np.mean(list(of_rule[rule].values())))

    def apart(a: str, b: str) -> bool:
        return min(ps.get((name, a, b), 1.0), ps.get((name, b, a), 1.0)) < 0.05

    letter, by_label = letters(rules, apart), {group.label: group for group in groups}
    rows = []
    for rule in rules:
        values, group = list(of_rule[rule].values()), by_label[rule]
        low, high = paired_interval(values, 0.95) if len(values) > 1 else (np.nan, np.nan)
        others = [np.mean(values_of(group, column)) for column in OTHERS]
        worst = max(values_of(group, GRADIENT), default=np.nan)
        rows.append(
            [rule, str(len(values)), f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]", letter[rule]]
            + [f"{value:.3f}" for value in others]
            + [f"{worst:.1f}"]
        )
    header = ["rule", "seeds", "right at the end, %", "group", *(c.heading for c in OTHERS), GRADIENT.heading]
    told = max(cliques(rules, apart), key=len)
    text = text_table(header, rows) + f"\n\nTold apart from each other: {', '.join(told) if len(told) > 1 else 'none'}."
    matrix = np.array([[of_rule[rule].get(seed, np.nan) for seed in study.seeds] for rule in rules])
    if np.isfinite(matrix).all() and len(rules) > 1 and matrix.shape[1] > 1:
        between, within = matrix.mean(axis=1).std(ddof=1), np.sqrt(matrix.var(axis=1, ddof=1).mean())
        text += f" Standard deviation between rules {between:.1f} points, between seeds of a rule {within:.1f}."
    return text


def against(base: str, values: Scores, ps: Ps) -> str:
    """A table: the base minus each other rule in every setting, points, with the pairs' interval and the adjusted p."""
    rows = []
    for rule in (rule for rule in RULES if rule != base):
        cells = []
        for name, by_rule in values.items():
            seeds = by_rule.get(base, {}).keys() & by_rule.get(rule, {}).keys()
            pairs = [by_rule[base][seed] - by_rule[rule][seed] for seed in sorted(seeds)]
            p = min(ps.get((name, base, rule), 1.0), ps.get((name, rule, base), 1.0))
            cells.append(f"{verdict(pairs).rstrip('*')}, p {p:.1g}" if len(pairs) > 1 else "-")
        rows.append([rule, *cells])
    return text_table([f"{base} minus", *values], rows)


def main_parts(study: Study) -> list[str]:
    return [name for name in study.parts if name in SETTINGS]


def compromise(values: Scores) -> str:
    """Points that each rule stays below the best rule of each setting, and the worst of them; smallest worst first."""
    mean = {name: {rule: float(np.mean([*of.values()])) for rule, of in values[name].items()} for name in values}
    rows = []
    for rule in RULES:
        losses = [max(of_rule.values()) - of_rule[rule] for of_rule in mean.values() if rule in of_rule]
        rows += [(max(losses), [rule, *(f"{loss:.1f}" for loss in losses), f"{max(losses):.1f}"])] if losses else []
    known = [name for name in mean if mean[name]]
    return text_table(["points below the best", *known, "worst"], [row for _, row in sorted(rows)])


def failures(study: Study, seeds: Sequence[int], out: Path) -> str:
    """Runs that crashed, and runs that end with less than half of what the start model gets right."""
    rows = []
    for part in study.parts.values():
        setting = study.settings[part.setting]
        for group in load_groups(study, part, seeds, out)[0]:
            key = accuracy(setting).metric
            start = {run.config["seed"]: 100 * run.value(key, 0) for run in group.runs}
            lost = [seed for seed, value in scores(group, setting).items() if value < start[seed] / 2]
            crashed = [run.config["seed"] for run in group.runs if run.last_step < setting.keys["max_steps"]]
            if lost or crashed:
                worst = max(values_of(group, GRADIENT), default=np.nan)
                numbers = [f"{len(lost)} of {len(group.runs)}", str(len(crashed)), f"{worst:.1f}"]
                rows.append([part.setting, group.label, *numbers])
    unique = {tuple(row[:2]): row for row in rows}
    return text_table(
        ["setting", "rule", "ends below half of its start", "crashed", "largest gradient"], list(unique.values())
    )


def curve_of(study: Study, label: str, cells: Mapping[float, tuple[str, str]], out: Path) -> Curve | None:
    """Accuracy at the end over a quantity. cells: its value -> (setting, rule); a line for each seed of the sweeps."""
    found: dict[int, dict[float, float]] = {}
    for x, (setting_name, rule) in sorted(cells.items()):
        for group in load_groups(study, Part("", setting_name, (rule,)), SWEEP_SEEDS, out)[0]:
            for seed, value in scores(group, study.settings[setting_name]).items():
                found.setdefault(seed, {})[x] = value
    lines = tuple((np.array(list(line)), np.array(list(line.values()))) for line in found.values())
    return Curve(label, lines, None) if lines else None


def panel(title: str, unit: str, curves: Sequence[Curve | None]) -> Panel:
    return Panel(title, unit, tuple(curve for curve in curves if curve))


def rate_panels(study: Study, out: Path) -> list[Panel]:
    """For each setting, over the learning rate: a line for each rule."""
    return [
        panel(title, "", [curve_of(study, rule, {lr: (at(name, lr), rule) for lr in rates}, out) for rule in SWEPT])
        for name, (title, _, rates) in SETTINGS.items()
    ]


def radius_panels(study: Study, out: Path) -> list[Panel]:
    """For each family of rules, over its one number: a line for each setting."""
    return [
        panel(
            family_name,
            "its number",
            [
                curve_of(study, name, {x: (study.parts[name].setting, rule) for x, rule in values.items()}, out)
                for name in SETTINGS
            ],
        )
        for family_name, values in FAMILIES.items()
    ]


def means(curve: Curve) -> dict[float, float]:
    x, mean, _, _ = spread(curve)
    return dict(zip(x.tolist(), mean.tolist(), strict=True))


def rate_table(panels: Sequence[Panel]) -> str:
    """Mean accuracy at each rate, and the plateau: how many of the rates are within POINTS of the setting's best."""
    tables = []
    for each in panels:
        by_rule = {curve.label: means(curve) for curve in each.curves}
        rates = sorted({lr for of_rate in by_rule.values() for lr in of_rate})
        top = max(value for of_rate in by_rule.values() for value in of_rate.values())
        rows = []
        for rule, of_rate in by_rule.items():
            near = sum(value >= top - POINTS for value in of_rate.values())
            rows.append([rule, *(f"{of_rate[lr]:.0f}" if lr in of_rate else "-" for lr in rates), str(near)])
        header = ["rule", *(f"{lr:g}" for lr in rates), f"rates within {POINTS:g} points of the best"]
        tables.append(f"{each.title}\n\n{text_table(header, rows)}")
    return "\n\n".join(tables)


def radius_table(panels: Sequence[Panel]) -> str:
    """Accuracy at each value, and how far below the setting's best one value for all settings stays."""
    best_of: dict[str, float] = {}
    for each in panels:
        for curve in each.curves:
            best_of[curve.label] = max(best_of.get(curve.label, 0.0), *means(curve).values())
    tables = []
    for each in panels:
        by_setting = {curve.label: means(curve) for curve in each.curves}
        values = sorted({x for of_x in by_setting.values() for x in of_x})
        rows = []
        for x in values:
            costs = [best_of[name] - of_x[x] for name, of_x in by_setting.items() if x in of_x]
            cells = [f"{of_x[x]:.0f}" if x in of_x else "-" for of_x in by_setting.values()]
            rows.append([f"{x:g}", *cells, f"{max(costs):.0f}", f"{np.mean(costs):.0f}"])
        tables.append(text_table([each.title, *by_setting, "worst loss", "mean loss"], rows))
    return "\n\n".join(tables)


POINTS = 5.0  # of accuracy: a rate is on the plateau when it is no further below the best of the setting
SWEEP_SEEDS = (0, 1, 2)


def report(study: Study, seeds: Sequence[int], out: Path, figures: Path) -> str:
    """Tables as Markdown; the figures atlas_* into `figures`."""
    by_part = {name: load_groups(study, study.parts[name], seeds, out) for name in SETTINGS}
    of_setting = {name: study.settings[study.parts[name].setting] for name in SETTINGS}
    values = {name: {g.label: scores(g, of_setting[name]) for g in groups} for name, (groups, _) in by_part.items()}
    ps = adjusted(values)
    sections = []
    for name, (title, *_) in SETTINGS.items():
        groups, notes = by_part[name]
        sections.append(f"### {name}: {title}")
        if groups:
            sections.append(ranking(name, study, groups, ps))
        sections += ["\n".join(f"- {note}" for note in notes)] if notes else []
    sections += ["### Band KL against each", against("Band KL", values, ps)]
    sections += ["### All settings together", compromise(values)]
    known = {name: groups for name, (groups, _) in by_part.items() if groups}
    titles = {name: SETTINGS[name][0] for name in known}
    caption = f"right at the end, % of answers; {len(seeds)} seeds a rule"
    dots = [(titles[name], {r: [*values[name].get(r, {}).values()] for r in RULES}) for name in known]
    draw_dots(dots, RULE_COLOURS, figures / "atlas_rules", caption + "; dot: a seed; bar: their mean")
    points = [
        (titles[name], {g.label: [end_point(run, of_setting[name]) for run in g.runs] for g in groups})
        for name, groups in known.items()
    ]
    axes = ("entropy at the end, nats", "right at the end, %")
    draw_points(
        points, RULE_COLOURS, figures / "atlas_entropy", "a point: a run; a label: the mean of a rule's runs", axes
    )
    rates, radii = rate_panels(study, out), radius_panels(study, out)
    if rates := [each for each in rates if each.curves]:
        shading = f"mean of {len(SWEEP_SEEDS)} seeds, lowest to highest shaded"
        draw_sweeps(rates, RULE_COLOURS, figures / "atlas_rates", caption + "; " + shading, "learning rate", True)
        sections += ["### Learning rates", rate_table(rates)]
    if radii := [each for each in radii if each.curves]:
        colours = dict(zip(SETTINGS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), strict=False))
        draw_sweeps(radii, colours, figures / "atlas_radius", shading, "right at the end, %", False)
        sections += ["### One number for all settings", radius_table(radii)]
    sections += ["### Failures", failures(study, seeds, out)]
    return "\n\n".join(sections) + "\n"


def end_point(run: Record, setting: Setting) -> tuple[float, float]:
    """(entropy, accuracy) of a run at its end."""
    return end_of(run.series("train/entropy")), 100 * run.value(accuracy(setting).metric, run.last_step)


# ---- the same again ----


def replay(study: Study, jobs: Sequence[Job], out: Path, count: int) -> int:
    """Run finished jobs drawn by chance once more, beside the others; how many differ in anything but times."""
    done = [job for job in jobs if (job.folder / "done.json").exists()]
    again = []
    for job in random.sample(done, count):
        folder = out / "replay" / job.folder.parent.name / job.folder.name
        shutil.rmtree(folder, ignore_errors=True)
        again.append(replace(job, folder=folder, keys=job.keys | {"output_dir": str(folder.parent)}))
    failed = run_all(study, again, 1)
    for job in again:
        runs = (load_record(folder) for folder in (out / job.folder.parent.name / job.folder.name, job.folder))
        differ = differing(*runs)
        failed += bool(differ)
        verdict = f"differs in {', '.join(differ)}" if differ else "the same to the last digit"
        print(f"{job.folder.parent.name}/{job.folder.name}: {verdict}")
    return failed


def differing(first: Record, second: Record) -> list[str]:
    """Metrics that are not the same number at every step, clocks and memory aside."""
    keys = [key for key in dict.fromkeys(first.keys + second.keys) if not is_of_clock(key)]
    steps = sorted(first.rows.keys() | second.rows.keys())
    return [key for key in keys if any(repr(first.value(key, at)) != repr(second.value(key, at)) for at in steps)]


def main(argv: Sequence[str]) -> int:
    study = atlas()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="", help=f"of {', '.join(study.parts)}; all")
    parser.add_argument("--seeds", default="", help="comma-separated; default 0 to 9, in the sweeps 0 to 2")
    parser.add_argument("--out", type=Path, default=Path("runs/atlas"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="tables and figures of the runs there are, no training")
    parser.add_argument("--figures", type=Path, default=None, help="folder of the figures (default OUT/figures)")
    parser.add_argument("--replay", type=int, default=0, metavar="N", help="N finished runs again, compared; no more")
    args = parser.parse_args(argv)
    parts = args.part.split(",") if args.part else list(study.parts)
    if unknown := [part for part in parts if part not in study.parts]:
        parser.error(f"--part: {', '.join(unknown)} is not one of {', '.join(study.parts)}")
    seeds = tuple(int(seed) for seed in args.seeds.split(",")) if args.seeds else study.seeds
    out, failed = args.out.resolve(), 0
    ranked = [part for part in parts if part in SETTINGS]
    jobs = [  # seed after seed, so that what is there at any time is whole; the rankings before the sweeps
        job
        for some in (ranked, [part for part in parts if part not in ranked])
        for job in sorted(jobs_of(study, some, seeds, out), key=lambda job: job.keys["seed"])
    ]
    jobs = list({job.folder: job for job in jobs}.values())
    try:
        if args.replay:
            return 1 if replay(study, jobs, out, args.replay) else 0
        if not args.report:
            failed = run_all(study, jobs, args.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:
        parser.error(str(error))
    text = report(study, seeds, out, args.figures or out / "figures")
    (out / "tables.md").write_text(text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
