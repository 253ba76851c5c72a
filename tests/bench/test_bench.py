"""The benchmarks run, and count what they say they count. Their figures are never tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from bench import step

TOY = ["--size", "1m", "--prompts", "4", "--samples", "2", "--tokens", "32", "--prompt_tokens", "20"]


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_at_toy_size(tmp_path: Path):
    figures = tmp_path / "figures.jsonl"
    line = ["-m", "bench.gpu", *TOY, "--mean", "16", "--variants", "attention=sdpa", "--out", str(figures)]
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    operator, rest = done.stdout.split("\nphases without")
    padded, whole = rest.split("\nwhole steps with vLLM")
    assert "band kl" in operator
    assert "real tokens 100.0%" in whole and "real tokens 100.0%" not in padded
    assert all("model TFLOP/s" in part for part in (padded, whole)) and "mean length 32.0" in whole
    rows = [json.loads(line) for line in figures.read_text().splitlines()]
    of_steps = {row["figure"]: row["value"] for row in rows if row["part"].startswith("whole steps")}
    assert of_steps["length_mean"] == 32 and 0 < of_steps["sync_weights_s"] < of_steps["sync_s"]
    assert len({row["part"] for row in rows}) == 3 and all("torch" in row["on"] for row in rows)


@pytest.mark.slow
def test_a_step_of_fixed_lengths_has_the_tokens_it_says(capsys: pytest.CaptureFixture[str]):
    step.main([*TOY, "--steps", "1", "--json", "--engine", "hf"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens_per_step"] == 4 * 2 * 32 and result["real_token_share"] == 1
    assert 0 < result["outside_share"] < 1
    assert 0 < result["backward_s"] < result["update_s"] and 0 < result["forward_s"]
    # Four updates of one prompt with two answers, which share it.
    shared, own = 20, 31
    flop = 6 * result["parameters"] * 4 * (shared + 2 * own)
    assert result["update_tflops"] * result["update_s"] * 1e12 == pytest.approx(flop, rel=0.05)
