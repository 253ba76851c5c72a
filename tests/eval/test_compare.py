"""compare and plots on runs written here: five seeds of two rules (`invented`, a sigmoid with noise), and small ones.

Checks numbers: every figure of the tables is worked out again from the files, by other code.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import yaml
from launching import ROOT

from eval.compare import (
    compare,
    group_runs,
    holm,
    label_configs,
    main,
    mean_from,
    paired_interval,
    paired_p,
    two_sided_p,
)
from eval.plots import FIGURES, Curve, describe, line_style, plot_run, sort_keys, spread
from eval.records import load_record

STEPS = 20
BINS = ("p<0.01", "p<0.2", "p<0.4", "p<0.6", "p<0.8", "p<=1")
# rule -> (step where the reward is half way, entropy at the end, share clipped up and down in each bin)
METHODS = {
    "fixed": (11.0, 0.12, (0.60, 0.20, 0.09, 0.02, 0.11, 0.001), (0.29, 0.09, 0.07, 0.04, 0.15, 0.01)),
    "band": (8.0, 0.31, (0.04, 0.09, 0.02, 0.01, 0.29, 0.01), (0.001, 0.06, 0.13, 0.08, 0.20, 0.04)),
}

RULE_ARGS = {"fixed": {"low": 0.2, "high": 0.2}, "band": {"delta": 0.05, "divergence": "kl"}}


def invented_rows(rule: str, seed: int) -> list[dict[str, float]]:
    noise = np.random.default_rng([seed, len(rule)])
    half, entropy_end, up, down = METHODS[rule]
    half += noise.normal(0, 0.8)
    out = []
    for step in range(STEPS + 1):
        reward = 0.25 + 0.72 / (1 + np.exp(-(step - half) / 1.5))
        row: dict[str, float] = {"step": step}
        if step:
            entropy = 0.02 + 0.5 * np.exp(-(((step - half) / 4) ** 2)) + entropy_end * step / STEPS
            row |= {
                "train/entropy": entropy * (1 + noise.normal(0, 0.04)),
                "reward/mean": reward + noise.normal(0, 0.01),
                "reward/solved_all": max(0.0, reward - 0.3),
                "reward/solved_none": max(0.0, 0.7 - reward),
                "clip/up": 0.016 + noise.normal(0, 0.001),
                "clip/down": 0.017 + noise.normal(0, 0.001),
                "optim/grad_norm": 0.4 + abs(noise.normal(0, 0.1)),
                "response/length_mean": 5 + 3 * reward,
                "throughput/tokens_per_s": 4000 + noise.normal(0, 60),
            }
            for name, share_up, share_down in zip(BINS, up, down, strict=True):
                row[f"clip/up/{name}"] = share_up * (1 + noise.normal(0, 0.05))
                row[f"clip/down/{name}"] = share_down * (1 + noise.normal(0, 0.05))
        if step % 5 == 0:
            row |= {
                "eval/toy/mean@32": reward,
                "eval/toy/mean@32_stderr": 0.03,
                "eval/toy/pass@32": min(1.0, reward + 0.1),
            }
        out.append({key: round(float(value), 5) if key != "step" else value for key, value in row.items()})
    return out


def write_run(folder: Path, rows: list[dict], tail: str = "", **config: object) -> Path:
    """A run folder; `tail` follows the last line as it is."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump({"run_name": folder.name, **config}))
    return folder


