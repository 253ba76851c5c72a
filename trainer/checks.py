"""Is the model within reach, are the kernels there, did the launcher start what was asked for: told before anything
expensive starts. And after each step: is the engine that samples the policy that is trained?

Every check raises with one clear line that names the key, the value and what to do.
"""

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from bandpo.rule import Rule, check_rule
from bandpo.rules import load_rule
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
    """In words, why vLLM's keys and values of one whole sequence do not fit, or a CPU's cache not into its memory; ""
    where they do or it cannot be told.

    The room is taken too large rather than too small: all of the cache on a CPU, and on a GPU all that the weights
    leave of the engine's share.
    """
    if cfg.engine != "vllm":
        return ""
    whole = cfg.max_prompt_tokens + cfg.max_response_tokens
    if torch.cuda.is_available():
        numbers, key = (4 if cfg.precision == "float32" else 2), "engine_memory_share"
        card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        room = cfg.engine_memory_share * card * cfg.tensor_parallel - size.parameters * numbers
    else:
        numbers, key = (2 if cfg.precision == "bfloat16" else 4), "engine_cpu_cache_gib"
        room, memory = cfg.engine_cpu_cache_gib * GIB, psutil.virtual_memory().total
        if room > memory:
            return f"{key}: {cfg.engine_cpu_cache_gib} is more than this machine's memory, {memory / GIB:.3g}; lower it"
    needed = whole * cache_a_token(size, numbers)
    if needed <= room:
        return ""
    return (
        f"{key}: {getattr(cfg, key)} leaves {max(0, room) / GIB:.3g} GiB for keys and values, and one sequence of "
        f"max_prompt_tokens + max_response_tokens, {whole:,}, needs {needed / GIB:.3g}; raise it, or lower "
        "max_response_tokens"
    )


def find_rule(cfg: Config) -> Rule:
    """The rule of the objective, tried on made-up tokens. Raises ValueError when it cannot be what was asked for."""
    if cfg.rule:
        rule = load_rule(cfg.rule, cfg.rule_parameters)
    else:  # what `clip` names; its parameters are keys of their own
        named = load_rule(cfg.clip, {})
        rule = named.with_parameters({name: getattr(cfg, name) for name in named.defaults})
    if check_rule(rule) == "weight" and cfg.surrogate == "cispo":
        raise ValueError(f"surrogate: cispo clips to an interval, and rule {rule.name} gives weights; use ppo or gspo")
    return rule


def find_kernels(cfg: Config) -> None:
    """Raise ValueError when a kernel that was asked for by name is not installed."""
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "liger": "liger_kernel"}
    for key in ("attention", "logprob_kernel"):
        package = packages.get(getattr(cfg, key))
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{key}: {getattr(cfg, key)} needs the package {package}, which is not installed; install it, or take "
                f"the default, {getattr(Config(), key)}"
            )


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


def check_engine(cfg: Config, metrics: Mapping[str, float], step: int) -> None:
    """Raise EngineMismatch when the engine that sampled is not the policy that is trained, by the metrics of a step."""
    gap = metrics.get("mismatch/kl", 0.0)  # absent where no answer is of this step
    if not gap <= cfg.mismatch_limit:  # also when it is not a number
        raise EngineMismatch(
            f"step {step}: KL(sampler, trainer) is {gap:.3g} nats per token, mismatch_limit is {cfg.mismatch_limit}: "
            "the engine does not hold the trainer's weights, or computes with another precision"
        )
