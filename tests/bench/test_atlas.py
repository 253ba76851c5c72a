"""The atlas: what is run, how rules are told apart, what counts as the same run."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from bandpo.rule import check_rule, made_up_view
from bandpo.rules import load_rule
from bench import atlas
from bench.atlas import (
    AGED_BAND,
    AGES,
    BEST,
    FAMILIES,
    LARGE_PARTS,
    PLANS,
    RULES,
    SETTINGS,
    SWEEP_SEEDS,
    VARIANTS,
    adjusted,
    best_rates,
    cliques,
    differing,
    letters,
    scores,
)
from bench.noisy_grader import noisy
from bench.study import RULE_COLOURS, Job, job_of, jobs_of
from configs import load
from configs.schema import Config
from data.toy import MARKERS, TASKS, chain_answer, make_tokenizer, toy_problems
from eval.compare import Group, holm, paired_p
from eval.plots import Curve, Panel, apart, draw_dots, draw_points, draw_sweeps
from eval.records import Record

BEST_RATES = {name: dict.fromkeys(RULES, 2e-4) for name in BEST.values()}
STUDY = atlas.atlas(BEST_RATES)


def record(seed: int, rows: dict[int, dict[str, float]]) -> Record:
    return Record(Path("run"), "run", {"seed": seed}, rows, ())


def test_every_run_is_a_configuration_that_the_trainer_accepts(tmp_path: Path):
    jobs = jobs_of(STUDY, list(STUDY.parts), (0, 10), tmp_path)
    for job in jobs:
        words = {key: v if isinstance(v, str) else json.dumps(v) for key, v in job.keys.items()}
        config = load(Config, [word for key, v in words.items() for word in (f"--{key}", v)])
        assert config.lr == job.keys["lr"]
        load_rule(config.rule, config.rule_parameters) if config.rule else None
    assert len({job.folder for job in jobs}) == len(jobs)


def test_the_atlas_has_what_it_promises():
    assert len(RULES) >= 12 and set(RULES) <= set(RULE_COLOURS)
    assert len(set(RULE_COLOURS.values())) == len(RULE_COLOURS)
    for name in (name for plan in PLANS for name in plan):
        part = STUDY.parts[name]
        assert set(part.variants) >= set(RULES) and len(part.of(STUDY.seeds)) == 10
    for name, (_, setting, rates) in SETTINGS.items():
        assert setting.keys["lr"] in rates and (max(rates) >= 99 * min(rates) or name.startswith(LARGE_PARTS))
    assert {label for values in FAMILIES.values() for label in values.values()} <= set(VARIANTS)


def test_parts_share_the_run_that_they_have_in_common(tmp_path: Path):
    name = next(iter(SETTINGS))
    ranked = {job.folder for job in jobs_of(STUDY, [name], (0,), tmp_path)}
    both = {job.folder for job in jobs_of(STUDY, [name, f"{name}_radius"], (0,), tmp_path)}
    own = {label for values in FAMILIES.values() for label in values.values()} - set(RULES)
    assert len(both) == len(ranked) + len(own)


def write_run(job: Job, accuracy: float):
    """A finished run of the job as the trainer leaves it, with this accuracy at its end."""
    job.folder.mkdir(parents=True)
    key = atlas.accuracy(job.setting).metric
    rows = [{"step": 0, key: 0.1}, {"step": job.keys["max_steps"], key: accuracy}]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job.folder / "config.yaml").write_text(f"seed: {job.keys['seed']}\n")
    (job.folder / "done.json").write_text(json.dumps(job.keys))


def test_the_best_rate_is_chosen_by_the_sweep_and_tried_on_other_seeds(tmp_path: Path):
    sweep = [f"rare_lr{lr:g}" for lr in SETTINGS["rare"][2]]
    for job in jobs_of(STUDY, sweep, (0, 1, 2), tmp_path):
        favourite = 6e-5 if job.variant == "GRPO" else 2e-3  # with one seed that says otherwise
        write_run(job, 0.5 * (job.keys["lr"] == favourite) + 0.6 * (job.keys["lr"] == 6e-3 and job.keys["seed"] == 0))
    rates = best_rates(STUDY, tmp_path)
    assert rates == {"rare": {rule: 6e-5 if rule == "GRPO" else 2e-3 for rule in RULES}}
    study = atlas.atlas(rates)
    assert "stale_best" not in study.parts
    ranked = jobs_of(study, ["rare_best"], study.seeds, tmp_path)
    assert {(job.variant, job.keys["lr"]) for job in ranked} == set(rates["rare"].items())
    assert {job.keys["seed"] for job in ranked}.isdisjoint(SWEEP_SEEDS) and len(ranked) == 10 * len(RULES)
    (jobs_of(STUDY, sweep[:1], (2,), tmp_path)[0].folder / "metrics.jsonl").unlink()
    assert best_rates(STUDY, tmp_path) == {}


def test_a_part_that_needs_the_sweep_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        atlas.main(["--part", "rare_best", "--out", str(tmp_path)])
    assert "rare_best: the sweep of learning rates is not whole" in capsys.readouterr().err


def test_the_radius_by_age_shrinks(tmp_path: Path):
    jobs = [job_of(STUDY, f"age{age}", AGED_BAND, 0, tmp_path) for age in AGES]
    assert [float(job.keys["delta"]) * (1 + job.keys["lag"]) for job in jobs] == pytest.approx([0.05] * len(AGES))


@pytest.mark.parametrize(
    "n, t, p", [(10, 2.262157, 0.05), (10, 4.780913, 0.001), (5, 2.776445, 0.05), (3, 4.302653, 0.05)]
)
def test_the_paired_t_test_has_the_quantiles_of_the_tables(n: int, t: float, p: float):
    noise = np.linspace(-1, 1, n)
    values = noise + t * noise.std(ddof=1) / math.sqrt(n)
    assert paired_p(list(values)) == pytest.approx(p, rel=1e-5)
    assert paired_p(list(-values)) == pytest.approx(p, rel=1e-5)


def test_equal_runs_are_not_told_apart():
    assert paired_p([0.0, 0.0, 0.0]) == 1 and paired_p([2.0, 2.0, 2.0]) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # .01 * 3, .03 * 2, and .04 is not below it
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_all_settings_are_corrected_together():
    rng = random.Random(0)
    far = {rule: {seed: i + rng.random() for seed in range(10)} for i, rule in enumerate(("a", "b", "c"))}
    alone, together = adjusted({"x": far}), adjusted({"x": far, "y": far})
    assert len(alone) == 3 and len(together) == 6
    assert all(together["x", a, b] > alone["x", a, b] for _, a, b in alone)


def test_letters_and_what_is_told_apart():
    """b is near to a and to c, which are apart; d is apart from all."""
    near = {frozenset("ab"), frozenset("bc")}

    def are_apart(x: str, y: str) -> bool:
        return frozenset((x, y)) not in near

    assert letters("abcd", are_apart) == {"a": "a", "b": "ab", "c": "b", "d": "c"}
    assert max(cliques("abcd", are_apart), key=len) == ("a", "c", "d")


def test_a_run_that_stopped_early_scores_nothing():
    setting = SETTINGS[next(iter(SETTINGS))][1]
    key, end = atlas.accuracy(setting).metric, setting.keys["max_steps"]
    runs = (record(0, {0: {key: 0.25}, end: {key: 0.5}}), record(1, {0: {key: 0.25}, 3: {"reward/mean": 0.1}}))
    assert scores(Group("x", runs), setting) == {0: 50.0, 1: 0.0}


def test_the_same_run_is_the_same_to_the_last_digit():
    first = record(0, {1: {"train/loss": 0.1, "time/step_s": 1.0, "x": math.nan}})
    assert differing(first, record(0, {1: {"train/loss": 0.1, "time/step_s": 9.0, "x": math.nan}})) == []
    assert differing(first, record(0, {1: {"train/loss": math.nextafter(0.1, 1), "x": math.nan}})) == ["train/loss"]
    assert differing(first, record(0, {**first.rows, 2: {"train/loss": 0.3}})) == ["train/loss"]


@pytest.mark.parametrize("name", ["by_difficulty", "early", "late"])
def test_radii_of_our_own_are_rules(name: str):
    rule = load_rule(f"bench/radii.py:{name}", {})
    check_rule(rule)
    lower, upper = rule(made_up_view())
    assert ((lower <= 1) & (upper >= 1)).all()
    wide = load_rule(f"bench/radii.py:{name}", {"delta": 0.2})(made_up_view())
    assert (wide[0] <= lower).all() and (wide[1] >= upper).all()


def test_the_noisy_grader_turns_three_in_ten():
    answers = [f"a{i}\\boxed{{{i % 7}}}" for i in range(2000)]
    said = [noisy(answer, "3", "1+2=") == 1.0 for answer in answers]
    turned = sum(one != (i % 7 == 3) for i, one in enumerate(said))
    assert 540 < turned < 660 and said == [noisy(answer, "3", "1+2=") == 1.0 for answer in answers]


def test_markers_of_a_task_are_tokens_of_its_tokenizer():
    task = TASKS["toy_words"]
    assert task.markers is not None and len(make_tokenizer(task.markers)) == len(make_tokenizer()) + 26 - len(MARKERS)
    answer = chain_answer(task, [1, 2, 3], "++", random.Random(0))
    assert make_tokenizer(task.markers).decode(make_tokenizer(task.markers)(answer)["input_ids"]) == answer
    assert len(toy_problems("toy_words_train")) == task.train_rows and len(toy_problems("toy_words_eval")) == 128


def test_labels_are_moved_apart_and_keep_their_order():
    assert apart([0.0, 1.0], 0.5) == [0.0, 1.0]
    assert apart([1.0, 1.0, 0.9], 1.0) == pytest.approx([0.97, 1.97, -0.03], abs=0.02)


def test_figures_are_written(tmp_path: Path):
    line = (np.array([0.1, 1.0]), np.array([1.0, 2.0]))
    panels = [Panel("setting", "lr", (Curve("a", (line, line), None), Curve("b", (line,), None)))]
    colours = {"a": "#000000", "b": "#0072B2"}
    draw_sweeps(panels, colours, tmp_path / "each", "caption", "lr", True)
    draw_sweeps(panels, colours, tmp_path / "together", "caption", "%", False)
    draw_points(
        [("setting", {"a": [(0.0, 1.0)], "b": [(1.0, 2.0)]})], colours, tmp_path / "points", "caption", ("x", "y")
    )
    draw_dots([("setting", {"a": [1.0, 2.0], "b": [1.0]})], colours, tmp_path / "dots", "caption")
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"each", "together", "points", "dots"}
