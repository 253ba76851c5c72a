"""checkpoint.py: whole or absent under kills, full disks and damage; pruning; the folder of a resumed run."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from configs import load, to_yaml
from configs.schema import Config
from trainer import checkpoint
from trainer.checkpoint import CheckpointError, RunLock, begin, commit, damage, info, latest, prune, recover
from trainer.resume import refuse_changes


def save(root: Path, step: int, score: float | None = None, data: bytes = b"weights") -> Path:
    folder = begin(root, step)
    (folder / "policy").mkdir()
    (folder / "policy" / "model.bin").write_bytes(data * 100 + str(step).encode())
    (folder / "state.bin").write_bytes(b"state")
    return commit(root, step, {"score": score, "tokens_seen": step * 1000})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_has_its_files_and_what_was_said_about_it(tmp_path):
    path = save(tmp_path, 10, score=0.25)
    assert path == tmp_path / "step_000010" and names(tmp_path) == ["step_000010"]
    assert (path / "policy" / "model.bin").read_bytes() == b"weights" * 100 + b"10"
    assert info(path) == {"score": 0.25, "tokens_seen": 10_000} and checkpoint.step_of(path) == 10
    assert damage(path, checksums=True) == "" and latest(tmp_path) == (path, [])
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"policy/model.bin", "state.bin"}
    assert manifest["files"]["state.bin"]["bytes"] == 5


def test_there_is_nothing_to_resume_in_an_absent_or_empty_folder(tmp_path):
    assert latest(tmp_path / "none") == recover(tmp_path / "none") == (None, [])
    assert recover(tmp_path) == (None, [])


def test_steps_sort_by_number_not_by_name(tmp_path):
    save(tmp_path, 999_999)
    newest = save(tmp_path, 1_000_000)
    assert latest(tmp_path) == (newest, [])


def truncate(path: Path) -> None:
    os.truncate(path / "policy" / "model.bin", 50)


def flip_a_bit(path: Path) -> None:
    file = path / "policy" / "model.bin"
    data = bytearray(file.read_bytes())
    data[300] ^= 1
    file.write_bytes(data)


def change_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"tokens_seen": 20000', '"tokens_seen": 20001'))


DAMAGES = {
    "model.bin has 50 bytes, 702 expected": truncate,
    "the contents of policy/model.bin do not match": flip_a_bit,
    "state.bin: No such file": lambda path: (path / "state.bin").unlink(),
    "state.bin has 0 bytes, 5 expected": lambda path: os.truncate(path / "state.bin", 0),
    "manifest.json: No such file": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is not readable": lambda path: os.truncate(path / "manifest.json", 30),
    "manifest.json is not": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest.json was": lambda path: (path / "manifest.json").write_text("[1]"),
    "manifest.json was altered": change_the_manifest,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, what):
    good = save(tmp_path, 10)
    bad = save(tmp_path, 20)
    DAMAGES[what](bad)
    path, warnings = latest(tmp_path)
    assert path == good and len(warnings) == 1
    assert "step_000020" in warnings[0] and what in warnings[0]
    assert names(tmp_path) == ["step_000010", "step_000020"]  # looking changes nothing

    assert recover(tmp_path) == (good, warnings)
    assert names(tmp_path) == ["damaged_step_000020", "step_000010"]
    assert recover(tmp_path) == (good, [])
    save(tmp_path, 20)  # trained again
    DAMAGES[what](tmp_path / "step_000020")
    assert recover(tmp_path)[0] == good  # damaged again: the newer damage replaces the older


def test_with_no_good_checkpoint_left_nothing_is_touched_and_the_user_is_asked(tmp_path):
    truncate(save(tmp_path, 10))
    truncate(save(tmp_path, 20))
    with pytest.raises(ValueError, match="(?s)step_000020.*step_000010.*move .* away to start from step 0"):
        recover(tmp_path)
    assert names(tmp_path) == ["step_000010", "step_000020"]


def test_leftovers_of_an_interrupted_save_are_ignored_and_cleared(tmp_path):
    good = save(tmp_path, 10)
    (begin(tmp_path, 20) / "half.bin").write_bytes(b"x")
    assert latest(tmp_path) == (good, [])
    assert recover(tmp_path) == (good, []) and names(tmp_path) == ["step_000010"]


def test_a_save_starts_from_an_empty_folder(tmp_path):
    (begin(tmp_path, 10) / "old.bin").write_bytes(b"x")
    path = save(tmp_path, 10)
    assert not (path / "old.bin").exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, score in [(1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.1), (6, float("nan"))]:
        save(tmp_path, step, score)
    gone = prune(tmp_path, keep_last=2, keep_best=2)
    assert {path.name for path in gone} == {"step_000001", "step_000003"}
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005", "step_000006"]


def test_of_equal_scores_the_newest_is_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, 0.5)
    save(tmp_path, 4, 0.0)
    prune(tmp_path, keep_last=1, keep_best=1)
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_pruning_counts_good_checkpoints_only_and_never_deletes_the_last(tmp_path):
    good = save(tmp_path, 1)
    for step in (2, 3):
        truncate(save(tmp_path, step, 0.9))
    assert {path.name for path in prune(tmp_path, keep_last=1, keep_best=1)} == {"step_000002", "step_000003"}
    assert prune(tmp_path, keep_last=0, keep_best=0) == [] and latest(tmp_path) == (good, [])
    truncate(good)
    assert prune(tmp_path, keep_last=1, keep_best=0) == [] and names(tmp_path) == ["step_000001"]


def test_a_full_disk_while_writing_says_so(tmp_path):
    """RLIMIT_FSIZE gives the same OSError family as a full disk, without needing one."""
    good = save(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = begin(tmp_path, 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match="not saved: the disk is full or a quota is reached; free space"):
            with checkpoint.writing():
                (folder / "big.bin").write_bytes(b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shutil.rmtree(folder)
    assert names(tmp_path) == ["step_000010"] and latest(tmp_path) == (good, [])


def test_a_full_disk_while_committing_leaves_the_old_and_nothing_of_the_new(tmp_path):
    good = save(tmp_path, 10)
    folder = begin(tmp_path, 20)
    for i in range(20):
        (folder / f"part_{i}.bin").write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the manifest of 20 files is larger
    try:
        with pytest.raises(CheckpointError, match="the disk is full"):
            commit(tmp_path, 20, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert recover(tmp_path) == (good, []) and names(tmp_path) == ["step_000010"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.promise("disk full during torch.save")
def test_a_full_disk_is_recognised_by_what_torch_and_safetensors_raise(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    for numbers in (10, 100_000):  # fails in torch's closing words; in the middle
        with pytest.raises(CheckpointError, match="the disk is full"):
            with checkpoint.writing():
                with open("/dev/full", "wb") as file:
                    torch.save(torch.zeros(numbers), file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:  # nothing is left to fail when the file is closed: torch's words come last
        with pytest.raises(CheckpointError, match="the disk is full .*unexpected pos"):
            with checkpoint.writing():
                with open(tmp_path / "x.pt", "wb") as file:
                    torch.save(torch.zeros(100_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(CheckpointError, match="not saved: .*No such file"):
        with checkpoint.writing():
            save_file({"x": torch.zeros(3)}, tmp_path / "absent" / "x.safetensors")


def test_other_errors_pass_through_untouched():
    with pytest.raises(KeyError):
        with checkpoint.writing():
            raise KeyError("a bug is not a failed write")


WRITER = """
import sys
from pathlib import Path
from trainer.checkpoint import begin, commit, prune, recover, step_of, writing
root = Path(sys.argv[1])
path, _ = recover(root)
step = step_of(path) if path else 0
while True:
    step += 1
    folder = begin(root, step)
    for i in range(20):
        (folder / f"part_{i}.bin").write_bytes(bytes([step % 256, i]) * 5000)
    commit(root, step, {"step": step})
    prune(root, keep_last=2, keep_best=0)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_good_newest_checkpoint(tmp_path):
    """SIGKILL at 12 moments spread over writing, sealing, renaming and pruning; each time the writer goes on."""
    done = 0
    for attempt in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout
        done = int(writer.stdout.readline())  # at least one save each time
        time.sleep(0.0037 * attempt)
        writer.kill()
        done = max([done, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()
        path, warnings = latest(tmp_path)
        assert path and not warnings and checkpoint.step_of(path) >= done
        assert info(path) == {"step": checkpoint.step_of(path)}
    assert done >= 12


@pytest.mark.parametrize("name", ["band-kl_0.05", "a", "2026-01-02", "x" * 128, "seed=3,delta=.1"])
def test_ordinary_run_names_are_folders_of_output_dir(name):
    assert checkpoint.safe_run_dir("runs", name) == Path("runs") / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "-rf", "a b", "a\n", "é", "x" * 129, "a\0"]
)
def test_run_names_cannot_lead_elsewhere(name):
    with pytest.raises(ValueError, match="run_name: .* is not a folder name"):
        checkpoint.safe_run_dir("runs", name)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new"
    script = f"from pathlib import Path; from trainer import checkpoint; x = checkpoint.RunLock(Path({str(folder)!r}))"

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
        )

    lock = RunLock(folder)
    assert "is being trained by another process" in other().stderr
    lock.check()  # the other one's try changed nothing
    lock.close()
    assert other().returncode == 0


