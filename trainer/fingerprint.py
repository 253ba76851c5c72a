"""What a run trains on, named by short hashes, so that a resume notices what changed under the same names.

    task.fingerprint                        # {"train_problems": "3f2a...", "eval_data toy_eval": "90c1...", ...}
    changed(of_checkpoint, of_now)          # in words, a line each; every line is a reason to refuse

Data may change where it lies, a model may be trained further in its folder, a reward may be edited: the configuration
stays the same and the run is another one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import Problem

Rows = Sequence[tuple[Problem, list[int]]]
MEANING = {
    "train_problems": "train_data: its problems, golds or their order",
    "train_prompts": "train_data: the token ids of its prompts",
    "tokenizer": "model: the tokenizer, its chat template or the ids that end an answer",
    "model": "model: its configuration or weights, which the run started from",
    "reward": "reward: the file of the function",
    "rule": "rule: the file of the function",
}


def fingerprint_of_data(train: Rows, evals: Mapping[str, Rows]) -> dict[str, str]:
    """Hashes of the training problems, of their prompts' ids, and of every evaluation set, problems and ids."""
    return {
        "train_problems": short_hash([_fields(problem) for problem, _ in train]),
        "train_prompts": short_hash([ids for _, ids in train]),
        **{f"eval_data {name}": short_hash([[_fields(p), ids] for p, ids in rows]) for name, rows in evals.items()},
    }


def _fields(problem: Problem) -> list[Any]:
    return list(vars(problem).values())  # dataclasses.astuple copies each of them


def tokenizer_hash(tokenizer: Any, stops: Sequence[int]) -> str:
    """Of the vocabulary, the special tokens, the chat template and the ids that end an answer.

    How text is cut into these tokens is seen in the prompts' ids.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[::-1])
    return short_hash([vocabulary, tokenizer.all_special_tokens, tokenizer.chat_template, list(stops)])


def own_files(keys: Mapping[str, str | None]) -> dict[str, str]:
    """Hashes of the files of `FILE.py:FUNCTION`, by key; other values have none. What the file imports is not seen."""
    paths = {key: Path(value.rpartition(":")[0]) for key, value in keys.items() if value and ".py:" in value}
    return {key: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for key, path in paths.items()}


def short_hash(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()[:16]


def changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What is another one now, in words, a line each; a run with any of it is not the same run and is to be refused.

    What only one of the two has is passed over: an evaluation set that is not looked at (eval_every 0), or a
    fingerprint that an earlier version wrote. Whether a key names another set, model or file is told by the
    configuration. Prompts are told where neither the problems nor the tokenizer explain them.
    """
    keys = [key for key in old if key in new and old[key] != new[key]]
    if {"train_problems", "tokenizer"} & set(keys):
        keys = [key for key in keys if key != "train_prompts"]
    words = {key: MEANING.get(key, f"{key}: its problems, golds, or the token ids of its prompts") for key in keys}
    return [f"{words[key]} changed ({old[key]} then, {new[key]} now)" for key in keys]
