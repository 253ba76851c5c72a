"""eval.sweep: planning and validation without runs; resuming and failures with real runs of the synthetic task."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, metrics, without_clock

import train
from eval import sweep
from eval.sweep import cells, compare_finished, main, options, plan

SMALL = {
    **{"engine": "hf", "wandb": "disabled", "max_steps": 2, "eval_every": 2, "eval_samples": 2, "save_every": 1},
    **{"prompts_per_step": 8, "samples_per_prompt": 4, "minibatches": 2, "epochs": 1, "lr": 1e-3},
    **{"verifier_workers": 1},
}


def write_grid(path: Path, model: object, **keys: Any) -> Path:
    """A grid of two rules and one seed; `keys` replace or add keys of the file, None removes one."""
    runs = {"grpo": {"rule": "fixed"}, "band": {"rule": "band", "rule_args": {"delta": 0.1}}}
    grid = {"base": "demo_band.yaml", "overrides": SMALL | {"model": str(model)}, "runs": runs, "seeds": [0]} | keys
    path.write_text(yaml.safe_dump({k: v for k, v in grid.items() if v is not None}, sort_keys=False))
    return path


def sweep_process(grid: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "eval.sweep", str(grid), "--out", str(out), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---- planning ----


def test_later_layers_override_and_a_rule_drops_earlier_arguments() -> None:
    overrides = {"lr": "1e-3", "rule": "band", "rule_args": {"delta": "0.1", "divergence": "tv"}}
    assert options(overrides, {"lr": "1e-4"}, {"rule_args.delta": "0.2"}) == {
        **{"lr": "1e-4", "rule": "band", "rule_args.delta": "0.2", "rule_args.divergence": "tv"}
    }
    assert options(overrides, {"rule": "fixed", "rule_args": {"low": "0.3"}}) == {
        **{"lr": "1e-3", "rule": "fixed", "rule_args.low": "0.3"}
    }
    assert options({"adam_betas": ["0.9", "0.99"]}) == {"adam_betas": "[0.9, 0.99]"}


def test_values_of_a_grid_arrive_as_they_were_written(tmp_path: Path, tiny_model: Path) -> None:
    stops, nested = ["\n\nProblem", "a, b", "User:", "7"], {"compilation_config": {"level": 3}, "max_num_seqs": 8}
    axis = [{"delta": 0.03}, {"delta": 0.05}]
    runs = {"x": {"rule": "band", "stop": stops, "engine": "vllm", "vllm": nested}}
    grid = write_grid(tmp_path / "g.yaml", tiny_model, runs=runs, grid={"rule_args": axis})
    jobs, _ = plan(grid, tmp_path / "out", 1)
    assert [(job.cfg.stop, job.cfg.vllm, job.cfg.rule_args) for job in jobs] == [(stops, nested, each) for each in axis]


def test_runs_are_crossed_with_all_axes() -> None:
    grid = {
        "overrides": {},
        "runs": {"a": {"rule": "band"}, "b": ""},
        "grid": {"rule_args.delta": ["0.1", "0.2"], "lr": ["1", "2"]},
    }
    labels = [label for label, _ in cells(grid)]
    assert labels == [f"{run} delta={d} lr={lr}" for run in "ab" for d in ("0.1", "0.2") for lr in "12"]
    assert dict(cells(grid))["a delta=0.2 lr=1"] == {"rule": "band", "rule_args.delta": "0.2", "lr": "1"}
    assert [label for label, _ in cells({"overrides": {}, "runs": {}, "grid": {"lr": ["1"]}})] == ["lr=1"]


def test_the_plan_runs_seed_after_seed(tiny_model: Path, tmp_path: Path) -> None:
    jobs, metric = plan(write_grid(tmp_path / "g.yaml", tiny_model, seeds=[3, 1]), tmp_path / "out", 1)
    names = ["grpo_seed3", "band_seed3", "grpo_seed1", "band_seed1"]
    assert [job.folder.name for job in jobs] == names and metric == ""
    assert [(job.cfg.seed, job.cfg.rule, job.cfg.rule_args) for job in jobs[:2]] == [
        (3, "fixed", {}),
        (3, "band", {"delta": 0.1}),
    ]
    assert (jobs[0].cfg.run_name, jobs[0].cfg.output_dir, jobs[0].cfg.lr) == (names[0], str(tmp_path / "out"), 1e-3)
    assert "WORLD_SIZE" not in os.environ


RULE = {"x": {"rule": "bnad"}}
INVALID = [
    ({"sedes": [1]}, "sedes: is not a key; the keys are base, overrides"),
    ({"base": None}, "base: is missing"),
    ({"seeds": None}, "seeds: is missing"),
    ({"seeds": 3}, "seeds: is not a list [a, b] (got '3')"),
    ({"seeds": [1, 1]}, "g.yaml: grpo: two configurations have this name; rename one"),
    ({"seeds": [[1]]}, "seed: must be an integer"),
    ({"seeds": ["x"]}, "seed: must be an integer from 0"),
    ({"runs": {"grpo": "fixed"}}, "runs: grpo: is not a mapping {name: value} (got 'fixed')"),
    ({"grid": {"lr": 1e-3}}, "grid: lr: is not a list [a, b]"),
    ({"base": "demo_bnad.yaml"}, "g.yaml: grpo: command line: config: no such file (got 'demo_bnad.yaml')"),
    ({"runs": {"x": {"learning": 1}}}, "g.yaml: x: command line: learning: is not an option"),
    ({"runs": {"x": {"lr": -1}}}, "g.yaml: x: command line: lr: must be a number from 0 (got '-1')"),
    ({"runs": RULE}, "g.yaml: x: rule: 'bnad' is not known"),
    ({"runs": {"x": {"rule": "fixed", "rule_args": {"delta": 1}}}}, "'delta' is not a parameter of rule fixed"),
    ({"runs": {"x": {"model": "nothing"}}}, "model: nothing is not a folder that exists"),
    ({"runs": {"x": {"run_name": "mine"}}}, "run_name: is set twice"),
    ({"runs": {"a b": {}, "a_b": {}}}, "g.yaml: a_b: two configurations have this name; rename one"),
]


@pytest.mark.parametrize("keys, told", INVALID, ids=[told[:30] for _, told in INVALID])
def test_an_invalid_grid_is_one_line_before_any_run(
    keys: dict[str, Any], told: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path / "g.yaml", tiny_model, **keys)
    with pytest.raises(SystemExit, match="2"):
        main([str(grid), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
    assert not (tmp_path / "out").exists()


def test_all_problems_are_reported_at_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.yaml").write_text("base: [")
    runs = {"a": {"lr": -1, "rule": "bnad", "learning": 2}}
    grids = {tmp_path / "broken.yaml": 1, tmp_path / "nothing.yaml": 1}
    for grid, lines in {**grids, write_grid(tmp_path / "g.yaml", tiny_model, runs=runs, seeds=None): 1}.items():
        with pytest.raises(SystemExit, match="2"):
            main([str(grid)])
        assert len(capsys.readouterr().err.splitlines()) == lines
    with pytest.raises(SystemExit, match="2"):
        main([str(write_grid(tmp_path / "g.yaml", tiny_model, runs=runs))])
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_grids_of_the_benchmarks_compose(tiny_model: Path, tmp_path: Path) -> None:
    """Every grid of bench/grids is valid once its start model exists."""
    for grid in sorted((ROOT / "bench" / "grids").glob("*.yaml")):
        here = tmp_path / grid.name
        lines = [f"  model: {tiny_model}" if "  model: " in line else line for line in grid.read_text().splitlines()]
        here.write_text("\n".join(lines))
        jobs, metric = plan(here, tmp_path / "out", 1)
        assert len(jobs) >= 10 and metric


# ---- running ----


@pytest.mark.slow
def test_a_sweep_trains_resumes_and_reports_a_failure(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that fails is reported with its last lines; the others finish; the next call trains what is missing."""
    out = tmp_path / "out"
    broken = tmp_path / "broken_model"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    runs = {"broken": {"model": str(broken)}, "grpo": {"rule": "fixed"}}
    grid = write_grid(tmp_path / "g.yaml", tiny_model, runs=runs, metric="eval/toy_eval/mean@2")
    assert main([str(grid), "--out", str(out), "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert "2 runs, 0 finished" in said
    (failed,) = [line for line in said.splitlines() if "FAILED" in line]
    assert "broken_seed0: FAILED, exit code" in failed and str(out / "broken_seed0.log") in failed
    assert "SafetensorError" in said.split("FAILED")[1]
    assert "- broken_seed0: failed, left out" in said
    assert [row["step"] for row in metrics(out / "grpo_seed0")] == [0, 1, 2]
    # The broken model is repaired: only its run is trained.
    shutil.copy(tiny_model / "model.safetensors", broken)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    assert main([str(grid), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 1 finished" in said and "Ranking by final eval/toy_eval/mean@2" in said
    assert "Difference from 'broken'" in said
    assert {"comparison.md", "comparison.png", "comparison_entropy.png"} <= {path.name for path in out.iterdir()}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert main([str(grid), "--out", str(out), "--dry_run"]) == 0
    assert "broken_seed0: finished" in capsys.readouterr().out
    # Other keys for a finished run are refused.
    other = write_grid(tmp_path / "g.yaml", tiny_model, runs={"grpo": {"rule": "fixed", "lr": 2e-3}})
    with pytest.raises(SystemExit, match="2"):
        main([str(other), "--out", str(out)])
    assert "grpo_seed0: finished with other keys (lr 0.001 -> 0.002); use another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_to_the_same_run(tiny_model: Path, tmp_path: Path) -> None:
    """Stopped by SIGINT, then resumed to the end."""
    keys = {"max_steps": 8, "save_every": 2, "prompts_per_step": 32}
    grid, out = write_grid(tmp_path / "g.yaml", tiny_model, runs={"band": keys}), tmp_path / "out"
    process = sweep_process(grid, out)
    while process.poll() is None and not (out / "band_seed0" / "checkpoints" / "step_000002").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command resumes" in said
    assert 2 <= metrics(out / "band_seed0")[-1]["step"] < 8, "interrupted too late to show anything"
    assert main([str(grid), "--out", str(out)]) == 0
    (alone,), _ = plan(grid, tmp_path / "alone", 1)
    assert train.main(alone.argv) == 0
    assert without_clock(metrics(out / "band_seed0")) == without_clock(metrics(alone.folder))
    assert (out / "band_seed0.log").read_text().count("resuming") == 1


def test_each_slot_has_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 0)
    assert sweep.environment(1, 2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 4)
    assert sweep.environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert sweep.environment(0, 2)["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_nothing_finished_is_nothing_to_compare(tmp_path: Path) -> None:
    compare_finished([], [], "", tmp_path)
    assert not list(tmp_path.iterdir())
