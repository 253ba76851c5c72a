"""Which policy a path into a run stands for, and how it was prompted and sampled there.

    policy = find_policy("runs/band")       # its newest whole checkpoint
    policy.path, policy.step, policy.settings["prompt_template"]

A run's folder, a checkpoint in it and the policy in that all lead here. A checkpoint carries the configuration it was
trained with, so one that was copied elsewhere is understood too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.records import nearest, runs_in
from trainer.checkpoint import MANIFEST, damage, latest


@dataclass(frozen=True)
class TrainedPolicy:
    """The policy of a checkpoint."""

    path: Path  # of its folder in Hugging Face format
    run: str  # name of its run
    step: int
    settings: dict[str, Any]  # configs.schema.Config as it was saved
    warnings: tuple[str, ...]


def find_policy(model: str) -> TrainedPolicy | None:
    """The policy that `model` stands for; None for what is of no run: another folder, a hub id.

    Raises ValueError for a path that is not there, a run without a whole checkpoint and a checkpoint that is not whole.
    """
    path = Path(model)
    if not path.exists() and path.parent != Path() and path.parent.is_dir():
        fix = nearest(path) or "name a run, a checkpoint, another model's folder or a hub id"
        raise ValueError(f"model: {model} is not there; {fix}")
    whole = path.resolve()
    if whole.name == "policy" and (whole.parent / MANIFEST).is_file():
        return _of_checkpoint(path.parent if path.name == "policy" else whole.parent, ())
    if (whole / "policy").is_dir() and (whole / MANIFEST).is_file():
        return _of_checkpoint(path, ())
    if whole.name == "checkpoints":
        path, whole = path.parent, whole.parent
    if runs := runs_in(path):
        raise ValueError(f"model: {model} holds runs: name one, {runs}")
    if not (whole / "checkpoints").is_dir() and not (whole / "metrics.jsonl").is_file():
        return None
    newest, warnings = latest(path / "checkpoints")
    if newest is None:
        every = _config(path).get("save_every")
        why = "; ".join(warnings) or f"one is written every {every} steps (save_every) and after the last"
        raise ValueError(f"model: {model} has no whole checkpoint yet: {why}")
    return _of_checkpoint(newest, tuple(warnings))


def _of_checkpoint(folder: Path, warnings: tuple[str, ...]) -> TrainedPolicy:
    try:
        step = int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"model: {folder / MANIFEST} is not readable; name another checkpoint") from None
    found = damage(folder, checksums=False)
    if found.startswith("policy/"):  # what else is missing is not needed here
        raise ValueError(f"model: checkpoint {folder} is damaged: {found}; name another")
    settings = _config(folder)
    return TrainedPolicy(folder / "policy", str(settings.get("run_name", "run")), step, settings, warnings)


def _config(folder: Path) -> dict[str, Any]:
    """Raises ValueError when config.yaml is not there or cannot be read."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"model: {folder / 'config.yaml'} cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"model: {folder / 'config.yaml'} holds no keys")
    return settings
