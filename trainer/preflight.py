"""Preflight checks before the policy is loaded, and the fingerprint of a run's inputs.

    check_model(model)                                      # a local folder, or a reachable hub id
    config = read_config(model, trust_remote_code=False)
    check_weights(model, trust_remote_code=False)           # complete, with the shapes of config.json
    fingerprint = {"model": files_hash(model), **fingerprint_of_data(train, evals)}
    describe_changes(of_checkpoint, fingerprint)            # any line means that the run cannot be resumed

Each check raises a one-line error with the key, the value and the fix.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError

from bandpo.rule import Rule, check_rule, load_rule
from configs.memory import GIB, Size, cache_a_token
from configs.schema import Config
from data import HubUnreachable, Problem
from data.tables import read_json_object
from trainer.checkpoint import sha256
from trainer.logging import format_error

if TYPE_CHECKING:
    from accelerate import Accelerator

Rows = Sequence[tuple[Problem, list[int]]]  # problem, prompt token ids
HUB_TIMEOUT_S = 10.0
JSON_FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "model.safetensors.index.json"
).split()
FULL_CONTEXT_ROPE = ("linear", "dynamic")  # RoPE types whose factor multiplies max_position_embeddings
KERNELS = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # attention -> package
# transformers raises these errors for absent, truncated or inconsistent files, and for invalid values of config.json.
LOAD_ERRORS = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
# Weights, config, tokenizer, chat template, and code of a model.
MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
CHANGES = dict.fromkeys(["reward", "rule"], "file of the function")
CHANGES |= {"model": "files of the start model", "teacher": "files of the teacher"}
DATA_CHANGE = "problems, gold answers, their order, or token ids of the prompts"


# ---- model ----


def check_model(model: str) -> None:
    """Raise ValueError if `model` is neither a model folder nor a hub id, HubUnreachable if it cannot be fetched.

    A hub id is OWNER/NAME, where OWNER is neither `build` nor a local folder. The check sends one request with a
    timeout, because the libraries would retry for minutes.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (of its own client)

    if Path(model).exists():
        if not (Path(model) / "config.json").is_file():
            adapter = (Path(model) / "adapter_config.json").is_file()
            fix = "merge this adapter into its base model" if adapter else "name a folder in Hugging Face format"
            raise ValueError(f"model: {model} has no config.json; {fix}")
        return
    match = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", model)
    if not match or match[1] == "build" or Path(match[1]).is_dir():
        raise ValueError(
            f"model: {model} is not a folder that exists, nor a hub id such as Qwen/Qwen2.5-3B-Instruct; correct the "
            "path"
        )
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
            return
        except (HTTPError, OSError) as error:
            reason = f"{type(error).__name__}: {format_error(error, 250)}"
    raise HubUnreachable(
        f"model: {model} could not be fetched from the hub ({reason}). Where the hub can be reached run "
        f"`hf download {model} --local-dir DIR`, then start with --model DIR"
    )


def read_config(model: str, *, trust_remote_code: bool) -> Any:
    """Load the transformers config of a folder or hub id.

    Raises ValueError with the file name if a file is not JSON or has a value of the wrong type, or if the model is
    quantized.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = model_folder(model)
    for path in (folder / name for name in JSON_FILES):
        if path.is_file():
            read_json_object(path)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, OSError) as error:
        raise ValueError(f"model: {folder / 'config.json'}: {format_error(error, 250)}") from None
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"model: {model} is quantized (quantization_config in its config.json), and training needs float weights; "
            "choose the model that it was made from"
        )
    return config


def read_tokenizer(model: str, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a folder or hub id. Raises ValueError if its files are invalid."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:  # depends on the kind of tokenizer
        reason = f"{type(error).__name__}: {format_error(error, 250)}"
        raise ValueError(f"model: {model}: its tokenizer cannot be read ({reason}); download its files again") from None


def check_context(cfg: Config, config: Any) -> None:
    """Raise ValueError if max_prompt_tokens + max_response_tokens exceeds the model's context."""
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # for all layers, or per layer type
    context *= max([kind.get("factor") or 1 for kind in kinds if kind.get("rope_type") in FULL_CONTEXT_ROPE], default=1)
    total = cfg.max_prompt_tokens + cfg.max_response_tokens
    if total > context:
        raise ValueError(
            f"max_response_tokens: {cfg.max_response_tokens} with max_prompt_tokens {cfg.max_prompt_tokens} makes "
            f"{total:,} tokens, the context of {cfg.model} is {int(context):,}; lower one of the two"
        )


