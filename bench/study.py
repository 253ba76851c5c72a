"""Does Band do what it claims? Every run of docs/study.md, its tables and its figures, from nothing.

    python -m bench.study                                # all parts but search_*, half an hour on two cores
    python -m bench.study --part methods --seeds 0,1     # one part, fewer seeds
    python -m bench.study --report --figures docs/figures    # tables and figures of what is there, no training
    python -m bench.study --gpu                          # ~25M parameters and a longer task, one GPU (`make study-gpu`)

A run is (setting, variant, seed) and lives in OUT/SETTING/VARIANT_seedN; parts that share a run share its folder. A
finished run is never run again, an interrupted one goes on from its checkpoint, a failed one is named below the tables.
Each worker process trains one run after the other through train.main, on one thread, with `engine: hf`: at this size
transformers' generate samples four times faster than vLLM on a CPU, and starts at once.

Left out: choosing what to show after seeing it. Figures and tests were fixed in docs/study.md before the final runs.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.names import CONFIG_DIR
from data.toy import save_start
from eval.compare import (
    MIN_SEEDS,
    Column,
    Group,
    area_under,
    best,
    differences,
    end_of,
    keep_on_wandb,
    last,
    mean_of,
    pair_by_seed,
    paired_interval,
    panel_of,
    text_table,
    values_of,
)
from eval.plots import draw, draw_dots
from eval.records import Series, load_record

Keys = dict[str, Any]

# ---- what is run ----


def published(name: str) -> Keys:
    """The keys of a method of configs/methods."""
    return yaml.load((CONFIG_DIR / "methods" / f"{name}.yaml").read_text(), yaml.BaseLoader) or {}


HALF_BANDS = Path(__file__).with_name("half_bands.py")
VARIANTS: dict[str, Keys] = {
    "GRPO": published("grpo"),
    "Clip-Higher": published("clip_higher"),
    "Band KL": published("band"),
    "Band TV": published("band_tv"),
    "Band chi2": published("band_chi2"),
    "Band relaxed": published("band_relaxed"),
    "DCPO": published("dcpo"),
    "no clip": published("noclip"),
    "fixed .8-3": published("grpo") | {"clip_high": "2.0"},
    "Band KL d=.01": published("band") | {"delta": "0.01"},
    "Band KL d=.02": published("band") | {"delta": "0.02"},
    "Band KL d=.2": published("band") | {"delta": "0.2"},
    "Band entropy radius": published("band") | {"radius": "entropy"},
    "Band upper, .8 lower": {"rule": f"{HALF_BANDS}:band_upper"},
    "Band lower, 1.2 upper": {"rule": f"{HALF_BANDS}:band_lower"},
}


# One colour a rule in all figures, those of bench/atlas.py too.
RULE_COLOURS = {
    "GRPO": "#000000",
    "Clip-Higher": "#7F7F7F",
    "Band KL": "#0072B2",
    "Band TV": "#56B4E9",
    "Band chi2": "#332288",
    "Band relaxed": "#88CCEE",
    "Band early": "#882255",
    "Band KL by age": "#661100",
    "Band entropy radius": "#6699CC",
    "DCPO": "#009E73",
    "fixed .8-3": "#A0522D",
    "no clip": "#D55E00",
    "DPPO TV": "#CC79A7",
    "SAPO": "#E69F00",
    "GSPO": "#999933",
    "CISPO": "#AA4499",
    "GPPO": "#44AA99",
}
OTHER = "#0072B2"  # radii and halves of Band
HALVES = ("Band upper, .8 lower", "Band lower, 1.2 upper")
METHODS = tuple(VARIANTS)[:9]  # up to "fixed .8-3"
DELTAS = ("GRPO", "Band KL d=.01", "Band KL d=.02", "Band KL", "Band KL d=.2")


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share: the start model and the keys."""

    task: str  # of data/toy.py
    start_seed: int  # of the start model
    keys: Keys


