"""Is the model within reach, are the kernels there, did the launcher start what was asked for: told before anything
expensive starts. And after each step: is the engine that samples the policy that is trained?

Every check raises with one clear line that names the key, the value and what to do.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from bandpo.rule import Rule, check_rule, load_rule
from configs.memory import GIB, Size, cache_a_token
from configs.schema import Config
from data import HubUnreachable

if TYPE_CHECKING:
    from accelerate import Accelerator

HUB_TIMEOUT_S = 10.0


class EngineMismatch(RuntimeError):
    """The engine that samples is not the policy that is trained."""


def find_model(model: str) -> None:
    """Raise ValueError when `model` is neither a folder with a model nor a hub id, HubUnreachable when it is a hub id,
    not in the local cache, and the hub does not give it.

    Asks before anything heavy starts, and at once: the libraries below retry for minutes.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (of its own client)

    if Path(model).exists():
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"model: {model} has no config.json; name a folder in Hugging Face format")
        return
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model: {model} is not a folder that exists, nor a hub id such as Qwen/Qwen2.5-3B-Instruct")
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
            return
        except (HTTPError, OSError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    raise HubUnreachable(
        f"model: {model} could not be fetched from the hub ({reason}). Where the hub can be reached run "
        f"`hf download {model} --local-dir DIR`, then start with --model DIR"
    )


def find_room(folder: Path) -> None:
    """Raise ValueError when the run's folder could not be made or written to; it is not made here."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:  # asked for, and not os.access, which says yes to root
            file.write(b"1")
    except OSError as error:
        raise ValueError(f"output_dir: {folder} cannot be written ({error}); choose another output_dir") from None


def cache_trouble(cfg: Config, size: Size) -> str:
    """An error message where vLLM's keys and values of one whole sequence do not fit, else ""; "" too if unknown.

    The memory is estimated too large rather than too small: on a GPU all that the weights leave of the engine's share.
    """
    if cfg.engine != "vllm":
        return ""
    tokens = cfg.max_prompt_tokens + cfg.max_response_tokens
    if torch.cuda.is_available():
        numbers, key = (4 if cfg.precision == "float32" else 2), "engine_memory_share"
        card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        room = cfg.engine_memory_share * card * cfg.tensor_parallel - size.parameters * numbers
    else:
        numbers, key = (2 if cfg.precision == "bfloat16" else 4), "max_response_tokens"
        room = psutil.virtual_memory().total - size.parameters * numbers
    needed = tokens * cache_a_token(size, numbers)
    if needed <= room:
        return ""
    return (
        f"{key}: one sequence of max_prompt_tokens + max_response_tokens, {tokens:,}, needs {needed / GIB:.3g} GiB for "
        f"keys and values, and {max(0, room) / GIB:.3g} are free (got {getattr(cfg, key)}); "
        + ("raise it, or lower max_response_tokens" if key == "engine_memory_share" else "lower it")
    )


def find_rule(cfg: Config) -> Rule:
    """The clipping rule, run on a synthetic batch. Raises ValueError when it or its parameters are invalid."""
    rule = load_rule(cfg.rule, cfg.rule_args)
    check_rule(rule)
    return rule


def find_kernels(cfg: Config) -> None:
    """Raise ValueError when an attention kernel that was requested by name is not installed."""
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    package = packages.get(cfg.attention)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"attention: {cfg.attention} needs the package {package}; install it, or use attention: auto")


def check_processes(accelerator: "Accelerator") -> None:
    """Raise RuntimeError when Accelerate does not run the processes that were asked for, or wants to shard by itself.

    It says nothing when it does not recognise a launch of CPU processes: each would train on its own and overwrite the
    other's files, or one alone would be started.
    """
    promised = int(os.environ.get("WORLD_SIZE", 1))
    cpu_launch = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
    if accelerator.num_processes != promised:
        raise RuntimeError(
            f"the launcher started {promised} processes, Accelerate sees {accelerator.num_processes}. On CPUs start "
            f"with: {cpu_launch}"
        )
    # accelerate launch gives one process an address only when more than one was asked for.
    launched_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ
    if launched_alone and "MASTER_PORT" in os.environ:
        raise RuntimeError(
            "several processes were asked for, accelerate launch started one. On GPUs add --multi_gpu; on CPUs start "
            f"with: {cpu_launch} (MASTER_PORT is set: unset it if one process was meant)"
        )
    plugins = [
        name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"
    ]
    if plugins:
        raise RuntimeError(
            f"the accelerate configuration asks for {plugins[0]}; sharding is the key `sharding` here: set "
            "distributed_type: MULTI_GPU, as configs/accelerate/ does"
        )
