"""Saving and resuming a run: the files of a checkpoint, and the checkpoint to resume from.

    save(run)                                       # collective; does nothing if this step has a checkpoint
    path = find_checkpoint(folder, cfg, fingerprint, ranks, info)   # the same on every rank
    state = load_state(path, rank, processes)

A checkpoint root/step_000010 holds policy/ (Hugging Face format), optimizer.pt, config.yaml, the rows of metrics.jsonl
so far and, per rank, state_rank_0.pt. trainer/checkpoint.py writes it atomically.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml

from configs import diff, to_yaml
from configs.schema import Config
from trainer import checkpoint
from trainer.checkpoint import CheckpointError
from trainer.preflight import describe_changes
from trainer.ranks import Ranks
from trainer.run import Run
from trainer.types import KINDS, State

# Keys that may change at a resume: they affect logging, kept checkpoints or speed, but not the training result.
FREE_KEYS = set(
    """
    max_steps dry_run output_dir wandb eval_every save_every keep_last keep_best max_rollout_kl micro_batch_tokens
    attention gradient_checkpointing sharding tensor_parallel trust_remote_code samples_logged engine_memory_share
    verifier_workers reward_concurrency reward_timeout_s
    """.split()
)
NEWEST = ".newest_checkpoint"  # in the run's folder: `checkpoints` may be a link to another disk


def save(run: Run) -> None:
    """Write a checkpoint of the completed steps, unless there is one. Collective.

    A checkpoint without the evaluation of its step (`pending_metrics`) is not rewritten: a resume evaluates again.
    Raises CheckpointError on every rank if a write fails on one of them. Earlier checkpoints are not affected.
    """
    if run.saved_step == run.step:
        return
    started_s, root, step = time.perf_counter(), run.folder / "checkpoints", run.step
    weights, moments = run.policy.full_weights(), run.policy.full_optimizer(run.optimizer)  # collective
    folder = checkpoint.saving_dir(root, step)

    def begin() -> None:
        rows = run.tracker.rows()
        checkpoint.begin(root, step)
        with checkpoint.writing():
            (folder / "metrics.jsonl").write_bytes(rows)
            (folder / "config.yaml").write_text(to_yaml(run.cfg), encoding="utf-8")

    def write() -> None:
        with checkpoint.writing():
            # Files are opened here: given a path, torch hides the reason of an error.
            with open(folder / f"state_rank_{run.ranks.rank}.pt", "wb") as file:
                torch.save(run.state, file)
            if run.ranks.is_main:
                run.policy.write(folder / "policy", weights)
                run.task.tokenizer.save_pretrained(folder / "policy")
                with open(folder / "optimizer.pt", "wb") as file:
                    torch.save(moments, file)

    def commit() -> None:
        info = {"wandb_run_id": run.tracker.run_id, "fingerprint": run.task.fingerprint, "score": run.state.score}
        checkpoint.commit(root, step, info)
        with checkpoint.writing():
            checkpoint.replace_file(run.folder / NEWEST, f"step {step}\n".encode())
        checkpoint.prune(root, run.cfg.keep_last, run.cfg.keep_best)

    try:
        for work, on_rank0 in ((begin, True), (write, False), (commit, True)):
            run.ranks.run_on_all_ranks(work, catch=(CheckpointError,), error=CheckpointError, rank0_only=on_rank0)
    except CheckpointError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"step {step}: {error}") from error
    run.saved_step = step
    run.tracker.info(f"checkpoint of step {step} saved in {time.perf_counter() - started_s:.1f} s")


def load_state(path: Path, rank: int, processes: int) -> State:
    """Load the state of a checkpoint. Raises ValueError if its fields or its number of processes do not match."""
    own = len(list(path.glob("state_rank_*.pt"))) == processes
    file = path / f"state_rank_{rank if own else 0}.pt"
    try:
        with torch.serialization.safe_globals(KINDS):
            state = State(**vars(torch.load(file, weights_only=True)))  # missing fields get their defaults
    except (TypeError, UnpicklingError) as error:
        reason = re.sub(r"(?s).* GLOBAL (\S+) .*", r"\1", str(error))  # torch's message has 30 lines
        raise ValueError(
            f"{file}: it was written with other fields of State, or holds a class that KINDS lacks ({reason}); see "
            "trainer/types.py"
        ) from None
    of_rank = [f.name for f in fields(state) if isinstance(getattr(state, f.name), list) and getattr(state, f.name)]
    if of_rank and not own:
        raise ValueError(
            f"{path} was written by another number of processes, and each kept its own {', '.join(of_rank)}: resume "
            f"with that number, not {processes}"
        )
    return state


def find_checkpoint(
    folder: Path, cfg: Config, fingerprint: Mapping[str, str], ranks: Ranks, info: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint to resume from, the same on every rank; None for a run that starts from step 0.

    Raises ValueError if the config or the data changed, or if the checkpoints of the run are missing.
    """

    def find() -> Path | None:
        root, newest = folder / "checkpoints", folder / NEWEST
        path, warnings = checkpoint.recover(root)
        for line in warnings:
            info(f"warning: {line}")
        if path:
            refuse_changes(path, cfg, fingerprint)
            info(f"resuming {folder} after step {checkpoint.step_of(path)}")
        elif newest.exists():
            saved = newest.read_text(encoding="utf-8", errors="replace").strip()
            raise ValueError(
                f"run_name: {cfg.run_name!r} has a checkpoint of {saved}, but {root} holds none: is its disk mounted? "
                f"To start over, choose another run_name or move {folder} away"
            )
        elif (folder / "config.yaml").exists():
            info(f"{folder}: no checkpoint yet, starting from step 0")
        return path

    return ranks.run_on_rank0(find)


def refuse_changes(path: Path, cfg: Config, fingerprint: Mapping[str, str]) -> None:
    """Raise ValueError with the changes since the checkpoint: keys that affect the training result, data, files."""
    old = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    fixed = {"max_steps"} if cfg.lr_schedule != "constant" else set()  # length of the schedule
    fixed |= {"engine_memory_share"} if cfg.engine == "hf" else set()  # sets the size of batches, which share an RNG
    changed = {key: pair for key, pair in diff(old, cfg).items() if key not in FREE_KEYS - fixed}
    if changed:
        keys = "; ".join(f"{key}: {before!r} then, {after!r} now" for key, (before, after) in changed.items())
        raise ValueError(
            f"run_name: {cfg.run_name!r} cannot be resumed with other settings ({keys}); "
            "choose another run_name, or give the old values"
        )
    if lines := describe_changes(checkpoint.info(path).get("fingerprint", {}), fingerprint):
        raise ValueError(
            f"run_name: {cfg.run_name!r} cannot be resumed, because files changed under the same names; restore them, "
            "or choose another run_name:\n  " + "\n  ".join(lines)
        )