def check_weights(model: str, *, trust_remote_code: bool) -> None:
    """Raise ValueError if weights are absent, truncated, or do not match config.json.

    transformers loads the model on the meta device, which reads only the headers of safetensors files. A hub id is
    checked only if its weights are in the cache.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    local, verbosity = Path(model).is_dir(), logging.get_verbosity()
    logging.set_verbosity_error()  # no table of the differences
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            device_map="meta",
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except LOAD_ERRORS as error:
        if isinstance(error, OSError) and not local:
            return
        reason = f"{type(error).__name__}: {format_error(error, 250)}"
        raise ValueError(f"model: {model} cannot be loaded ({reason}); download its files again") from None
    finally:
        logging.set_verbosity(verbosity)
    info = loaded[1]
    for name, stored, described in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"model: {model}: {name} has the shape {list(stored)} in its file and {list(described)} by config.json; "
            "the two do not belong together"
        )
    refuse_missing_weights(model, info)
    if layers := sorted(name for name in info["unexpected_keys"] if ".layers." in name):
        raise ValueError(
            f"model: {model} has {len(layers)} weights that config.json does not describe, such as {layers[0]}; the "
            "two do not belong together"
        )


def refuse_missing_weights(model: str, found: Mapping[str, Any]) -> None:
    """Raise ValueError for missing weights. found: the loading info of transformers."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"model: {model} lacks {len(missing)} weights, such as {missing[0]}; download its files again")


def model_folder(model: str) -> Path:
    """Return the folder itself, or the cached snapshot of a hub id."""
    from transformers.utils.hub import cached_file

    path = cached_file(model, "config.json")
    assert path is not None, "cached_file raises if there is none"
    return Path(path).parent


# ---- rule and machine ----


def find_rule(cfg: Config) -> Rule:
    """Load the clipping rule and run it on a synthetic batch. Raises ValueError for an invalid rule or arguments."""
    rule = load_rule(cfg.rule, cfg.rule_args)
    check_rule(rule)
    return rule


def check_kernels(cfg: Config) -> None:
    """Raise ValueError if the attention kernel is not installed, or if vLLM cannot compile kernels on a GPU."""
    package = KERNELS.get(cfg.attention)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"attention: {cfg.attention} needs the package {package}; install it, or use attention: auto")
    if cfg.engine == "vllm" and torch.cuda.is_available():
        check_compiler()