def column(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def cells(text: str, table: str, group: str) -> dict[str, str]:
    """One row of one table of the text, by heading."""
    block = text.split(table, 1)[1].split("\n\n")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    (row,) = [row for row in rows if row["group"] == group]
    return row


def number(cell: str) -> tuple[float, float]:
    value, error = cell.rstrip("†").split(" ± ")
    return float(value), float(error)


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Five seeds of each rule of METHODS: run folders by rule."""
    root = tmp_path_factory.mktemp("runs")

    def write(rule: str, seed: int) -> Path:
        config = {"seed": seed, "max_steps": STEPS, "rule": rule, "rule_args": RULE_ARGS[rule], "lr": 1e-4}
        return write_run(root / f"{rule}_seed{seed}", invented_rows(rule, seed), **config)

    return {rule: [write(rule, seed) for seed in range(5)] for rule in METHODS}


@pytest.fixture(scope="module")
def recorded(invented: dict[str, list[Path]]) -> str:
    return compare([*invented["fixed"], *invented["band"]], None)


def stated(values: list[float], cell: str) -> None:
    """The cell says mean ± standard error of `values`, to its last digit."""
    value, error = number(cell)
    digit = 10.0 ** -len(cell.split(" ± ")[1].partition(".")[2])
    assert value == pytest.approx(fmean(values), abs=0.51 * digit)
    assert error == pytest.approx(stdev(values) / len(values) ** 0.5, abs=0.51 * digit)


@pytest.mark.parametrize("group", METHODS)
def test_the_tables_say_what_the_files_hold(recorded: str, group: str, invented: dict[str, list[Path]]) -> None:
    runs = invented[group]
    training = cells(recorded, "Training", group)
    assert (training["seeds"], training["steps"]) == ("5", "20")
    rewards = [column(run, "reward/mean") for run in runs]
    # Trapezoids over equal steps: every value once, the two ends half.
    stated([(sum(r) - (r[0] + r[-1]) / 2) / (len(r) - 1) for r in rewards], training["reward AUC"])
    entropies = [column(run, "train/entropy") for run in runs]  # 20 steps, so a tenth is two
    stated([fmean(e[:2]) for e in entropies], training["entropy start"])
    stated([fmean(e[9:11]) for e in entropies], training["entropy middle"])
    stated([fmean(e[-2:]) for e in entropies], training["entropy end"])
    stated([float(np.median(column(run, "throughput/tokens_per_s"))) for run in runs], training["tokens/s"])
    evaluation = cells(recorded, "Evaluation", group)
    stated([100 * column(run, "eval/toy/mean@32")[-1] for run in runs], evaluation["toy mean@32 final"])
    stated([100 * max(column(run, "eval/toy/mean@32")) for run in runs], evaluation["toy mean@32 best"])
    for side, word in (("up", "upper"), ("down", "lower")):
        clipped = cells(recorded, f"Clipped at the {word}", group)
        assert list(clipped)[3:] == ["all", "p<0.01", "p<0.2", "p<0.4", "p<0.6", "p<0.8", "p<=1"]
        for name in list(clipped)[4:]:
            stated([100 * fmean(column(run, f"clip/{side}/{name}")) for run in runs], clipped[name])


def test_differences_are_paired_over_seeds(recorded: str, invented: dict[str, list[Path]]) -> None:
    block = recorded.split("Difference from 'fixed'", 1)[1].split("\n\n")[1]
    (entropy,) = [line for line in block.splitlines() if "entropy end" in line]
    _, group, _, pairs, difference, interval, p, verdict, _ = [cell.strip() for cell in entropy.split("|")]
    ends = [[fmean(column(run, "train/entropy")[-2:]) for run in runs] for runs in invented.values()]
    paired = [b - f for f, b in zip(*ends, strict=True)]
    assert (group, pairs, verdict) == ("band", "5", "higher")
    assert float(difference) == pytest.approx(fmean(paired), abs=6e-4)
    half = 2.77645 * stdev(paired) / 5**0.5
    bounds = (fmean(paired) - half, fmean(paired) + half)
    assert tuple(map(float, interval.split(" .. "))) == pytest.approx(bounds, abs=6e-4)
    assert float(p) == pytest.approx(paired_p(paired), rel=0.05)


def test_noise_is_called_noise(tmp_path: Path) -> None:
    """Six seeds whose differences have both signs are within noise; the same with a large shift are not."""
    for shift, verdict in ((0.0, "not significant"), (0.5, "higher")):
        runs = []
        for seed, wobble in enumerate([0.02, -0.03, 0.01, -0.02, 0.03, -0.01]):
            for rule, reward in (("fixed", 0.4), ("band", 0.4 + shift + wobble)):
                rows = [{"step": s, "reward/mean": reward, "train/entropy": 1.0} for s in (1, 2)]
                runs.append(write_run(tmp_path / f"{shift}{rule}{seed}", rows, rule=rule, seed=seed))
        line = next(line for line in compare(runs, None).splitlines() if "reward AUC" in line and "| 6 " in line)
        assert line.split("|")[7].strip() == verdict


def test_pairs_are_compared_at_the_steps_both_have(tmp_path: Path) -> None:
    """A long run that only got better after the other stopped is no better at equal steps."""
    short = [{"step": s, "reward/mean": 0.1, "eval/t/mean@2": 0.1} for s in (1, 2)]
    long = short + [{"step": s, "reward/mean": 0.9, "eval/t/mean@2": 0.9} for s in (3, 4)]
    runs = [write_run(tmp_path / f"a{s}", short, rule="fixed", seed=s, max_steps=4) for s in range(2)]
    runs += [write_run(tmp_path / f"b{s}", long, rule="band", seed=s, max_steps=4) for s in range(2)]
    text = compare(runs, None)
    assert cells(text, "Evaluation", "band")["t mean@2 final"] == "90.0 ± 0.0"
    backwards = compare(runs[::-1], None)
    assert backwards.count("+0.00 .. +0.00") == 1 and "Difference from 'band'" in backwards
    assert text.count("+0.00 .. +0.00") == 1 and "+0.000 .. +0.000" in text
    assert "a0: at step 2 of 4: stopped early or still running" in text
    assert "runs reached different steps" in text


def test_intervals_and_p_values_are_students() -> None:
    """Against the tables of Student's t: 0.975 quantiles for 1, 2, 4 and 9 degrees of freedom."""
    for t, df in ((12.7062, 1), (4.30265, 2), (2.77645, 4), (2.26216, 9)):
        assert two_sided_p(t, df) == pytest.approx(0.05, abs=1e-5)
    values = [0.1, 0.5, -0.2, 0.9, 0.4]
    error = stdev(values) / 5**0.5
    low, high = paired_interval(values)
    assert (low, high) == pytest.approx((fmean(values) - 2.77645 * error, fmean(values) + 2.77645 * error), abs=1e-5)
    assert paired_p(values) == pytest.approx(two_sided_p(fmean(values) / error, 4))
    assert paired_p([0.0, 0.0]) == 1.0 and paired_p([0.5, 0.5]) == 0.0


def test_an_interval_and_its_test_agree() -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        values = list(generator.normal(0.8, 1.0, size=6))
        low, high = paired_interval(values)
        assert (paired_p(values) < 0.05) == (low > 0 or high < 0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_the_ranking_tests_every_pair_and_corrects_for_all(tmp_path: Path) -> None:
    """Three groups, six seeds: a is far above b and c, which differ by little, and in the same direction."""
    gaps = [0.02, 0.03, 0.01, 0.02, -0.004, 0.014]
    runs = []
    for rule in ("c", "b", "a"):
        for seed, gap in enumerate(gaps):
            score = {"a": 0.9, "b": 0.3 + gap, "c": 0.3}[rule] + 0.01 * seed
            rows = [{"step": s, "eval/t/mean@4": score} for s in (1, 2)]
            runs.append(write_run(tmp_path / f"{rule}{seed}", rows, rule=rule, seed=seed))
    assert 0.01 < paired_p(gaps) < 0.05 and 2 * paired_p(gaps) < 0.05
    text = compare(runs, None, metric="eval/t/mean@4").split("Ranking by", 1)[1]
    assert text.startswith(" final eval/t/mean@4, % (3 pairs of groups tested")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[1].splitlines()[2:]]
    assert [(line[0], line[2], line[4]) for line in lines] == [
        ("a", "92.5", "b, c"),
        ("b", "34", "c"),
        ("c", "32.5", "-"),
    ]
    few = [run for run in runs if not run.name.endswith(("4", "5"))]  # four seeds: no verdict
    assert "(0 pairs of groups tested" in compare(few, None, metric="eval/t/mean@4")
    with pytest.raises(ValueError, match="metric: no run has 'eval/t/mean@8'; for example eval/t/mean@4"):
        compare(runs, None, metric="eval/t/mean@8")


def test_the_ranking_uses_the_sign_of_the_tested_difference(tmp_path: Path) -> None:
    """Group a has the higher final value. At the last common step it is lower in every seed."""
    runs = []
    for seed in range(5):
        for rule, scores in (("a", (0.4, 0.6)), ("b", (0.5,))):
            rows = [{"step": s, "eval/t/mean@4": score + 0.01 * seed} for s, score in enumerate(scores, 1)]
            rows[0]["eval/t/mean@4"] += 0.001 * (seed % 3) * (rule == "a")
            runs.append(write_run(tmp_path / f"{rule}{seed}", rows, rule=rule, seed=seed))
    lines = compare(runs, None, metric="eval/t/mean@4").split("Ranking by", 1)[1].split("\n\n")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(line[0], line[2], line[4]) for line in cells] == [("a", "62", "-"), ("b", "52", "-")]


