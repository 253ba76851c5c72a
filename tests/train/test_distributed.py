"""One process or two, `ddp` or `fsdp2`: the same gradients, the same runs, and failures that are heard.

Tolerances, float32 on the CPU over gloo: gradients 1e-5 of the largest entry (measured: 8e-7), weights after two steps
of AdamW 2e-5 (they move by 4e-4; measured: 5e-6), log-probs of engine and trainer 1e-3 (measured: 1e-5).
"""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import (
    ACCELERATE,
    LIVELY,
    ROOT,
    TESTS,
    launch,
    metrics,
    small_run,
    together,
    weights,
    well,
    without_clock,
)
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import train
from trainer.rollout import NamedTensors, VllmEngine
from trainer.run import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="shows what several CPU processes do"),
]


# ---- the gradient ----


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gradients of one process and of two with ddp and fsdp2, of a tied and an untied model."""
    out = tmp_path_factory.mktemp("gradients")
    models = [out / "tied", out / "untied"]
    for path in models:
        tiny_model(tied=path.name == "tied").save_pretrained(path)
    well(launch(1, TESTS / "gradient_script.py", out, "none", *models))
    together(2, TESTS / "gradient_script.py", out, "ddp,fsdp2", *models, timeout_s=300)
    return out


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("cut", ["none_1", "ddp_2", "fsdp2_2"])
def test_one_and_two_processes_have_the_same_gradient(gradients: Path, cut: str, model: str):
    """For three aggregations, three budgets, ragged lengths; the loss and the micro-batches per rank as well."""
    one, found = torch.load(gradients / f"{model}_none_1.pt"), torch.load(gradients / f"{model}_{cut}.pt")
    assert len(one) == len(found) == 12
    for setting in found:
        expected = one[setting.split()[0] + " 4096"]  # a single micro-batch on a single process
        largest = max(value.abs().max() for name, value in expected.items() if name.endswith("weight"))
        for name in expected.keys() - {"counts", "spared"}:
            gap = (found[setting][name] - expected[name]).abs().max()
            assert gap < 1e-5 * largest, f"{setting}: {name}"
        counts = found[setting]["counts"].tolist()
        assert len(set(counts)) == 1 and len(counts) == int(cut[-1])
        assert (counts[0] == 1) == setting.endswith("4096")
        # Backward passes: half of the advantages are zero.
        assert (found[setting]["spared"] > 0) == (counts[0] > 2 and not setting.startswith("with_kl"))


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_sharded_policy_is_written_as_the_model_it_is(gradients: Path, model: str):
    found: Any = AutoModelForCausalLM.from_pretrained(gradients / f"{model}_fsdp2_2_policy", output_loading_info=True)
    reloaded, told = found
    assert not told["missing_keys"] and not told["unexpected_keys"]
    for name, value in tiny_model(tied=model == "tied").state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), name


# ---- whole runs with real engines ----


def assert_same_steps(one: Path, other: Path) -> None:
    rows, others = without_clock(metrics(one)), without_clock(metrics(other))
    assert len(rows) == len(others) >= 2
    for row, found in zip(rows, others, strict=True):
        assert row.keys() == found.keys()
        assert (
            found["rollout/logprob_diff_max"] < 1e-3 and row["rollout/logprob_diff_max"] < 1e-3
        )  # every token of the step
        for key, value in row.items():
            if not key.startswith("rollout/"):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    ours, theirs = weights(one, step), weights(other, step)
    assert ours.keys() == theirs.keys()
    assert max((ours[n] - theirs[n]).abs().max().item() for n in ours) < 2e-5


@pytest.fixture(scope="module")
def whole(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on one process, with checkpoints after two and four."""
    out = tmp_path_factory.mktemp("whole")
    assert train.main([*small_run(toy_model, out, "run", "none", 4), *LIVELY.split(), "--save_every", "2"]) == 0
    return out