def check_compiler() -> None:
    """Raise ValueError if no C compiler finds Python.h: Triton compiles its launcher at the first kernel."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
    include = sysconfig.get_path("include", "posix_prefix")  # where Triton looks
    try:
        subprocess.run(
            [compiler, "-fsyntax-only", f"-I{include}", "-xc", "-"],
            input="#include <Python.h>\n",
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.splitlines()[0] if isinstance(error, subprocess.CalledProcessError) else error
        raise ValueError(
            f"engine: vllm compiles kernels on a GPU, which needs a C compiler and Python's headers ({reason}); "
            "install gcc and python3-dev, or use engine: hf"
        ) from None


def engine_error(cfg: Config, size: Size) -> str:
    """Return an error message if vLLM cannot run the model on this machine, else "".

    The KV cache must fit one sequence. Free memory is overestimated: on a GPU it is the engine's share minus the
    weights. vLLM's CPU build corrupts the weights of experts at every reload (vllm-project/vllm#42577).
    """
    if cfg.engine != "vllm":
        return ""
    if size.experts and not torch.cuda.is_available():
        return f"engine: vllm cannot sync the weights of experts on a CPU ({cfg.model} has them); use engine: hf"
    tokens = cfg.max_prompt_tokens + cfg.max_response_tokens
    if torch.cuda.is_available():
        bytes_per_number, key = (4 if cfg.precision == "float32" else 2), "engine_memory_share"
        card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        free = cfg.engine_memory_share * card * cfg.tensor_parallel - size.parameters * bytes_per_number
    else:
        bytes_per_number, key = (2 if cfg.precision == "bfloat16" else 4), "max_response_tokens"
        free = psutil.virtual_memory().total - size.parameters * bytes_per_number
    needed = tokens * cache_a_token(size, bytes_per_number)
    if needed <= free:
        return ""
    return (
        f"{key}: one sequence of max_prompt_tokens + max_response_tokens, {tokens:,}, needs {needed / GIB:.3g} GiB for "
        f"keys and values, and {max(0, free) / GIB:.3g} are free (got {getattr(cfg, key)}); "
        + ("raise it, or lower max_response_tokens" if key == "engine_memory_share" else "lower it")
    )


def check_processes(accelerator: "Accelerator") -> None:
    """Raise ValueError if Accelerate and the launcher disagree on the number of processes, or if Accelerate shards.

    Accelerate does not report a launch of CPU processes that it fails to recognize. Each process would train alone and
    overwrite the files of the others, or only one process would start.
    """
    promised = int(os.environ.get("WORLD_SIZE", 1))
    cpu_launch = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
    if accelerator.num_processes != promised:
        raise ValueError(
            f"WORLD_SIZE: the launcher started {promised} processes, Accelerate sees {accelerator.num_processes}. On "
            f"CPUs start with: {cpu_launch}; without a launcher unset WORLD_SIZE and RANK"
        )
    # accelerate launch sets MASTER_PORT for one process only if several were requested.
    launched_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ
    if launched_alone and "MASTER_PORT" in os.environ:
        raise ValueError(
            "several processes were asked for, accelerate launch started one. On GPUs add --multi_gpu; on CPUs start "
            f"with: {cpu_launch} (MASTER_PORT is set: unset it if one process was meant)"
        )
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}") == "true":
            raise ValueError(
                f"the accelerate configuration asks for {plugin}; sharding is the key `sharding` here: set "
                "distributed_type: MULTI_GPU, as configs/accelerate/ does"
            )


# ---- fingerprint ----


def fingerprint_of_data(train: Rows, evals: Mapping[str, Rows]) -> dict[str, str]:
    """Hash the training set and each evaluation set: problems and token ids of their prompts."""
    sets = {"train_data": train, **{f"eval_data {name}": rows for name, rows in evals.items()}}
    return {key: short_hash([[list(vars(p).values()), ids] for p, ids in rows]) for key, rows in sets.items()}


def files_hash(model: str) -> str:
    """Hash the names and contents of MODEL_FILES in a folder; for a hub id, return its cached commit.

    A copy of a folder has the same hash: dates and the folder's name are not hashed.
    """
    folder = model_folder(model)
    if not Path(model).is_dir():
        return folder.name[:16]  # commit of the snapshot
    paths = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))
    return short_hash([[path.name, sha256(path)] for path in paths])


def function_files(keys: Mapping[str, str]) -> dict[str, str]:
    """Hash the file of each value FILE.py:FUNCTION, by key. Other values and imported files are not hashed."""
    return {key: sha256(Path(value.rpartition(":")[0]))[:16] for key, value in keys.items() if ".py:" in value}


def short_hash(value: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()[:16]


def describe_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """List what changed, one line per item. Any change means the checkpoint cannot be resumed.

    Keys in only one of the two are skipped: evaluation sets with eval_every 0, checkpoints of earlier versions.
    """
    keys = [key for key in old if key in new and old[key] != new[key]]
    return [f"{key}: {CHANGES.get(key, DATA_CHANGE)} changed ({old[key]} then, {new[key]} now)" for key in keys]