@pytest.mark.parametrize(("length", "end"), [(10, 1.0), (12, 1.0), (25, 0.5), (26, 1 / 3)])
def test_the_end_of_a_curve_includes_its_last_step(length: int, end: float) -> None:
    curve = np.array([0.0] * (length - 1) + [1.0])
    assert mean_from(0.9)((np.arange(length), curve)) == pytest.approx(end)


def test_labels_are_short_and_unique() -> None:
    base = {"run_name": "x", "rule": "band", "rule_args": {"divergence": "kl"}, "lr": 1e-6, "model": "/m/Qwen"}
    fixed = {**base, "rule": "fixed"}
    configs = [
        {**fixed, "rule_args": {"low": 0.2, "high": 0.2}},
        {**fixed, "rule_args": {"low": 0.2, "high": 0.28}},
        base,
        {**base, "rule_args": {"divergence": "tv"}},
        {**base, "rule": "bench/mine.py:early", "rule_args": {}},
    ]
    labels = ["fixed high=0.2", "fixed high=0.28", "band divergence=kl", "band divergence=tv", "mine.py:early"]
    assert label_configs(configs) == labels
    sweep = [{**base, "rule_args": {"delta": delta}} for delta in (0.02, 0.05, 0.1)]
    assert label_configs(sweep) == ["delta=0.02", "delta=0.05", "delta=0.1"]
    labels = ["divergence=kl lr=1e-06", "lr=1e-05", "divergence=unset"]
    assert label_configs([base, {**base, "lr": 1e-5}, {**base, "rule_args": {}}]) == labels
    assert label_configs([base, {k: v for k, v in base.items() if k != "lr"}]) == ["lr=1e-06", "lr=unset"]
    assert label_configs([base, {**base, "model": "/m/Llama/"}]) == ["model=Qwen", "model=Llama"]
    assert label_configs([base, {**base, "model": "/n/Qwen"}]) == ["model=/m/Qwen", "model=/n/Qwen"]