def test_whole_runs_agree_and_go_on_with_another_number_of_processes(
    whole: Path, toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two steps with fsdp2 on two processes, then on with one; two steps on one process, then on with ddp on two."""
    lively = [*LIVELY.split(), "--save_every", "2"]
    cut, grown = tmp_path / "cut", tmp_path / "grown"
    told = together(2, "train.py", *small_run(toy_model, cut, "run", "fsdp2", 2), *lively)
    assert "sharding fsdp2" in told and "GiB per rank: weights" in told
    assert_same_weights(whole / "run", cut / "run", 2)
    fsdp2_policy = cut / "run" / "checkpoints" / "step_000002" / "policy"
    kept = shutil.copytree(fsdp2_policy, tmp_path / "policy")

    shutil.copytree(whole / "run", grown / "run")
    shutil.rmtree(grown / "run" / "checkpoints" / "step_000004")
    told = together(2, "train.py", *small_run(toy_model, grown, "run", "ddp", 4), *lively)
    assert "after step 2" in told
    assert_same_steps(whole / "run", grown / "run")
    assert_same_weights(whole / "run", grown / "run", 4)

    # One process reads the weights and the moments that two wrote.
    assert train.main([*small_run(toy_model, cut, "run", "none", 4), *lively]) == 0
    assert "after step 2" in capsys.readouterr().out
    assert_same_steps(whole / "run", cut / "run")
    assert_same_weights(whole / "run", cut / "run", 4)
    model = AutoModelForCausalLM.from_pretrained(kept)
    for name, value in load_file(kept / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)


def test_two_processes_that_share_an_engine_train_the_same_policy(whole: Path, toy_model: str, tmp_path: Path):
    """tensor_parallel 2, with the rollout policy as old policy: the numbers stay."""
    for rank in (0, 1):  # what earlier runs leave behind, on some processors
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").touch()
    other = ["--tensor_parallel", "2", "--old_policy", "rollout"]
    together(2, "train.py", *small_run(toy_model, tmp_path, "run", "fsdp2", 2), *LIVELY.split(), *other)
    assert_same_weights(whole / "run", tmp_path / "run", 2)
    for row, expected in zip(metrics(tmp_path / "run"), metrics(whole / "run"), strict=False):
        assert row["reward/mean"] == pytest.approx(expected["reward/mean"])
        assert 0 < row["rollout/logprob_diff_max"] < 1e-3  # measured on the first minibatch
        assert 0 < row["rollout/kl"] < 1e-6


def test_adapters_of_two_processes_are_those_of_one(toy_model: str, tmp_path: Path):
    """LoRA: two steps with fsdp2, the third with ddp; the same updates as on one process."""
    words = [*LIVELY.split(), "--lora_rank", "4", "--lr", "1e-3"]
    assert train.main([*small_run(toy_model, tmp_path / "one", "run", "none", 3), *words, "--save_every", "2"]) == 0
    together(2, "train.py", *small_run(toy_model, tmp_path / "two", "run", "fsdp2", 2), *words)
    assert_same_weights(tmp_path / "one" / "run", tmp_path / "two" / "run", 2)
    together(2, "train.py", *small_run(toy_model, tmp_path / "two", "run", "ddp", 3), *words)
    assert_same_steps(tmp_path / "one" / "run", tmp_path / "two" / "run")
    assert_same_weights(tmp_path / "one" / "run", tmp_path / "two" / "run", 3)


# ---- failures ----


def test_processes_that_were_not_obtained_stop_the_run(toy_model: str, tmp_path: Path):
    arguments = small_run(toy_model, tmp_path, "run", "ddp", 1)
    # Without ACCELERATE_USE_CPU both processes think they are alone.
    done = launch(2, "train.py", *arguments, ACCELERATE_USE_CPU="false")
    assert done.returncode != 0 and "the launcher started 2 processes, Accelerate sees 1" in done.stderr
    # And this starts a single one.
    line = [ACCELERATE, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    alone = small_run(toy_model, tmp_path, "run", "none", 1)
    done = subprocess.run(
        [*line, "--dynamo_backend", "no", "train.py", *alone],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode != 0 and "several processes were asked for, accelerate launch started one" in done.stderr


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_a_rank_that_dies_ends_the_run_within_a_minute(fault: str, toy_model: str, tmp_path: Path):
    arguments = [*small_run(toy_model, tmp_path, "run", "ddp", 2), "--engine", "hf"]
    done = launch(2, TESTS / "failing_script.py", fault, *arguments)
    ended = time.time()
    assert done.returncode != 0
    died = float(done.stdout.split("FAULT AT ")[1].split()[0])
    assert ended - died < 60
    if fault == "raise":
        assert "RuntimeError: the GPU fell off the bus" in done.stderr
        assert "the GPU fell off the bus" in done.stderr.split("Root Cause")[1]  # the launcher's last words as well
    else:
        assert "exitcode  : -9" in done.stderr  # first or second: the other rank may notice before the launcher does


def test_a_mistake_of_all_ranks_is_told_once(toy_model: str, tmp_path: Path):
    done = launch(2, "train.py", *small_run(toy_model, tmp_path, "run", "ddp", 1), "--lr", "-1")
    assert done.returncode != 0 and done.stderr.count("config error: ") == 1


def test_a_skipped_sync_is_caught_twice(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """By the checksum, whose error is passed over here, and by the log-probs of the sampled tokens."""
    sync, passed_over = Run.sync_weights, []

    def passing_over(run: Run) -> None:
        try:
            sync(run)
        except RuntimeError as error:
            passed_over.append(str(error))

    def throw_away(engine: VllmEngine, weights: NamedTensors) -> None:
        for _ in weights:  # gathering is collective
            pass

    monkeypatch.setattr(VllmEngine, "sync_weights", throw_away)
    monkeypatch.setattr(Run, "sync_weights", passing_over)
    words = [*small_run(toy_model, tmp_path, "run", "none", 3), *LIVELY.split(), "--max_rollout_kl", "1e-6"]
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    assert stopped.value.code == 1 and "after the sync the engine's weights differ from the trainer's" in passed_over[0]
    assert "engine and trainer do not compute the same policy" in capsys.readouterr().err


@pytest.mark.promise("an engine that fails to start")
def test_an_engine_that_cannot_start_names_the_setting(toy_model: str, tmp_path: Path):
    keys = [*small_run(toy_model, tmp_path, "run", "none", 1), "--vllm.kv_cache_memory_bytes", "1000"]
    done = launch(1, "train.py", *keys)
    assert done.returncode != 0
    assert "vLLM could not start" in done.stderr and "lower max_response_tokens or `vllm: {max_num_seqs:" in done.stderr