@pytest.mark.parametrize("how", ["deleted", "moved", "another's"])
@pytest.mark.promise("the run's folder deleted, moved or taken over while it trains")
def test_a_run_notices_that_its_folder_is_not_its_own_any_more(tmp_path, how):
    folder = tmp_path / "run"
    lock = RunLock(folder)
    lock.check()
    folder.rename(tmp_path / "elsewhere") if how == "moved" else shutil.rmtree(folder)
    taken_over = RunLock(folder) if how == "another's" else None
    with pytest.raises(CheckpointError, match="run no longer belongs to this run: deleted, moved or unmounted"):
        lock.check()
    lock.close()
    if taken_over:
        taken_over.check()
        taken_over.close()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml", "environment.json"])
@pytest.mark.promise("metrics.jsonl, config.yaml or .lock is a folder")
def test_a_folder_where_a_run_keeps_a_file_is_named(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"output_dir: {tmp_path}/run/{name} "):
        RunLock(tmp_path / "run")


@pytest.mark.promise("checkpoints is a dangling symlink")
def test_checkpoints_on_a_disk_that_is_not_there_are_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="checkpoints cannot be used: .* a link to .*unmounted: is that disk mounted?"):
        RunLock(tmp_path / "run")


@pytest.mark.promise("output_dir cannot be written, or is a file")
def test_an_output_folder_that_cannot_be_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir: .*/file is a file, not a folder"):
        checkpoint.safe_run_dir(tmp_path / "file" / "runs", "name")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="output_dir: .*/link is a link to .*/unmounted, which does not exist"):
        checkpoint.safe_run_dir(tmp_path / "link", "name")
    with pytest.raises(ValueError, match="output_dir: /proc.* cannot be "):
        RunLock(Path("/proc/runs/name"))
    assert names(tmp_path) == ["file", "link"]