def test_every_config_key_but_the_repeats_makes_a_group(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward/mean": 0.5}]
    configs = [{"seed": 0, "lr": 1e-4}, {"seed": 1, "lr": 1e-4, "output_dir": "elsewhere"}, {"seed": 0, "lr": 3e-4}]
    runs = [load_record(write_run(tmp_path / f"r{i}", rows, **config)) for i, config in enumerate(configs)]
    assert [(g.label, len(g.runs)) for g in group_runs(runs)] == [("lr=0.0001", 2), ("lr=0.0003", 1)]


@pytest.mark.promise("malformed lines in labelled data, stored responses, metrics and samples")
def test_odd_runs_are_noted_and_kept(tmp_path: Path) -> None:
    """Crashed, half-written, without config or eval, other eval sets, NaN, a seed twice, empty: all in the table."""
    good = [{"step": s, "reward/mean": 0.5, "train/entropy": 1.0} for s in range(1, 5)]
    with_eval = [{"step": 0, "eval/aime24/mean@8": 0.25, "eval/aime24/mean@8_stderr": 0.08}, *good]
    runs = [
        write_run(tmp_path / "full", with_eval, rule="band", seed=0),
        write_run(tmp_path / "torn", good, tail='{"step": 5, "reward/me', rule="fixed", seed=0, max_steps=9),
        write_run(tmp_path / "other", [{"step": 0, "eval/amc23/mean@8": 0.5}, *good], rule="none", seed=0),
        write_run(tmp_path / "bare", good),
        write_run(tmp_path / "nan", [*good, {"step": 5, "reward/mean": float("nan")}], rule="dcpo", seed=0),
        write_run(tmp_path / "again", good, rule="dcpo", seed=0),
        write_run(
            tmp_path / "broken",
            good[:2],
            tail="\0\0garbage\n[1]\n" + "1" * 5000 + "\n" + json.dumps(good[2]) + "\n",
            rule="x",
            seed=0,
        ),
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    (tmp_path / "badconfig").mkdir()
    (tmp_path / "badconfig" / "config.yaml").write_text("a: [")
    text = compare([*runs, tmp_path / "empty", tmp_path / "badconfig"], tmp_path / "out" / "figure.png")
    for group in ("band", "fixed max_steps=9", "none", "bare", "dcpo", "x", "empty", "badconfig"):
        assert cells(text, "Training", group)
    for note in (
        "torn: metrics.jsonl: no JSON object with step in line 5; left out",
        "torn: at step 4 of 9: stopped early or still running",
        "torn: no evaluation on aime24 mean@8, amc23 mean@8",
        "other: no evaluation on aime24 mean@8",
        "full: no evaluation on amc23 mean@8",
        f"bare: {tmp_path}/bare/config.yaml cannot be read",
        "nan: not a finite number: reward/mean from step 5",
        "broken: metrics.jsonl: no JSON object with step in line 3, 4, 5; left out",
        "empty: nothing logged yet",
        f"badconfig: {tmp_path}/badconfig/config.yaml cannot be read",
        "dcpo: 2 runs with seed 0; the first is used for pairs",
        "bare: one seed",
    ):
        assert note in text, note
    assert cells(text, "Evaluation", "band")["aime24 mean@8 final"] == "25.0 ± 8.0†"
    assert cells(text, "Evaluation", "none")["aime24 mean@8 final"] == "-"
    assert cells(text, "Training", "empty")["reward AUC"] == "-"
    assert cells(text, "Training", "x")["steps"] == "3"
    assert load_record(tmp_path / "nan").series("reward/mean")[0].tolist() == [1, 2, 3, 4]
    assert (tmp_path / "out" / "figure.md").read_text() == text + "\n"


def test_a_null_is_not_a_number_and_in_nobodys_way(tmp_path: Path) -> None:
    """Null in one step of every metric, a metric that is null throughout, one that only the other run has."""
    keys = ("reward/mean", "train/entropy", "eval/t/mean@2", "eval/t/mean@2_stderr", "clip/up", "clip/up/p<=1")
    rows = [{"step": s, "loss": None} | {key: None if s == 2 else 0.1 * s for key in keys} for s in (1, 2, 3)]
    runs = [write_run(tmp_path / rule, rows, rule=rule, seed=0) for rule in ("fixed", "band")]
    runs.append(write_run(tmp_path / "none", [{"step": 1, "reward/mean": None}], rule="none", seed=0))
    record = load_record(runs[0])
    assert np.isnan(record.value("train/entropy", 2)) and np.isnan(record.value("no/such", 1))
    assert record.series("train/entropy")[0].tolist() == [1, 3] and len(record.series("loss")[0]) == 0
    text = compare(runs, tmp_path / "f.png")
    assert cells(text, "Training", "band")["reward AUC"] == "0.200" and cells(text, "Training", "none")["steps"] == "1"
    assert cells(text, "Evaluation", "fixed")["t mean@2 final"] == "30 ± 30†"
    assert "fixed: not a finite number: clip/up from step 2" in text
    assert (tmp_path / "f_clip.png").exists() and not (tmp_path / "f_loss.png").exists()
    assert len(plot_run(runs[0])) == 1


def test_one_seed_is_judged_by_its_problems_alone(tmp_path: Path) -> None:
    """Without per-problem scores the variances of both runs are added; with them, differences are paired by problem."""

    def row(value: float) -> list[dict]:
        return [{"step": 1, "eval/aime24/mean@32": value, "eval/aime24/mean@32_stderr": 0.04}]

    runs = [
        write_run(tmp_path / "a", row(0.2), rule="fixed", seed=0),
        write_run(tmp_path / "b", row(0.24), rule="band", seed=0),
    ]
    text = compare(runs, None)
    # 4 points with a standard error of 4 * sqrt(2): 4 -+ 1.96 * 5.657.
    assert "+4.00" in text and "-7.09 .. +15.09" in text
    assert "within the noise of the problems (assumes independent problems); one seed" in text
    scores = [{"p0": 0.0, "p1": 0.2, "p2": 0.4}, {"p0": 0.03, "p1": 0.24, "p2": 0.45}]
    for run, of_problems in zip(runs, scores, strict=True):
        (run / "evals").mkdir()
        (run / "evals" / "step_000001.json").write_text(json.dumps({"aime24": of_problems}))
    # Differences 3, 4, 5 points: standard error 1 / sqrt(3), 4 -+ 1.96 * 0.577.
    text = compare(runs, None)
    assert "+2.87 .. +5.13" in text and "beyond the noise of the problems (paired); one seed" in text
    (runs[0] / "evals" / "step_000001.json").write_text(json.dumps({"aime24": {"p0": 0.0, "p9": 0.3}}))
    assert "assumes independent problems" in compare(runs, None)  # other problems


def test_one_seed_shows_the_error_of_the_evaluation_it_shows(tmp_path: Path) -> None:
    evals = ((1, 0.2, 0.03), (2, 0.3, 0.04), (3, 0.1, 0.05))
    rows = [{"step": s, "eval/t/mean@4": v, "eval/t/mean@4_stderr": e} for s, v, e in evals]
    evaluation = cells(compare([write_run(tmp_path / "a", rows, rule="band")], None), "Evaluation", "band")
    assert (evaluation["t mean@4 final"], evaluation["t mean@4 best"]) == ("10.0 ± 5.0†", "30.0 ± 4.0†")


def test_four_seeds_are_too_few_to_call(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{rule}{seed}", [{"step": 1, "reward/mean": value}], rule=rule, seed=seed)
        for seed in range(4)
        for rule, value in (("fixed", 0.1 + 0.01 * seed), ("band", 0.9))
    ]
    assert "same sign in 4 of 4 seeds; no verdict below 5 seeds" in compare(runs, None)


@pytest.mark.slow
def test_figures_of_each_family(tmp_path: Path, invented: dict[str, list[Path]]) -> None:
    compare([*invented["fixed"][:2], *invented["band"][:2]], tmp_path / "fig.png")
    families = {"", "_entropy", "_reward", "_clip", "_eval", "_response", "_optim", "_speed"}
    assert {p.stem.removeprefix("fig") for p in tmp_path.glob("*.png")} == families
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))


