"""Which clipping rule when? Every run of docs/atlas.md, its tables and its figures, from nothing.

    python -m bench.atlas                                   # about an hour on two cores; resumable
    python -m bench.atlas --more                            # older answers and longer ones too
    python -m bench.atlas --part rare --seeds 0,1           # one part, fewer seeds
    python -m bench.atlas --report --figures docs/figures   # tables and figures of what is there, no training
    python -m bench.atlas --replay 2                        # two runs drawn by chance, again: the same last digit

Runs, folders and resuming are those of bench/study.py: a run is (setting, rule, seed). A setting has one part that
ranks all rules over ten seeds, and two sweeps over fewer: the learning rate, and each rule's own radius or interval.
What the sweep says is a rule's best rate, ten other seeds then rank all rules at.

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
SHOWN = ("GRPO", "Clip-Higher", "Band KL", "DCPO", "fixed .8-3", "no clip", "DPPO TV", "SAPO")  # in sweeps' figures

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
LONG = QUICK | {"max_prompt_tokens": 12, "max_response_tokens": 18, "prompts_per_step": 96, "lr": 3e-4}
LONG |= {"max_steps": 8, "eval_every": 8}
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
    "long": ("a rare strategy of fourteen tokens", Setting("toy_long", 0, LONG), (1e-4, 3e-4, 1e-3)),
}
# The second plan: each rule at its own best rate, on seeds that had no part in choosing it.
BEST = {"rare_best": "rare", "stale_best": "stale"}  # part -> its setting
OLD = "age4"  # of the parts below, the one that ranks all rules
PLANS = (("rare", "noisy", "stale"), (*BEST, OLD, "long"))  # each corrected over all comparisons of its own
SWEEP_SEEDS, SEEDS, BEST_SEEDS = (0, 1, 2), tuple(range(10)), tuple(range(10, 20))

AGES = (0, 1, 2, 4, 8)
AGED_BAND = "Band KL by age"  # delta / (1 + age)
AGED = ("GRPO", "Band KL", AGED_BAND, "DCPO", "fixed .8-3", "no clip", "DPPO TV", "SAPO")
VARIANTS[AGED_BAND] = published("band")
LARGE_PARTS = ("long", "age")  # parts whose names begin so are run with --more alone


def at(name: str, lr: float) -> str:
    return f"{name}_lr{lr:g}"


def atlas(rates: Mapping[str, Mapping[str, float]] | None = None) -> Study:
    """The parts: NAME (all rules), NAME_lrX (a learning rate), NAME_radius (own numbers), ageN (a lag).

    rates: setting -> rule -> its best rate; gives the parts NAME_best.
    """
    settings, parts, own = {}, {}, {}
    for name, (title, setting, sweep) in SETTINGS.items():
        home = at(name, setting.keys["lr"])
        settings |= {at(name, lr): replace(setting, keys=setting.keys | {"lr": lr}) for lr in sweep}
        parts[name] = Part(title, home, tuple(RULES), SEEDS)
        parts |= {at(name, lr): Part(title, at(name, lr), tuple(RULES), SWEEP_SEEDS) for lr in sweep}
        numbers = tuple(dict.fromkeys(label for values in FAMILIES.values() for label in values.values()))
        parts[f"{name}_radius"] = Part(title, home, numbers, SWEEP_SEEDS)
    for age in AGES:
        keys = RARE | {"lr": 2e-4, "lag": age, "max_steps": 12, "eval_every": 12}
        settings[f"age{age}"] = Setting("toy_quick", 0, keys)
        title, ranked = f"a rare good strategy, answers {age} steps old", f"age{age}" == OLD
        rules, seeds = ((*RULES, AGED_BAND), SEEDS) if ranked else (AGED, SWEEP_SEEDS)
        parts[f"age{age}"] = Part(title, f"age{age}", rules, seeds)
        own[f"age{age}", AGED_BAND] = {"delta": str(0.05 / (1 + age))}
    for part, name in BEST.items():
        if rates and name in rates:
            settings[part] = SETTINGS[name][1]
            parts[part] = Part(f"{SETTINGS[name][0]}, own rate", part, tuple(RULES), BEST_SEEDS)
            own |= {(part, rule): {"lr": lr} for rule, lr in rates[name].items()}
    return replace(CPU, variants=VARIANTS, settings=settings, parts=parts, seeds=SEEDS + BEST_SEEDS, own=own)


def best_rates(study: Study, out: Path) -> dict[str, dict[str, float]]:
    """setting -> rule -> the rate with the highest mean accuracy in the sweep; settings with a whole sweep alone."""
    found = {}
    for name in BEST.values():
        curves = [curve for rule in RULES if (curve := rate_curve(study, name, rule, out))]
        runs = sum(len(rates) for curve in curves for rates, _ in curve.seeds)
        if runs == len(RULES) * len(SETTINGS[name][2]) * len(SWEEP_SEEDS):
            accuracy_at = {curve.label: means(curve) for curve in curves}  # rule -> rate -> accuracy
            found[name] = {rule: max(of_rate, key=of_rate.__getitem__) for rule, of_rate in accuracy_at.items()}
    return found


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
    matrix = np.array(
        [[of_rule[rule].get(seed, np.nan) for seed in study.parts[name].of(study.seeds)] for rule in rules]
    )
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
    rows: dict[tuple[str, str], list[str]] = {}  # of a run that several parts share: as in the first of them
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
                rows.setdefault((part.setting, group.label), [part.setting, group.label, *numbers])
    header = ["setting", "rule", "ends below half of its start", "crashed", "largest gradient"]
    return text_table(header, list(rows.values()))


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


def rate_curve(study: Study, name: str, rule: str, out: Path) -> Curve | None:
    return curve_of(study, rule, {lr: (at(name, lr), rule) for lr in SETTINGS[name][2]}, out)


def rate_panels(study: Study, out: Path) -> list[Panel]:
    """For each setting, over the learning rate: a line for each rule."""
    return [
        panel(title, "", [rate_curve(study, name, rule, out) for rule in RULES])
        for name, (title, *_) in SETTINGS.items()
    ]


def age_panel(study: Study, out: Path) -> Panel:
    """Over the age of the answers: a line for each rule."""
    curves = [curve_of(study, rule, {age: (f"age{age}", rule) for age in AGES}, out) for rule in AGED]
    return panel("right at the end, %", "", curves)


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


def sweep_table(panels: Sequence[Panel]) -> str:
    """Mean accuracy at each value, and the plateau: how many values are within POINTS of the setting's best."""
    tables = []
    for each in panels:
        by_rule = {curve.label: means(curve) for curve in each.curves}
        values = sorted({x for of_x in by_rule.values() for x in of_x})
        top = max(value for of_x in by_rule.values() for value in of_x.values())
        rows = []
        for rule, of_x in by_rule.items():
            near = sum(value >= top - POINTS for value in of_x.values())
            rows.append([rule, *(f"{of_x[x]:.0f}" if x in of_x else "-" for x in values), str(near)])
        header = ["rule", *(f"{x:g}" for x in values), f"of them within {POINTS:g} points of the best"]
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


