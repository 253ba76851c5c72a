"""A run's checkpoints: what they hold, when one is written, and which one a run goes on from.

    save(run)                                       # collective; nothing when there is one of this step
    path = find_checkpoint(folder, cfg, fingerprint, ranks, say)    # the same on every rank
    state = load_state(path, rank, processes)

A checkpoint root/step_000010 holds policy/ (Hugging Face format), optimizer.pt, config.yaml, the rows of metrics.jsonl
so far and, of each rank, state_rank_0.json. trainer/checkpoint.py makes it whole or absent.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from configs import diff, to_yaml
from configs.schema import Config
from trainer import checkpoint
from trainer.fingerprint import changed
from trainer.ranks import Ranks
from trainer.run import Run
from trainer.state import State, from_text, to_text

# Keys that may differ when a run is resumed: they change what is shown, kept or how fast it goes, not what is learnt.
FREE_KEYS = set(
    """
    max_steps dry_run output_dir wandb eval_every save_every keep_last keep_best max_rollout_kl micro_batch_tokens
    attention gradient_checkpointing sharding tensor_parallel trust_remote_code samples_logged engine_memory_share
    verifier_workers
    """.split()
)


NEWEST = ".newest_checkpoint"  # beside the folder of checkpoints, which may be a link to another disk


def save(run: Run) -> None:
    """Write a checkpoint of the completed steps, unless there is one; collective.

    Raises CheckpointError when a write fails; earlier checkpoints stay as they are.
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

    error = _error_of(begin) if run.ranks.is_main else ""
    run.ranks.wait()

    def write() -> None:
        with checkpoint.writing():
            checkpoint.write_text(folder / f"state_rank_{run.ranks.rank}.json", to_text(run.state))
            if run.ranks.is_main:
                run.policy.write(folder / "policy", weights)
                run.task.tokenizer.save_pretrained(folder / "policy")
                with open(folder / "optimizer.pt", "wb") as file:  # by its name, torch hides why a write fails
                    torch.save(moments, file)
                checkpoint.write_text(folder / "config.yaml", to_yaml(run.cfg))

    errors = [e for e in run.ranks.gather([error or _error_of(write)]) if e]
    if run.ranks.is_main and not errors:
        info: dict[str, Any] = {"wandb_run_id": run.tracker.run_id, "fingerprint": run.task.fingerprint}
        if run.state.score is not None and run.state.score_step == step:
            info["score"] = run.state.score

        def commit() -> None:
            checkpoint.commit(root, step, info)
            with checkpoint.writing():
                checkpoint.replace_file(run.folder / NEWEST, f"step {step}\n".encode())
            checkpoint.prune(root, run.cfg.keep_last, run.cfg.keep_best)

        errors = [e for e in [_error_of(commit)] if e]
    elif run.ranks.is_main:
        checkpoint.discard(root, step)
    errors = [e for e in run.ranks.gather(errors[:1] if run.ranks.is_main else []) if e]
    if not errors:
        run.saved_step = step
        run.tracker.say(f"checkpoint of step {step} saved in {time.perf_counter() - started_s:.1f} s")
    else:
        raise checkpoint.CheckpointError(f"step {step}: {errors[0]}")


def _error_of(work: Callable[[], object]) -> str:
    """What went wrong with a write, in words: no rank may leave while the others wait for it."""
    try:
        work()
    except checkpoint.CheckpointError as error:
        return str(error)
    return ""


def load_state(path: Path, rank: int, processes: int) -> State:
    """The state of a checkpoint. Raises ValueError when it cannot be that of this code and number of processes."""
    own = len(list(path.glob("state_rank_*.json"))) == processes
    file = path / f"state_rank_{rank if own else 0}.json"
    try:
        state = from_text(file.read_text(encoding="utf-8"))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file}: {error}; State had other fields when it was written") from None
    if state.step != checkpoint.step_of(path):
        raise ValueError(f"{file} is that of step {state.step}: {path.name} was put together from several checkpoints")
    of_rank = [f.name for f in fields(state) if isinstance(getattr(state, f.name), list) and getattr(state, f.name)]
    if of_rank and not own:
        raise ValueError(
            f"{path} was written by another number of processes, and each kept its own {', '.join(of_rank)}: resume "
            f"with that number, not {processes}"
        )
    return state


def find_checkpoint(
    folder: Path, cfg: Config, fingerprint: Mapping[str, str], ranks: Ranks, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, the same on every rank.

    Raises ValueError for a run that cannot be resumed with this configuration and data, or whose checkpoints are gone.
    """
    return ranks.on_first(lambda: _newest(folder, cfg, fingerprint, say))


def _newest(folder: Path, cfg: Config, fingerprint: Mapping[str, str], say: Callable[[str], None]) -> Path | None:
    root, newest = folder / "checkpoints", folder / NEWEST
    try:
        path, warnings = checkpoint.recover(root)
    except checkpoint.CheckpointError as error:  # what is left to do is the user's decision
        raise ValueError(error) from None
    for line in warnings:
        say(f"warning: {line}")
    if path:
        _refuse_changed_keys(path, cfg)
        if lines := changed(checkpoint.info(path).get("fingerprint", {}), fingerprint):
            raise ValueError(
                f"run_name: {cfg.run_name!r} cannot be resumed, since other files stand under the same names; put them "
                "back, or choose another run_name:\n  " + "\n  ".join(lines)
            )
        say(f"resuming {folder} after step {checkpoint.step_of(path)}")
    elif newest.exists():
        saved = newest.read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(
            f"run_name: {cfg.run_name!r} has a checkpoint of {saved}, and {root} holds none: is its disk mounted? To "
            f"start anew, choose another run_name or move {folder} away"
        )
    elif (folder / "config.yaml").exists():
        say(f"{folder}: no checkpoint yet, starting from step 0")
    return path


def _refuse_changed_keys(path: Path, cfg: Config) -> None:
    old = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    fixed = {"max_steps"} if cfg.lr_schedule != "constant" else set()  # the length of the schedule
    changed = {key: pair for key, pair in diff(old, cfg).items() if key not in FREE_KEYS - fixed}
    if changed:
        keys = "; ".join(f"{key}: {before!r} then, {after!r} now" for key, (before, after) in changed.items())
        raise ValueError(
            f"run_name: {cfg.run_name!r} cannot be resumed with other settings ({keys}); "
            "choose another run_name, or give the old values"
        )
