"""What a run trains on: decided by one rank for all, and named by a fingerprint that sees every change."""

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launching import ROOT
from safetensors.torch import load_file, save_file

from configs import load
from configs.schema import Config
from trainer.clock import gc_paused
from trainer.preflight import describe_changes
from trainer.ranks import Ranks
from trainer.task import Task, load_task


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(n: int) -> list[dict[str, Any]]:
    return [{"problem": f"{i % 10}+{i // 10}+1-0=", "gold": str(i)} for i in range(n)]


def task_of(folder: Path, *keys: object) -> Task:
    """The task of train.jsonl, held_out.jsonl and model/ in a folder."""
    named = ["--config", "demo_band", "--model", folder / "model", "--train_data", folder / "train.jsonl"]
    named += ["--eval_data", folder / "held_out.jsonl", "--output_dir", folder / "runs", "--prompts_per_step", 16]
    return load_task(load(Config, [*map(str, named), *map(str, keys)]), lambda line: None, Ranks(Accelerator(cpu=True)))


@pytest.fixture
def folder(tmp_path: Path, toy_model: str) -> Path:
    shutil.copytree(toy_model, tmp_path / "model")
    write(tmp_path / "train.jsonl", rows(40))
    write(tmp_path / "held_out.jsonl", [{"problem": "9*9*9*9=", "gold": "1"}])
    (tmp_path / "mine.py").write_text("def reward(completion, gold):\n    return 1\n")
    (tmp_path / "rule.py").write_text(
        "def rule(entropy, *, room=0.2):\n    return 1 - room * entropy.clamp(max=1), 1 + room * entropy\n"
    )
    return tmp_path


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = task_of(folder).fingerprint
    assert list(before) == ["train_data", "eval_data held_out", "model"]
    assert len(set(before.values())) == 3 and all(len(value) == 16 for value in before.values())
    copy = tmp_path_factory.mktemp("other") / "place"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # other times of change
    (copy / "model" / "README.md").write_text("a note")
    assert task_of(copy).fingerprint == before
    assert describe_changes(before, before) == []


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def first_gold_changed(folder: Path) -> None:
    write(folder / "train.jsonl", [rows(1)[0] | {"gold": "7"}, *rows(40)[1:]])


def two_rows_swapped(folder: Path) -> None:
    first, second, *others = rows(40)
    write(folder / "train.jsonl", [second, first, *others])


def held_out_changed(folder: Path) -> None:
    write(folder / "held_out.jsonl", [{"problem": "9*9*9*9=", "gold": "2"}])