def test_plot_run_draws_entropy_and_what_it_led_to(tmp_path: Path) -> None:
    rows = [{"step": s, "train/entropy": 1 / s, "mine/new": s, "eval/aime24/mean@4": 0.1 * s} for s in (1, 2, 3)]
    run = write_run(tmp_path / "run", rows, tail='{"step": 4, "tr')
    (written,) = plot_run(run)
    assert written == run / "plots" / "entropy.png" and written.stat().st_size > 5000
    width, height = struct.unpack(">II", written.read_bytes()[16:24])
    assert width / height > 2  # two panels side by side, entropy and mean@4, and no third for mine/new
    assert width / height < 3
    nothing = write_run(tmp_path / "nothing", [{"step": 1, "train/entropy": None, "reward/mean": 0.5}])
    assert plot_run(nothing) == []


def test_metric_names_find_their_axis() -> None:
    assert describe("eval/aime24/pass@32") == ("eval", "aime24", "% of problems", "pass@32")
    assert describe("clip/down/p<=1")[3] == "p<=1"
    assert describe("foo/bar") == ("foo", "foo/bar", "", "")
    assert sort_keys(["clip/up/p<=1", "foo/x", "clip/up/p<0.9", "clip/up", "train/entropy"]) == [
        "train/entropy",
        "clip/up",
        "clip/up/p<0.9",
        "clip/up/p<=1",
        "foo/x",
    ]
    assert all(axis.unit for axes in FIGURES.values() for axis in axes)


