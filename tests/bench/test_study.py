"""The study: what is run, what is skipped, how figures are computed; slow: its whole path at the smallest size."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bandpo.rule import made_up_view
from bandpo.rules import RULES, load_rule
from bench import study
from bench.study import CPU, GPU, RARE, VARIANTS, Part, Setting, Study, job_of, jobs_of
from configs import load
from configs.schema import Config
from eval.compare import Column, Group
from eval.records import Record

LOG_P = torch.tensor([0.005, 0.1, 0.5, 0.95]).log()
BAND_KEYS: dict[str, Any] = dict(clip="band", delta=0.05, divergence="kl", ratio_cap=10.0, clip_low=0.2, clip_high=0.2)


def group(label: str, rewards: dict[int, list[float]]) -> Group:
    """Runs of mean rewards at the steps 1, 2, ..., by seed."""
    runs = []
    for seed, values in rewards.items():
        rows = {step: {"reward/mean": value} for step, value in enumerate(values, start=1)}
        runs.append(Record(Path(label), label, {"seed": seed}, rows, ()))
    return Group(label, tuple(runs))


@pytest.mark.parametrize("size", [CPU, GPU])
def test_every_run_is_a_configuration_that_the_trainer_accepts(size: Study, tmp_path: Path):
    jobs = jobs_of(size, list(size.parts), size.seeds, tmp_path)
    for job in jobs:
        config = load(Config, [w for k, v in job.keys.items() for w in (f"--{k}", json.dumps(v).strip('"'))])
        assert config.seed == job.keys["seed"]
        assert all(str(getattr(config, key)) == value for key, value in VARIANTS[job.variant].items())
        assert config.updates_per_step % config.epochs_per_step == 0
    assert len({job.folder for job in jobs}) == len(jobs)


def test_the_study_has_what_it_promises():
    assert set(CPU.parts["methods"].variants) >= {"GRPO", "Clip-Higher", "Band KL", "Band TV", "Band chi2", "DCPO"}
    assert len(CPU.seeds) >= 5
    assert {CPU.settings[f"updates{n}"].keys["updates_per_step"] for n in (1, 4, 8, 16)} == {1, 4, 8, 16}
    assert {part.variants[0] for part in CPU.parts.values()} == {"GRPO", "Band KL"}


def test_a_run_that_two_parts_share_is_run_once(tmp_path: Path):
    jobs = jobs_of(CPU, ["methods", "delta"], [0, 1], tmp_path)
    wanted = set(CPU.parts["methods"].variants) | set(CPU.parts["delta"].variants)
    assert len(jobs) == 2 * len(wanted)
    assert jobs[0].folder == tmp_path / "rare" / "grpo_seed0"


def test_labels_give_different_folders():
    assert len({study.slug(label) for label in VARIANTS}) == len(VARIANTS)
    assert study.slug("Band upper, .8 lower") == "band_upper_.8_lower"


def test_a_finished_run_is_known_and_changed_keys_are_refused(tmp_path: Path):
    job = job_of(CPU, "rare", "Band KL", 3, tmp_path)
    assert not study.is_done(job)
    job.folder.mkdir(parents=True)
    (job.folder / "done.json").write_text(json.dumps(job.keys))
    assert study.is_done(job)
    assert study.is_done(dataclasses.replace(job, keys=job.keys | {"output_dir": "moved"}))
    with pytest.raises(ValueError, match="another delta; delete it"):
        study.is_done(dataclasses.replace(job, keys=job.keys | {"delta": 0.1}))


def test_ablations_take_one_bound_of_each_method():
    view = made_up_view()
    band_low, band_up = RULES["band"](view)
    low, up = load_rule(study.VARIANTS["Band upper, .8 lower"]["rule"], {})(view)
    assert torch.equal(up, band_up) and torch.allclose(low, torch.tensor(0.8))
    low, up = load_rule(study.VARIANTS["Band lower, 1.2 upper"]["rule"], {})(view)
    assert torch.equal(low, band_low) and torch.allclose(up, torch.tensor(1.2))


def test_the_step_at_which_a_level_is_reached():
    steps = np.arange(1, 5)
    assert study.reached((steps, np.array([0.1, 0.5, 0.4, 0.9])), 0.5) == 2
    assert study.reached((steps, np.array([0.1, 0.2, 0.3, 0.4])), 0.5) == 5  # never: one beyond the last


def test_differences_pair_equal_seeds_and_leave_out_the_others():
    base = group("a", {0: [0.0, 0.2], 1: [0.2, 0.2], 7: [1.0, 1.0]})
    ours = group("b", {1: [0.5, 0.7], 0: [0.4, 0.4]})
    figure = Column("AUC", "reward/mean", study.area_under, 100.0)
    assert study.differences(base, ours, figure) == pytest.approx([30.0, 40.0])
    assert study.values_of(base, figure) == pytest.approx([10.0, 20.0, 100.0])


def test_a_verdict_needs_five_pairs():
    assert study.verdict([]) == "-"
    assert study.verdict([0.5]) == "+0.5"
    assert study.verdict([0.3, 0.3, 0.3, 0.3]) == "+0.3 [+0.3, +0.3]"
    assert study.verdict([0.3, 0.3, 0.3, 0.3, 0.3]) == "+0.3 [+0.3, +0.3]*"
    assert not study.verdict([0.3, -0.3, 0.3, 0.3, -0.3]).endswith("*")


def test_a_table_shows_spread_and_difference():
    groups = [group("base", {0: [0.1, 0.1], 1: [0.3, 0.3]}), group("other", {0: [0.6, 0.6], 1: [0.6, 0.6]})]
    auc, none = (
        Column(name, key, study.area_under, 1.0) for name, key in (("AUC", "reward/mean"), ("none", "no/metric"))
    )
    text = study.table(groups, [auc, none])
    assert "| base    | 2     | 0.2 ± 0.14 | -" in text
    assert "| other      | 2     | +0.4 [" in text


def evaluated(label: str, scores: list[float], entropy: float) -> Group:
    rows = [{4: {"eval/toy_eval/mean@32": score, "train/entropy": entropy}} for score in scores]
    return Group(label, tuple(Record(Path(label), label, {"seed": i}, row, ()) for i, row in enumerate(rows)))


def test_the_headline_needs_points_and_entropy_and_five_pairs():
    base, score = evaluated("GRPO", [0.5] * 5, 0.1), [0.53] * 5

    def cell(group: Group) -> str:
        return study.headline([base, group], CPU.settings["rare"]).splitlines()[-1]

    assert "+3 [+3, +3]*, 3.5x HOLDS" in cell(evaluated("Band", score, 0.35))
    assert "+3 [+3, +3]*, 2.5x |" in cell(evaluated("Band", score, 0.25))
    assert "HOLDS" not in cell(evaluated("Band", [0.51] * 5, 0.35))
    assert "HOLDS" not in cell(evaluated("Band", [0.8, 0.8, 0.3, 0.4, 0.3], 0.35))
    assert "HOLDS" not in cell(evaluated("Band", score[:4], 0.35))


def test_what_is_missing_is_said(tmp_path: Path):
    done = job_of(CPU, "rare", "GRPO", 0, tmp_path).folder
    done.mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.25}\n')
    (done / "config.yaml").write_text("seed: 0\nmax_steps: 16\n")
    (done / "failed.txt").write_text("Traceback\nFloatingPointError: step 2: no finite gradient")
    going_on = job_of(CPU, "rare", "Band KL", 0, tmp_path).folder
    going_on.mkdir()
    (going_on / "metrics.jsonl").write_text('{"step": 3, "reward/mean": 0.25}\n')
    groups, notes = study.load_groups(CPU, Part("", "rare", ("GRPO", "Band KL", "DCPO")), [0], tmp_path)
    assert "Band KL, seed 0: unfinished at step 3, left out" in notes
    assert [g.label for g in groups] == ["GRPO"]
    assert "DCPO, seed 0: not run" in notes
    assert any("at step 1 of 16" in note for note in notes)
    assert "GRPO, seed 0: failed: FloatingPointError: step 2: no finite gradient" in notes


def test_a_run_that_cannot_start_is_a_failure(tmp_path: Path):
    job = job_of(CPU, "rare", "Band upper, .8 lower", 0, tmp_path)  # its start model was never made
    code, _ = study.train_job(job)
    assert code == 2 and str(job.start) in (job.folder / "failed.txt").read_text()
    assert str(job.start) in (job.folder / "console.txt").read_text()
    assert not study.is_done(job)


TINY = Study(
    variants=VARIANTS,
    settings={
        "rare": Setting("toy", 0, RARE | {"max_steps": 8, "eval_every": 8, "eval_samples": 4}),
        "one_update": Setting(
            "toy", 0, RARE | {"max_steps": 2, "eval_samples": 4, "updates_per_step": 1, "epochs_per_step": 1}
        ),
    },
    parts={
        "methods": Part("tiny", "rare", ("GRPO", "Band KL")),
        "one_update": Part("tiny", "one_update", ("GRPO", "Band KL")),
    },
    seeds=(0,),
    reuse_process=True,
    device="cpu",
)


@pytest.mark.slow
def test_the_whole_path(toy_model: str, tmp_path: Path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "toy_0").symlink_to(toy_model)
    jobs = jobs_of(TINY, list(TINY.parts), TINY.seeds, tmp_path)
    assert study.run_all(TINY, jobs, 2) == 0
    before = {job.folder: (job.folder / "metrics.jsonl").stat().st_mtime_ns for job in jobs}
    assert study.run_all(TINY, jobs, 2) == 0  # finished runs are not run again
    assert before == {job.folder: (job.folder / "metrics.jsonl").stat().st_mtime_ns for job in jobs}

    text = study.report(TINY, list(TINY.parts), TINY.seeds, tmp_path, tmp_path / "figures")
    assert "not run" not in text and "failed" not in text
    for name in TINY.parts:
        assert all((tmp_path / "figures" / f"study_{name}_{kind}.png").exists() for kind in ("curves", "seeds"))

    (grpo, band), _ = study.load_groups(TINY, TINY.parts["methods"], [0], tmp_path)
    clipped = Column("", "clip/up/p<0.01", study.mean_of, 1.0)
    (fixed,), (of_band,) = (study.values_of(each, clipped) for each in (grpo, band))
    assert fixed > 0.3 and of_band < fixed / 2
    assert study.differences(grpo, band, Column("", "reward/mean", study.area_under, 1.0))[0] > 0

    same = [study.load_groups(TINY, TINY.parts["one_update"], [0], tmp_path)[0][i].runs[0] for i in (0, 1)]
    for key in ("reward/mean", "train/entropy", "train/loss"):  # one update a step: every ratio is one
        assert same[0].series(key)[1].tolist() == same[1].series(key)[1].tolist()
    assert math.isfinite(same[0].series("train/loss")[1].sum())


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(toy_model: str, tmp_path: Path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "toy_0").symlink_to(toy_model)
    job = job_of(TINY, "one_update", "GRPO", 0, tmp_path)
    one_step = dataclasses.replace(job, keys=job.keys | {"max_steps": 1})
    assert study.train_job(one_step)[0] == 0
    with pytest.raises(ValueError, match="another max_steps"):
        study.is_done(job)
    (job.folder / "done.json").unlink()
    assert study.train_job(job)[0] == 0 and study.is_done(job)
    assert "resuming" in (job.folder / "console.txt").read_text()
    assert [row["step"] for row in map(json.loads, (job.folder / "metrics.jsonl").open())] == [0, 1, 2]


@pytest.mark.slow
def test_the_gpu_form_at_toy_size(toy_model: str, tmp_path: Path):
    small = {"precision": "float32", "prompts_per_step": 8, "max_steps": 2, "max_prompt_tokens": 8}
    small |= {"max_response_tokens": 16, "micro_batch_tokens": 4096, "eval_samples": 2, "eval_every": 2}
    hard = dataclasses.replace(GPU.settings["hard"], task="toy", keys=GPU.settings["hard"].keys | small)
    size = dataclasses.replace(GPU, settings={"hard": hard}, device="cpu")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "toy_0").symlink_to(toy_model)
    job = job_of(size, "hard", "Band KL", 0, tmp_path)
    assert study.run_all(size, [job], 1) == 0
    (run,) = study.load_groups(size, size.parts["hard"], [0], tmp_path)[0][0].runs
    assert run.config["engine"] == "vllm" and run.last_step == 2
    assert len(run.series("eval/toy_eval/mean@2")[0]) == 2