def one_weight_changed(folder: Path) -> None:
    """The last number of a matrix, a few bytes in the middle of the file."""
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def configuration_changed(folder: Path) -> None:
    replaced(folder / "model" / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')


def token_renamed(folder: Path) -> None:
    replaced(folder / "model" / "tokenizer.json", '"d"', '"e"')


def chat_template_added(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")


def stop_id_added(folder: Path) -> None:
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')


@pytest.mark.parametrize(
    "change, key, told",
    [
        (first_gold_changed, "train_data", "train_data: problems, gold answers, their order, or token ids of the"),
        (two_rows_swapped, "train_data", "train_data: problems, gold answers, their order"),
        (held_out_changed, "eval_data held_out", "eval_data held_out: problems, gold answers"),
        (one_weight_changed, "model", "model: files of the start model changed ("),
        (configuration_changed, "model", "model: files of the start model"),
        (token_renamed, "model", "model: files of the start model"),
        (chat_template_added, "model", "model: files of the start model"),
        (stop_id_added, "model", "model: files of the start model"),
    ],
)
@pytest.mark.promise("changed training data, evaluation data, start model or tokenizer at a resume")
def test_a_change_is_seen_and_told(folder: Path, change: Callable[[Path], None], key: str, told: str) -> None:
    before = task_of(folder).fingerprint
    change(folder)
    after = task_of(folder).fingerprint
    assert {name for name in before if before[name] != after[name]} == {key}
    (line,) = describe_changes(before, after)
    assert line.startswith(told) and f"({before[key]} then, {after[key]} now)" in line


def test_prompts_of_the_same_problems(folder: Path) -> None:
    before = task_of(folder).fingerprint
    other = task_of(folder, "--system_prompt", "1+1=", "--max_prompt_tokens", 14).fingerprint
    assert {name for name in before if before[name] != other[name]} == {"train_data", "eval_data held_out"}
    assert len(describe_changes(before, other)) == 2


@pytest.mark.promise("a changed file of the reward or the rule at a resume")
def test_the_files_of_own_functions(folder: Path) -> None:
    keys = ["--reward", f"{folder}/mine.py:reward", "--rule", f"{folder}/rule.py:rule"]
    before = task_of(folder, *keys).fingerprint
    replaced(folder / "mine.py", "return 1", "return 0")
    after = task_of(folder, *keys).fingerprint
    assert [line.split(" changed")[0] for line in describe_changes(before, after)] == ["reward: file of the function"]
    replaced(folder / "rule.py", "room=0.2", "room=0.3")
    assert len(describe_changes(before, task_of(folder, *keys).fingerprint)) == 2


def test_what_one_side_lacks_is_passed_over(folder: Path) -> None:
    before, without = task_of(folder).fingerprint, task_of(folder, "--eval_every", 0).fingerprint
    assert before.keys() - without.keys() == {"eval_data held_out"}
    assert describe_changes(before, without) == describe_changes(without, before) == describe_changes({}, before) == []


# --- several ranks ---------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
from accelerate import Accelerator
from configs import load
from configs.schema import Config
from trainer.ranks import Ranks
from trainer.task import load_task

os.chdir(sys.argv[1] + "/" + os.environ["RANK"])  # as on a machine of its own
ranks = Ranks(Accelerator(cpu=True))
for keys in json.loads(sys.argv[2]):
    told = []
    try:
        task = load_task(load(Config, ["--config", "demo_band", *keys.split()]), told.append, ranks)
        found = {"train": [(p.id, p.gold, ids) for p, ids in task.train], "fingerprint": task.fingerprint, "told": told}
    except ValueError as error:
        found = str(error)
    print(json.dumps(found), flush=True)
"""


def on_two_ranks(folder: Path, cases: list[str]) -> list[tuple[Any, Any]]:
    """Of each case what both ranks print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), json.dumps(cases)],
            env={**os.environ, **launched, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ours, theirs = ([json.loads(line) for line in each.communicate(timeout=120)[0].splitlines()] for each in started)
    return list(zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what several CPU processes do")
@pytest.mark.promise("ranks disagree about problems, or their files differ")
def test_one_rank_decides_for_all(tmp_path: Path, toy_model: str) -> None:
    """Two ranks whose folders hold different files under the same names."""
    places = [tmp_path / str(rank) for rank in range(2)]
    for rank, place in enumerate(places):
        shutil.copytree(toy_model, place / "model")
        shutil.copytree(toy_model, place / "other" / "model")
        write(place / "train.jsonl", [*rows(40 - rank)[:: 1 - 2 * rank], {"problem": "1+1=", "gold": "\\frac{1}{"}])
        (place / "bad.jsonl").write_text("{" if rank == 0 else (place / "train.jsonl").read_text())
    shutil.copytree(toy_model, places[0] / "on_one")
    one_weight_changed(places[1] / "other")
    common = "--output_dir runs --eval_every 0 --prompts_per_step 16 --sharding ddp"
    good, data, model, other = on_two_ranks(
        tmp_path,
        [
            f"{common} --model model --train_data train.jsonl",
            f"{common} --model model --train_data bad.jsonl",
            f"{common} --model on_one --train_data train.jsonl",
            f"{common} --model other/model --train_data train.jsonl",
        ],
    )
    alone = task_of(places[0], "--eval_every", 0)
    for found in good:
        assert found["train"] == [[p.id, p.gold, ids] for p, ids in alone.train] and len(alone.train) == 40
        assert found["fingerprint"] == alone.fingerprint
    told = [[line for line in found["told"] if "dropped" in line] for found in good]
    assert len(told[0]) == 2 and told[1] == []  # the other rank judges no gold
    assert data[0] == data[1] and "bad.jsonl, line 1: not JSON" in data[0]  # which is good on the other rank
    assert model[0] == model[1] and "on_one is not a folder that exists" in model[0]  # a mistake of the other rank
    assert other[0] == other[1]
    assert other[0].startswith("rank 1 has other files than rank 0, under the same names: model: files")


def test_the_garbage_collector_is_set_back_after_imports_and_after_a_mistake():
    usual = gc.get_threshold()
    with pytest.raises(KeyError), gc_paused():
        assert gc.get_threshold()[0] > usual[0]
        raise KeyError
    assert gc.get_threshold() == usual