def test_the_band_is_the_range_over_seeds_up_to_where_the_first_ends() -> None:
    """Three seeds; the second has no value at step 2 (an empty bin), the third ends at step 3."""
    seeds = [([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]), ([1, 3, 4], [3.0, 5.0, 9.0]), ([1, 2, 3], [2.0, 4.0, 1.0])]
    curve = Curve("x", tuple((np.array(steps), np.array(values)) for steps, values in seeds), None)
    steps, mean, low, high = spread(curve)
    assert (steps.tolist(), mean.tolist()) == ([1, 2, 3], [2.0, 3.0, 3.0])
    assert (low.tolist(), high.tolist()) == ([1.0, 2.0, 1.0], [3.0, 4.0, 5.0])
    error = (np.array([1, 3]), np.array([0.5, 0.25]))
    _, _, low, high = spread(Curve("x", (curve.seeds[1],), error))
    assert (low.tolist(), high.tolist()) == ([2.5, 4.75, 9.0], [3.5, 5.25, 9.0])


def test_no_two_of_32_lines_look_alike() -> None:
    assert len({line_style(number) for number in range(32)}) == 32


def test_matplotlib_is_not_imported_before_something_is_drawn() -> None:
    code = "import sys, eval.compare; assert not {'matplotlib', 'torch', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    rows = [{"step": step, "train/entropy": 1 / step} for step in (1, 2)]
    runs = [str(write_run(tmp_path / "runs" / rule, rows, rule=rule)) for rule in ("fixed", "band")]
    command = [sys.executable, "-m", "eval.compare", *runs, "--out", str(tmp_path / "f.pdf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "| band " in done.stdout
    assert f"Tables and figures: {tmp_path}/f*" in done.stdout
    assert {path.name for path in tmp_path.glob("f*")} == {"f.pdf", "f_entropy.pdf", "f.md"}


def test_a_run_without_curves_draws_nothing(tmp_path: Path) -> None:
    main([str(write_run(tmp_path / "new", [], rule="band")), "--out", str(tmp_path / "out" / "f.png")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["f.md"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "band", [{"step": 1}])
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for argv, told in (
        ([], "the following arguments are required: runs"),
        ([run, "--til", "3"], "unrecognized arguments: --til 3"),
        ([run, "--metric", "eval/x"], "metric: no run has 'eval/x'; for example none yet"),
        (["no/such/run"], "no/such/run is not a run folder; name one, runs/NAME"),
        ([run.with_name("bnad")], f"did you mean {run}?"),
        ([run.parent], f"did you mean {run}?"),
        ([run / "checkpoints" / "step_000001"], f"did you mean {run}?"),
        ([tmp_path / "other"], "is not a run folder; name one, runs/NAME"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in argv])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m eval.compare ")
