"""What goes wrong in a run, made to go wrong: numbers, disks, checkpoint files, workers, engine, network, models."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launching import metrics
from safetensors.torch import load_file, save_file

import train
from bench.chaos import SMALL, Trial, difference, left_behind, rows
from trainer.resume import load_state

pytestmark = pytest.mark.slow
FILE_LIMIT_BYTES = 200_000  # below the size of the toy model's weights
GRADER = """
import time
def grade(completion, gold):
    time.sleep(0.002)
    return completion.rpartition("{")[2].partition("}")[0] == gold
"""


def argv(model: str, run: Path, **overrides: object) -> list[str]:
    keys = {
        "model": model,
        "output_dir": run.parent,
        "run_name": run.name,
        "engine": "hf",
        **SMALL,
        "eval_every": 2,
        **overrides,
    }
    return ["--config", "demo_band", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def error_of(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> str:
    """The one line with which `train.py` ends."""
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    assert stopped.value.code == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def poison(folder: Path, one_in: int) -> str:
    """A grader whose numbers for one problem in `one_in` are finite in double precision and infinite in single."""
    path = folder / f"poison_{one_in}.py"
    path.write_text(
        "from zlib import crc32\n"
        "def grade(completion, problem):\n"
        "    number = crc32(completion.encode())\n"
        f"    spoilt = crc32(problem['problem'].encode()) % {one_in} == 0\n"
        "    return 1e39 * (1 + number % 97) if spoilt else float(number % 2)\n"
    )
    return f"{path}:grade"


ONE_UPDATE = {"minibatches": 1, "eval_every": 0, "advantage": "group_mean", "temperature": 2}  # hot: groups differ


# ---- numbers ----


def test_an_update_without_a_finite_gradient_is_skipped_and_counted(toy_model: str, tmp_path: Path):
    run = tmp_path / "run"
    keys = {"save_every": 1, "keep_last": 9, "prompts_per_step": 4, **ONE_UPDATE}
    assert train.main(argv(toy_model, run, reward=poison(tmp_path, 12), **keys)) == 0
    skipped = [row["optim/skipped"] for row in metrics(run)]
    assert 0 < sum(skipped) < len(skipped)  # some updates were poisoned, some were not
    saved = sorted((run / "checkpoints").iterdir())
    in_a_row = [load_state(path, 0, 1).skipped_in_a_row for path in saved]
    assert all(
        now == (before + 1 if count else 0)
        for before, now, count in zip([0, *in_a_row[:-1]], in_a_row, skipped, strict=True)
    )
    weights = [load_file(path / "policy" / "model.safetensors") for path in saved]
    for before, after, count in zip(weights[:-1], weights[1:], skipped[1:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before) == (count == 1)
        assert all(tensor.isfinite().all() for tensor in after.values())


def test_too_many_in_a_row_stop_the_run_and_their_prompts_are_kept(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In a row over a resumption, too."""
    run, keys = tmp_path / "run", {"reward": poison(tmp_path, 1), **ONE_UPDATE}
    assert train.main(argv(toy_model, run, max_steps=2, **keys)) == 0
    assert load_state(run / "checkpoints" / "step_000002", 0, 1).skipped_in_a_row == 2
    line = error_of(capsys, argv(toy_model, run, **keys), 1)
    kept = run / "not_finite_step_000003_rank_0.jsonl"
    assert "step 3: 3 updates in a row had no finite gradient" in line and "lower lr" in line and str(kept) in line
    texts = [json.loads(row)["text"] for row in kept.read_text().splitlines()]
    assert len(texts) == 256 and all("=" in text for text in texts)  # the sequences of the update