@dataclass(frozen=True)
class Part:
    """One comparison: the first variant is what the others are compared with."""

    title: str
    setting: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...] | None = None  # None: the study's

    def of(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` that the part is run with."""
        return [seed for seed in seeds if self.seeds is None or seed in self.seeds]


@dataclass(frozen=True)
class Study:
    """Settings and parts at one size."""

    variants: dict[str, Keys]
    settings: dict[str, Setting]
    parts: dict[str, Part]
    seeds: tuple[int, ...]
    reuse_process: bool  # an engine that cannot be started twice in a process needs a fresh one for every run
    device: str  # of the warm-up
    own: Mapping[tuple[str, str], Keys] = field(default_factory=dict)  # (setting, variant) -> keys of it alone


COMMON: Keys = {
    "sharding": "none",
    "gradient_checkpointing": False,
    "prompt_template": "plain",
    "chat_template": False,
    "samples_per_prompt": 16,
    "weight_decay": 0,
    "kl_coef": 0,
    "reward_wrong": 0,
    "verifier_workers": 1,
    "eval_samples": 32,
    "keep_last": 1,
    "keep_best": 0,
    "plots": False,
    "samples_logged": 0,
    "wandb": "disabled",
}
SMALL = COMMON | {"precision": "float32", "engine": "hf", "engine_max_sequences": 1024, "micro_batch_tokens": 8192}
SMALL |= {"max_prompt_tokens": 8, "max_response_tokens": 16}
RARE = SMALL | {"prompts_per_step": 64, "updates_per_step": 32, "epochs_per_step": 4, "lr": 1e-4}
RARE |= {"max_steps": 16, "eval_every": 4, "save_every": 0}
ONE_EPOCH = RARE | {"epochs_per_step": 1, "lr": 3e-4, "max_steps": 12, "eval_every": 12}
SKEWED = SMALL | {"prompts_per_step": 32, "updates_per_step": 16, "epochs_per_step": 2, "lr": 3e-4}
SKEWED |= {"max_steps": 110, "eval_every": 55, "save_every": 40}
LARGE = COMMON | {"precision": "bfloat16", "engine": "vllm", "micro_batch_tokens": 65536}
LARGE |= {"max_prompt_tokens": 64, "max_response_tokens": 96, "prompts_per_step": 256, "updates_per_step": 16}
LARGE |= {"epochs_per_step": 2, "lr": 3e-5, "max_steps": 60, "eval_every": 15, "save_every": 20}

CPU = Study(
    variants=VARIANTS,
    settings={
        "rare": Setting("toy", 0, RARE),
        "rare_start1": Setting("toy", 1, RARE),
        "rare_late": Setting("toy", 0, RARE | {"max_steps": 24}),
        "skewed": Setting("toy_skewed", 0, SKEWED),
        "rare_cosine": Setting("toy", 0, RARE | {"max_steps": 12, "lr_schedule": "cosine"}),
        "rarest": Setting("toy_rarest", 0, RARE),
        "rarest_short": Setting("toy_rarest", 0, RARE | {"max_steps": 8}),
        **{f"updates{n}": Setting("toy", 0, ONE_EPOCH | {"updates_per_step": n}) for n in (1, 4, 8, 16)},
    },
    parts={
        "methods": Part("A rare good strategy", "rare", METHODS),
        "collapse": Part("Long run, equally good wordings", "skewed", ("GRPO", "Clip-Higher", "Band KL", "no clip")),
        "delta": Part("Radius of the Band", "rare", DELTAS),
        **{f"updates{n}": Part(f"{n} updates a step", f"updates{n}", ("GRPO", "Band KL")) for n in (1, 4, 8, 16)},
        "radius": Part("Radius by entropy", "rare", ("Band KL", "Band entropy radius")),
        "late": Part("A rare good strategy, twice as long", "rare_late", ("GRPO", "Band KL")),
        "start": Part("A rare good strategy, another start model", "rare_start1", ("GRPO", "Band KL")),
        "radius_collapse": Part("Radius by entropy, long run", "skewed", ("Band KL", "Band entropy radius")),
        # The search for a setting where the paper's whole result holds; not among the parts that are run unasked.
        "search_budget": Part("Fixed budget, cosine to zero", "rare_cosine", ("GRPO", "Band KL", "Band KL d=.02")),
        "search_rarest": Part("An even rarer strategy", "rarest", ("GRPO", "Band KL")),
        "search_held_out": Part("Even rarer, half the budget", "rarest_short", ("GRPO", "Band KL", "no clip")),
        "search_bounds": Part("One bound of each", "rare", ("GRPO", *HALVES, "Band KL")),
        "search_collapse": Part(
            "Long run, other Bands", "skewed", ("GRPO", "Band KL", "Band KL d=.01", "Band KL d=.02", *HALVES)
        ),
    },
    seeds=(0, 1, 2, 3, 4),
    reuse_process=True,
    device="cpu",
)
GPU = Study(
    variants=VARIANTS,
    settings={"hard": Setting("toy_hard", 0, LARGE)},
    parts={"hard": Part("A rare good strategy at 25M parameters", "hard", METHODS)},
    seeds=(0,),
    reuse_process=False,
    device="cuda",
)


@dataclass(frozen=True)
class Job:
    """One run to do."""

    setting: Setting
    variant: str
    start: Path  # folder of the start model
    folder: Path  # of the run
    keys: Keys  # all that are given to the trainer

    def cost(self) -> float:
        """Rough, relative: what a step costs beside its updates, and the sequences of the updates."""
        keys = self.keys
        return keys["max_steps"] * (4 + keys["updates_per_step"] * (0.5 + keys["prompts_per_step"] / 128))


def slug(label: str) -> str:
    """A folder name of a variant's label. Example: "Band upper, .8 lower" -> "band_upper_.8_lower"."""
    return label.lower().replace(",", "").replace("=", "").replace(" ", "_")


def job_of(study: Study, setting_name: str, variant: str, seed: int, out: Path) -> Job:
    """The run of one variant and seed under OUT. Raises KeyError for a setting or variant that is not there."""
    setting, own = study.settings[setting_name], study.own.get((setting_name, variant), {})
    start = out / "start" / f"{setting.task}_{setting.start_seed}"
    folder = out / setting_name / f"{slug(variant)}_seed{seed}"
    data = {"model": str(start), "train_data": f"{setting.task}_train", "eval_data": f"{setting.task}_eval"}
    names = {"run_name": folder.name, "output_dir": str(folder.parent), "seed": seed}
    return Job(setting, variant, start, folder, {**setting.keys, **study.variants[variant], **own, **data, **names})


def jobs_of(study: Study, parts: Sequence[str], seeds: Sequence[int], out: Path) -> list[Job]:
    """Every run of the parts once, seed after seed within a part."""
    chosen = [study.parts[name] for name in parts]
    every = [
        job_of(study, part.setting, variant, seed, out)
        for part in chosen
        for seed in part.of(seeds)
        for variant in part.variants
    ]
    return list({job.folder: job for job in every}.values())


# ---- running ----


STOPPED = 130  # exit code of a run that was asked to stop
_asked_to_stop = threading.Event()  # in this process: runs already handed to it are not begun any more


def make_start(start: Path, setting: Setting, device: str) -> None:
    save_start(start, setting.task, seed=setting.start_seed, device=device)


def train_job(job: Job) -> tuple[int, float]:
    """(exit code, seconds) of one run, in this process; its console goes to FOLDER/console.txt.

    A crash is a result: it is kept in FOLDER/failed.txt and the study goes on. Ctrl-C gives STOPPED.
    """
    import train  # here and not above: the parent process and the tables need no models

    if _asked_to_stop.is_set():
        return STOPPED, 0.0
    if is_done(job):  # meanwhile, by another study over the same folder
        return 0, 0.0
    started, folder = time.perf_counter(), job.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.txt").unlink(missing_ok=True)
    words = {key: v if isinstance(v, str) else json.dumps(v) for key, v in job.keys.items()}
    with (
        open(folder / "console.txt", "a+") as console,
        contextlib.redirect_stdout(console),
        contextlib.redirect_stderr(console),
    ):
        try:
            code = train.main([word for key, value in words.items() for word in (f"--{key}", value)])
        except (RuntimeError, ArithmeticError, ValueError, OSError):
            (folder / "failed.txt").write_text(traceback.format_exc())
            code = 1
        except SystemExit as stop:  # the last line of the console says why
            console.flush()
            (folder / "failed.txt").write_text((folder / "console.txt").read_text().splitlines()[-1])
            code = int(stop.code or 1)
    if code == 0 and load_record(folder).last_step < job.keys["max_steps"]:  # SIGTERM, which is no failure
        code = STOPPED
    if code == STOPPED:
        _asked_to_stop.set()
    if code == 0:
        (folder / "done.json").write_text(json.dumps(job.keys, sort_keys=True))
    return code, time.perf_counter() - started


def is_done(job: Job) -> bool:
    """Whether the run is finished. Raises ValueError when it was made with other keys."""
    mark = job.folder / "done.json"
    if not mark.exists():
        return False
    then, now = json.loads(mark.read_text()), json.loads(json.dumps(job.keys))
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key) and key not in ("model", "output_dir")]
    if changed:
        raise ValueError(f"{job.folder}: was run with another {', '.join(changed)}; delete it or give another --out")
    return True


def run_all(study: Study, jobs: Sequence[Job], processes: int) -> int:
    """Run what is not finished, `processes` at a time; how many failed.

    Ctrl-C, here or in a run: the runs save what they have and KeyboardInterrupt is raised.
    """
    todo = [job for job in jobs if not is_done(job)]
    if not todo:
        return 0
    # One thread each: at this size a second one costs more than it gives. Read when the workers import torch.
    if study.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=None if study.reuse_process else 1) as pool:
        try:
            starts = {job.start: job.setting for job in todo}
            list(pool.map(make_start, starts, starts.values(), [study.device] * len(starts)))
            return _follow({pool.submit(train_job, job): job for job in todo})
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # waits for the runs that are on
            raise


def _follow(pending: dict[Future[tuple[int, float]], Job]) -> int:
    """A line for every run that ends, with the time left; how many failed."""
    begun, spent, failed = time.perf_counter(), 0.0, 0
    whole = sum(job.cost() for job in pending.values())
    for count, future in enumerate(as_completed(pending), start=1):
        job, (code, seconds) = pending[future], future.result()
        if code == STOPPED:
            raise KeyboardInterrupt
        failed += code != 0
        spent += job.cost()
        left_min = (time.perf_counter() - begun) * (whole / spent - 1) / 60
        word = f"FAILED, see {job.folder}/failed.txt, " if code else ""
        place = f"{job.folder.parent.name}/{job.folder.name}"
        print(f"[{count}/{len(pending)}] {place}: {word}{seconds:.0f} s, about {left_min:.0f} min left", flush=True)
    return failed


# ---- what is shown ----


def reached(series: Series, level: float) -> float:
    """First step at or above `level`; one beyond the last step where it was never reached."""
    above = np.flatnonzero(series[1] >= level)
    return float(series[0][above[0]]) if len(above) else float(series[0][-1] + 1)


def half_reached(series: Series) -> float:
    return reached(series, 0.5)


def figures_of(setting: Setting) -> list[Column]:
    """The figures of a part's table, fixed beforehand; the first four are those that are tested and drawn."""
    at = f"eval/{setting.task}_eval"
    return [
        Column("reward AUC", "reward/mean", area_under, 1.0),
        Column("mean@32 final, %", f"{at}/mean@32", last, 100.0),
        Column("entropy end, nats", "train/entropy", end_of, 1.0),
        Column("step of reward .5", "reward/mean", half_reached, 1.0),
        Column("pass@32 final, %", f"{at}/pass@32", last, 100.0),
        Column("clipped up p<.01, %", "clip/up/p<0.01", mean_of, 100.0),
        Column("grad norm, largest", "optim/grad_norm", best, 1.0),
    ]


TESTED = 4


def load_groups(study: Study, part: Part, seeds: Sequence[int], out: Path) -> tuple[list[Group], list[str]]:
    """The runs of a part that are there, by variant, and what is missing or odd."""
    groups, notes = [], []
    for variant in part.variants:
        runs, missing = [], []
        for seed in part.of(seeds):
            folder = job_of(study, part.setting, variant, seed, out).folder
            if not (folder / "metrics.jsonl").exists():
                missing.append(str(seed))
                continue
            run = load_record(folder)
            if (folder / "failed.txt").exists():
                notes.append(f"{variant}, seed {seed}: failed: {(folder / 'failed.txt').read_text().splitlines()[-1]}")
            elif not (folder / "done.json").exists():
                notes.append(f"{variant}, seed {seed}: unfinished at step {run.last_step}, left out")
                continue
            notes += [f"{variant}, seed {seed}: {note}" for note in run.notes]
            runs.append(run)
        if missing:
            notes.append(f"{variant}, seed {', '.join(missing)}: not run")
        if runs:
            groups.append(Group(variant, tuple(runs)))
    return groups, notes


def verdict(values: Sequence[float]) -> str:
    """Mean difference with its 95 % interval, starred when the interval leaves out zero and there are enough seeds."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.3g}"
    low, high = paired_interval(values, 0.95)
    star = "*" if len(values) >= MIN_SEEDS and (low > 0 or high < 0) else ""
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]{star}"


def table(groups: Sequence[Group], figures: Sequence[Column]) -> str:
    """Mean and standard deviation over seeds of every figure, then the paired differences from the first group."""
    header = ["variant", "seeds", *(figure.heading for figure in figures)]
    rows, against = [], []
    for group in groups:
        cells = []
        for figure in figures:
            values = values_of(group, figure)
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3g}{spread}" if values else "-")
        rows.append([group.label, str(len(group.runs)), *cells])
        if group is not groups[0]:
            pairs = str(len(pair_by_seed(groups[0], group)))
            against.append([group.label, pairs, *(verdict(differences(groups[0], group, f)) for f in figures[:TESTED])])
    text = text_table(header, rows)
    if against:
        header = [f"minus {groups[0].label}", "pairs", *(figure.heading for figure in figures[:TESTED])]
        text += "\n\n" + text_table(header, against)
    return text


POINTS, TIMES = 2.0, 3.0  # the paper's result in full: mean@32 this much higher and entropy this many times


def headline(groups: Sequence[Group], setting: Setting) -> str:
    """At every evaluation: mean@32 minus that of the first group, points, and the ratio of entropies (geometric mean).

    HOLDS marks five pairs with a mean difference of POINTS, an interval above zero and a ratio of TIMES.
    """
    key = f"eval/{setting.task}_eval/mean@32"
    steps = sorted({int(step) for group in groups for run in group.runs for step in run.series(key)[0] if step})
    rows = []
    for group in groups[1:]:
        cells = []
        for step in steps:
            pairs = [
                (ours, base)
                for base, ours in pair_by_seed(groups[0], group)
                if np.isfinite(ours.value(key, step) - base.value(key, step))
            ]
            points = [100 * (ours.value(key, step) - base.value(key, step)) for ours, base in pairs]
            ratios = [ours.value("train/entropy", step) / base.value("train/entropy", step) for ours, base in pairs]
            times = float(np.exp(np.mean(np.log(ratios)))) if pairs else math.nan
            holds = len(pairs) >= MIN_SEEDS and np.mean(points) >= POINTS and paired_interval(points, 0.95)[0] > 0
            word = " HOLDS" if holds and times >= TIMES else ""
            cells.append(f"{verdict(points)}, {times:.2g}x{word}" if pairs else "-")
        rows.append([group.label, *cells])
    return text_table([f"minus {groups[0].label}", *(f"step {step}" for step in steps)], rows)


def curves(groups: Sequence[Group], setting: Setting, path: Path, caption: str) -> None:
    """Reward, mean@32, entropy and clipped share over the steps: the mean over seeds, lowest to highest shaded."""
    keys = ("reward/mean", f"eval/{setting.task}_eval/mean@32", "train/entropy", "clip/up/p<0.01")
    panels = [panel for key in keys if (panel := panel_of(groups, key))]
    draw(panels, RULE_COLOURS, path, caption, (".png", ".svg"))


CURVED = ("GRPO", "Clip-Higher", "Band KL", "no clip", "Band entropy radius")  # more lines than these cannot be read


def report(study: Study, parts: Sequence[str], seeds: Sequence[int], out: Path, figures: Path) -> str:
    """Tables of the parts as Markdown; figures study_PART_curves and study_PART_seeds into `figures`."""
    sections = []
    for name in parts:
        part = study.parts[name]
        setting = study.settings[part.setting]
        groups, notes = load_groups(study, part, seeds, out)
        wanted = figures_of(setting)
        sections.append(f"### {name}: {part.title}")
        if groups:
            sections.append(table(groups, wanted))
            if len(groups) > 1:
                sections.append("mean@32 difference in points, ratio of entropies, at each evaluation:")
                sections.append(headline(groups, setting))
            keys, names = setting.keys, ", ".join(sorted({str(r.config["seed"]) for g in groups for r in g.runs}))
            caption = (
                f"{part.title}; {keys['updates_per_step']} updates a step, {keys['max_steps']} steps, seeds {names}"
            )
            some = [g for g in groups if g.label in CURVED]
            curves(some, setting, figures / f"study_{name}_curves.png", caption + "; band: lowest to highest seed")
            draw_dots(
                [(figure.heading, {g.label: values_of(g, figure) for g in groups}) for figure in wanted[:TESTED]],
                {g.label: RULE_COLOURS.get(g.label, OTHER) for g in groups},
                figures / f"study_{name}_seeds.png",
                caption + "; dot: a seed; bar: their mean",
            )
        if notes:
            sections.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(sections) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="~25M parameters on one GPU")
    parser.add_argument(
        "--part", default="", help=f"of {', '.join(CPU.parts)} (with --gpu: {', '.join(GPU.parts)}); all"
    )
    parser.add_argument("--seeds", default="", help="comma-separated; default 0 to 4, on a GPU 0")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the runs (default runs/study, runs/study_gpu)"
    )
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default 2, on a GPU 1)")
    parser.add_argument("--report", action="store_true", help="tables and figures of the runs there are, no training")
    parser.add_argument("--figures", type=Path, default=None, help="folder of the figures (default OUT/figures)")
    parser.add_argument("--wandb", choices=["auto", "online", "offline"], help="keep tables and figures on wandb")
    args = parser.parse_args(argv)
    study = GPU if args.gpu else CPU
    parts = args.part.split(",") if args.part else [name for name in study.parts if not name.startswith("search")]
    if unknown := [part for part in parts if part not in study.parts]:
        parser.error(f"--part: {', '.join(unknown)} is not one of {', '.join(study.parts)}")
    seeds = tuple(int(seed) for seed in args.seeds.split(",")) if args.seeds else study.seeds
    out = (args.out or Path("runs/study_gpu" if args.gpu else "runs/study")).resolve()
    failed = 0
    if not args.report:
        try:
            failed = run_all(study, jobs_of(study, parts, seeds, out), args.jobs or (1 if args.gpu else 2))
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
        except ValueError as error:
            parser.error(str(error))
    text = report(study, parts, seeds, out, args.figures or out / "figures")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text)
    print(text)
    if args.wandb:
        figures = args.figures or out / "figures"
        keep_on_wandb([out / "tables.md", *figures.glob("study_*")], out / "wandb", args.wandb, "bandpo")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