def read_only_folder_script(folder: Path) -> str:
    """In a mount namespace of its own, so that root is refused too."""
    line = f"from trainer import checkpoint; checkpoint.safe_run_dir({str(folder)!r}, 'name')"
    return f'mount -t tmpfs -o ro none {folder} && exec {sys.executable} -c "{line}"'


@pytest.mark.promise("output_dir on a read-only disk")
def test_a_read_only_disk_is_refused_before_anything_is_made(tmp_path):
    unshared = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*unshared, f"mount -t tmpfs -o ro none {tmp_path}"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    done = subprocess.run(
        [*unshared, read_only_folder_script(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (
        f"ValueError: output_dir: {tmp_path / 'name'} cannot be written ([Errno 30] Read-only file system"
        in done.stderr
    )


@pytest.mark.promise("a checkpoint renamed or copied")
def test_a_checkpoint_under_another_name_is_passed_over(tmp_path):
    good = save(tmp_path, 2)
    shutil.copytree(good, tmp_path / "step_000005")
    path, warnings = recover(tmp_path)
    assert path == good
    assert warnings == [
        "checkpoint step_000005 is damaged and skipped: its manifest.json is that of step 2: renamed or copied"
    ]
    good.rename(tmp_path / "step_000007")
    with pytest.raises(ValueError, match="(?s)that of step 2: renamed or copied.*has no undamaged checkpoint"):
        recover(tmp_path)


@pytest.mark.parametrize(
    "engine, change, refused",
    [
        ("vllm", "engine_memory_share", False),
        ("hf", "engine_memory_share", True),  # it decides which responses share a batch, and with it an RNG
        ("hf", "verifier_workers", False),
        ("hf", "seed", True),
    ],
)
def test_keys_that_decide_samples_stay_at_a_resume(tmp_path, engine, change, refused):
    words, path = ["--config", "demo_band", "--engine", engine], save(tmp_path, 2)
    (path / "config.yaml").write_text(to_yaml(load(Config, words)))
    cfg = load(Config, [*words, f"--{change}", "0.5" if change == "engine_memory_share" else "9"])
    if refused:
        with pytest.raises(ValueError, match=f"cannot be resumed with other settings .{change}: .* then, .* now"):
            refuse_changes(path, cfg, {})
    else:
        refuse_changes(path, cfg, {})