# ---- disk and files ----


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond FILE_LIMIT_BYTES."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damage(path: Path, how: str) -> None:
    """Make a file altered (one bit of it) or emptied; trainer/test_checkpoint.py has the other ways."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if how == "altered" else b""
    )


@pytest.fixture(scope="module")
def four_steps(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(argv(toy_model, run, max_steps=4)) == 0
    return run


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_stays(
    four_steps: Path, toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert train.main(argv(toy_model, run, max_steps=2)) == 0
    with small_files():
        line = error_of(capsys, argv(toy_model, run, max_steps=4), 1)
    assert "step 4: checkpoint not saved: the disk is full" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    assert train.main(argv(toy_model, run, max_steps=4)) == 0
    assert difference(run, four_steps, step=4) == ""


@pytest.mark.parametrize(("file", "how"), [("optimizer.pt", "altered"), ("manifest.json", "emptied")])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    four_steps: Path, toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, how: str
):
    run = tmp_path / "run"
    shutil.copytree(four_steps, run)
    damage(run / "checkpoints" / "step_000004" / file, how)
    assert train.main(argv(toy_model, run, max_steps=4)) == 0
    said = capsys.readouterr().out
    assert "warning: checkpoint step_000004 is damaged and skipped" in said and Path(file).name in said
    assert "resuming" in said and "after step 2" in said
    assert (run / "checkpoints" / "damaged_step_000004").is_dir()
    assert difference(run, four_steps, step=4) == ""


def test_without_a_good_checkpoint_the_run_is_not_begun_anew(
    four_steps: Path, toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(four_steps, run)
    for step in (2, 4):
        damage(run / "checkpoints" / f"step_{step:06d}" / "optimizer.pt", "emptied")
    with pytest.raises(SystemExit) as stopped:
        train.main(argv(toy_model, run))
    assert stopped.value.code == 2
    assert "has no undamaged checkpoint" in capsys.readouterr().err
    assert rows(run) == rows(four_steps)


@pytest.mark.promise("checkpoints on a disk that is not mounted at one launch")
def test_checkpoints_that_are_not_there_cost_no_line_of_metrics(
    four_steps: Path, toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As when `checkpoints` is on a disk that is not mounted at one launch: empty, or a link to nowhere."""
    run, words = tmp_path / "run", argv(toy_model, tmp_path / "run", max_steps=6)
    shutil.copytree(four_steps, run)
    (run / "checkpoints").rename(tmp_path / "unmounted")
    line = error_of(capsys, words, 2)
    assert "has a checkpoint of step 4" in line and "is its disk mounted?" in line and "choose another run_name" in line
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(tmp_path / "mount")
    assert "is a link to" in error_of(capsys, words, 2)
    assert rows(run) == rows(four_steps)
    (tmp_path / "unmounted").rename(tmp_path / "mount")
    assert train.main(argv(toy_model, run, max_steps=4)) == 0
    assert difference(run, four_steps, step=4) == ""


@pytest.mark.promise("rows of metrics.jsonl missing, duplicated, truncated or altered at a resume")
def test_lines_of_metrics_that_were_lost_are_back_after_a_resume(
    four_steps: Path, toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(four_steps, run)
    shutil.rmtree(run / "checkpoints" / "step_000004")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + lines[2] * 2 + lines[3])
    assert train.main(argv(toy_model, run, max_steps=4)) == 0
    assert "metrics.jsonl does not match the checkpoint (missing, altered or doubled: step 1, 2)" in (
        capsys.readouterr().out
    )
    assert difference(run, four_steps, step=4) == ""