def report(study: Study, seeds: Sequence[int], out: Path, figures: Path) -> str:
    """Tables as Markdown; the figures atlas_* into `figures`."""
    sections = []
    for number, names in enumerate(PLANS):
        names = [name for name in names if name in study.parts]
        sections += compared(study, names, seeds, out, figures, "_best" if number else "")
    rates, radii, ages = rate_panels(study, out), radius_panels(study, out), age_panel(study, out)
    shading = f"right at the end, % of answers; mean of {len(SWEEP_SEEDS)} seeds, lowest to highest shaded"
    if rates := [each for each in rates if each.curves]:
        shown = [replace(each, curves=tuple(c for c in each.curves if c.label in SHOWN)) for each in rates]
        draw_sweeps(shown, RULE_COLOURS, figures / "atlas_rates", shading, "learning rate", True)
        sections += ["### Learning rates", sweep_table(rates)]
    if radii := [each for each in radii if each.curves]:
        colours = dict(zip(SETTINGS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
        draw_sweeps(radii, colours, figures / "atlas_radius", shading, "right at the end, %", False)
        sections += ["### One number for all settings", radius_table(radii)]
    if ages.curves:
        draw_sweeps([ages], RULE_COLOURS, figures / "atlas_age", shading, "age of the answers, steps", True)
        sections += ["### Age of the answers", sweep_table([ages])]
    sections += ["### Failures", failures(study, seeds, out)]
    return "\n\n".join(sections) + "\n"


def compared(study: Study, names: Sequence[str], seeds: Sequence[int], out: Path, figures: Path, suffix: str):
    """Sections with the rankings of a plan's settings, its tests over all of them together, and its two figures."""
    by_part = {name: load_groups(study, study.parts[name], seeds, out) for name in names}
    known = {name: groups for name, (groups, _) in by_part.items() if groups}
    of_setting = {name: study.settings[study.parts[name].setting] for name in known}
    values = {name: {g.label: scores(g, of_setting[name]) for g in groups} for name, groups in known.items()}
    ps = adjusted(values)
    sections = []
    for name, (_, notes) in by_part.items():
        sections.append(f"### {name}: {study.parts[name].title}")
        sections += [ranking(name, study, known[name], ps)] if name in known else []
        sections += ["\n".join(f"- {note}" for note in notes)] if notes else []
    if not known:
        return sections
    sections += ["### Band KL against each", against("Band KL", values, ps)]
    sections += ["### All settings together", compromise(values)]
    titles = {name: study.parts[name].title for name in known}
    dots = [(titles[name], {rule: [*values[name].get(rule, {}).values()] for rule in RULES}) for name in known]
    caption = "right at the end, % of answers; dot: a seed; bar: their mean"
    draw_dots(dots, RULE_COLOURS, figures / f"atlas_rules{suffix}", caption)
    points = [
        (titles[name], {g.label: [end_point(run, of_setting[name]) for run in g.runs] for g in groups})
        for name, groups in known.items()
    ]
    axes, caption = ("entropy at the end, nats", "right at the end, %"), "a point: a run; a label: a rule's mean"
    draw_points(points, RULE_COLOURS, figures / f"atlas_entropy{suffix}", caption, axes)
    return sections


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
    names = [*atlas().parts, *BEST]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="", help=f"of {', '.join(names)}; all but {' and '.join(LARGE_PARTS)}")
    parser.add_argument("--more", action="store_true", help=f"{' and '.join(LARGE_PARTS)} too: half an hour more")
    parser.add_argument("--seeds", default="", help="comma-separated; default those of each part")
    parser.add_argument("--out", type=Path, default=Path("runs/atlas"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="tables and figures of the runs there are, no training")
    parser.add_argument("--figures", type=Path, default=None, help="folder of the figures (default OUT/figures)")
    parser.add_argument("--replay", type=int, default=0, metavar="N", help="N finished runs again, compared; no more")
    args = parser.parse_args(argv)
    parts = args.part.split(",") if args.part else [n for n in names if args.more or not n.startswith(LARGE_PARTS)]
    if unknown := [part for part in parts if part not in names]:
        parser.error(f"--part: {', '.join(unknown)} is not one of {', '.join(names)}")
    out = args.out.resolve()
    study = atlas(best_rates(atlas(), out))
    seeds = tuple(int(seed) for seed in args.seeds.split(",")) if args.seeds else study.seeds
    try:
        if args.replay:
            there = [part for part in parts if part in study.parts]
            return 1 if replay(study, in_order(study, there, seeds, out), out, args.replay) else 0
        failed = 0
        if not args.report:
            failed += run_all(study, in_order(study, [p for p in parts if p not in BEST], seeds, out), args.jobs)
            study, own_rate = atlas(best_rates(study, out)), [part for part in parts if part in BEST]  # sweeps are done
            if missing := [part for part in own_rate if part not in study.parts]:
                raise ValueError(f"{', '.join(missing)}: the sweep of learning rates is not whole")
            failed += run_all(study, in_order(study, own_rate, seeds, out), args.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:
        parser.error(str(error))
    text = report(study, seeds, out, args.figures or out / "figures")
    (out / "tables.md").write_text(text)
    print(text)
    return 1 if failed else 0


def in_order(study: Study, parts: Sequence[str], seeds: Sequence[int], out: Path) -> list[Job]:
    """Each run once, seed after seed, so that what is there at any time is whole; the rankings before the sweeps."""
    ranked = [part for part in parts if any(part in plan for plan in PLANS)]
    both = (ranked, [part for part in parts if part not in ranked])
    jobs = [job for some in both for job in sorted(jobs_of(study, some, seeds, out), key=lambda job: job.keys["seed"])]
    return list({job.folder: job for job in jobs}.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