@pytest.mark.promise("the run's folder deleted, moved or taken over while it trains")
def test_a_run_whose_folder_is_deleted_while_it_trains_ends_with_one_line(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, reward = tmp_path / "run", tmp_path / "reward.py"
    reward.write_text(
        "import shutil\n"
        "def grade(completion, gold):\n"
        f"    shutil.rmtree({str(run)!r}, ignore_errors=True)\n"
        "    return gold in completion\n"
    )
    line = error_of(capsys, argv(toy_model, run, reward=f"{reward}:grade", eval_every=0, max_steps=1), 1)
    assert f"{run} no longer belongs to this run: deleted, moved or unmounted" in line


def test_a_run_that_never_saved_starts_from_step_0(four_steps: Path, toy_model: str, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(four_steps, run)
    shutil.rmtree(run / "checkpoints")
    (run / ".newest_checkpoint").unlink()
    assert train.main(argv(toy_model, run, max_steps=4)) == 0
    assert "no checkpoint yet, starting from step 0" in capsys.readouterr().out
    assert difference(run, four_steps, step=4) == ""


@pytest.mark.promise("changed files behind unchanged settings, end to end")
def test_other_content_behind_the_same_settings_is_refused(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reward, problems = tmp_path / "reward.py", tmp_path / "eval.jsonl"
    reward.write_text("def grade(completion, gold):\n    return gold in completion\n")
    problems.write_text('{"problem": "1+1=", "gold": "2"}\n')
    words = argv(toy_model, tmp_path / "run", reward=f"{reward}:grade", eval_data=problems, max_steps=1)
    assert train.main(words) == 0
    problems.write_text('{"problem": "1+2=", "gold": "3"}\n')
    reward.write_text("def grade(completion, gold):\n    return gold not in completion\n")
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "error: run_name: 'run' cannot be resumed" in told
    assert "eval_data eval: problems, gold answers" in told and "reward: file of the function changed" in told


# ---- strangers' code ----


def test_code_that_comes_with_a_model_is_not_run(toy_model: str, tmp_path: Path):
    model, proof = tmp_path / "model", tmp_path / "it_ran"
    shutil.copytree(toy_model, model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "of_a_stranger"
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(proof)!r}, 'w')\n")
    with pytest.raises((SystemExit, ValueError)):
        train.main(argv(str(model), tmp_path / "run"))
    assert not proof.exists() and not (tmp_path / "run").exists()


def test_a_grader_that_cannot_be_loaded_is_a_mistake_told_before_the_model_is_loaded(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.py").write_text("def grade(completion, gold:\n")
    line = error_of(capsys, argv(toy_model, tmp_path / "run", reward=f"{tmp_path / 'broken.py'}:grade"), 2)
    assert "broken.py:grade" in line and "SyntaxError" in line and not (tmp_path / "run").exists()


# ---- processes and network ----


def test_killed_grading_processes_change_no_grade(toy_model: str, tmp_path: Path):
    """At most six kills: on a loaded machine no worker might be up before the next kill."""
    (tmp_path / "grader.py").write_text(GRADER)
    keys: dict[str, object] = {"reward": f"{tmp_path / 'grader.py'}:grade", "eval_every": 3}
    assert train.main(argv(toy_model, tmp_path / "alone", **keys)) == 0
    trial = Trial(tmp_path / "killed", "hf", keys)
    trial.launch()
    trial.wait_until(lambda: trial.steps() > 0)
    killed = 0
    while killed < 6 and trial.wait_until(lambda: True, 0.5):
        for pid in trial.children("rewards.pool.worker"):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    assert killed and trial.code() == 0, trial.console()[-3000:]
    assert difference(trial.folder, tmp_path / "alone") == ""
    assert left_behind(str(trial.folder)) == []


def test_a_wandb_that_is_not_there_stops_nothing(toy_model: str, tmp_path: Path):
    trial = Trial(tmp_path / "run", "hf", {"max_steps": 2, "eval_every": 0, "wandb": "auto"})
    server = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    trial.launch(environment=server)
    assert trial.code() == 0 and "wandb sync" in trial.console(), trial.console()[-3000:]
    assert [row["step"] for row in metrics(trial.folder)] == [1, 2]
    assert left_behind(str(trial.folder)) == []


@pytest.mark.promise("a learning rate that breaks sampling")
def test_weights_that_are_no_numbers_end_the_run_with_one_line(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The learning rate throws them so far that the next step cannot sample, nor could it if the run was resumed."""
    line = error_of(capsys, argv(toy_model, tmp_path / "run", lr="1e30", eval_every=0, save_every=1), 1)
    assert line == "error: the policy's logits are not finite: lower lr, or go back to an earlier checkpoint"


@pytest.mark.promise("a start model with NaN or infinite weights")
def test_a_model_whose_weights_are_no_numbers_is_a_mistake_told_before_training(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, name = shutil.copytree(toy_model, tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    weights = load_file(model / "model.safetensors")
    weights[name][3, 5] = torch.nan
    weights["model.norm.weight"] *= 1e38  # its sum is infinite, none of its numbers is
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = error_of(capsys, argv(str(model), tmp_path / "run"), 2)
    assert f"model: {model}: 1 weights hold numbers that are not finite (NaN or infinite), {name} among them" in line
    assert metrics(tmp_path / "run") == []


@pytest.mark.promise("a learning rate that makes weights infinite")
def test_weights_that_are_infinite_are_named_as_such(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = error_of(capsys, argv(toy_model, tmp_path / "run", lr="1e38", **ONE_UPDATE), 1)
    assert "the policy's weights are not finite" in line and "lower lr" in line


@pytest.mark.promise("max_rollout_kl exceeded")
def test_an_engine_that_is_not_the_policy_ends_the_run_with_one_line(
    toy_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = error_of(capsys, argv(toy_model, tmp_path / "run", max_rollout_kl="1e-30", eval_every=0), 1)
    assert line.startswith("error: max_rollout_kl: step 1: KL(rollout, trainer) is ") and "above 1e-30" in line
    assert all(suspect in line for suspect in ("attention: sdpa", "precision: float32", "engine: hf"))
    assert metrics(tmp_path / "run") == [] and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_engine_that_dies_ends_the_run_with_its_error(toy_model: str, tmp_path: Path):
    """vLLM's core is shut down under the trainer's feet in the second step."""
    script = tmp_path / "with_accident.py"
    script.write_text(
        "import sys\n"
        "import train\n"
        "from trainer import rollout\n"
        "generate, calls = rollout.VllmEngine.generate, []\n"
        "def dying(engine, *words, **keys):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        engine.llm.llm_engine.engine_core.shutdown()\n"
        "    return generate(engine, *words, **keys)\n"
        "rollout.VllmEngine.generate = dying\n"
        "sys.exit(train.main(sys.argv[2:]))\n"
    )
    keys = {"eval_every": 0, "save_every": 1}
    trial = Trial(tmp_path / "run", "vllm", dict(keys), launcher=(sys.executable, str(script)))
    trial.launch(environment={"PYTHONPATH": str(Path(train.__file__).parent)})
    assert trial.code() == 1
    assert left_behind(str(trial.folder)) == []
    assert [path.name for path in trial.checkpoints()] == ["step_000001"]
    (line,) = [line for line in trial.console().splitlines() if line.startswith("error: ")]
    assert "the engine failed while sampling" in line and "the same command resumes the run" in line
    assert "Traceback" not in trial.console()
    assert "engine.step()" in (trial.folder / "engine_error_rank_0.txt").read_text()
