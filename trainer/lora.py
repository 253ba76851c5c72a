"""LoRA (arXiv 2106.09685) with peft: train adapters of linear layers, keep the start model frozen.

add_adapters(causal_lm, lora)                       # in place
for name, weight in merged(causal_lm): ...          # Hugging Face names, each weight with its adapter merged
write_adapters(folder, lora, adapters)              # for a checkpoint, in peft's format
reference = StartModel(policy)                      # the same policy without adapters, for the KL term
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "adapter_model.safetensors"  # peft's name
PREFIX = "base_model.model."  # prefix of peft's weight names


@dataclass(frozen=True)
class Lora:
    """LoRA settings. rank, alpha, targets: config keys lora_*. folder: saved adapters to load; None: new adapters."""

    rank: int
    alpha: float
    targets: str | list[str]
    seed: int
    folder: Path | None

    def peft_config(self) -> Any:
        from peft import LoraConfig

        targets = [self.targets] if isinstance(self.targets, str) and self.targets != "all-linear" else self.targets
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]


def add_adapters(causal_lm: Any, lora: Lora) -> None:
    """Freeze the model and add float32 adapters in place. New adapters do not change the output before an update.

    Raises ValueError if peft cannot adapt `lora.targets`, or if one of them is an embedding or the head.
    """
    from peft import inject_adapter_in_model

    causal_lm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        try:
            inject_adapter_in_model(lora.peft_config(), causal_lm)
        except ValueError as error:
            raise ValueError(f"lora_targets: {error}; name linear layers of the model, or use all-linear") from None
    own = {name: parameter for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}
    if hasattr(causal_lm.get_output_embeddings(), "base_layer") or any(".lora_embedding" in name for name in own):
        raise ValueError(
            f"lora_targets: embeddings and head cannot have adapters (got {lora.targets}); name other layers"
        )
    saved = load_file(lora.folder / FILE) if lora.folder else {}
    for name, parameter in own.items():
        parameter.data = (saved[saved_name(name)] if lora.folder else parameter.data).float()


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def saved_name(name: str) -> str:
    """Return the name of an adapter weight in peft's files."""
    return PREFIX + name.replace(".default", "")


def plain_name(name: str) -> str:
    """Return the name of a weight in the model without adapters."""
    return name.replace(".base_layer", "")


@torch.no_grad()
def merged(causal_lm: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its Hugging Face name, with its adapter merged. Sharded weights stay sharded."""
    for name, parameter in causal_lm.named_parameters():
        layer, adapted, _ = name.partition(".base_layer.weight")
        if adapted:
            yield plain_name(name), parameter + causal_lm.get_submodule(layer).get_delta_weight("default")
        elif not is_adapter(name):
            yield plain_name(name), parameter


def write_adapters(folder: Path, lora: Lora, adapters: dict[str, Tensor]) -> None:
    """Write a folder that peft and vLLM can load with the start model. adapters: weights by name in the model."""
    lora.peft_config().save_pretrained(folder)
    save_file({saved_name(name): weight.contiguous() for name, weight in adapters.items()}, folder / FILE)


class StartModel:
    """Start model as reference policy: the policy with its adapters disabled, without a second copy in memory."""

    def __init__(self, policy: Any):
        self.policy: Callable[[Any], tuple[Tensor, Tensor]] = policy
        self._layers = [layer for layer in policy.causal_lm.modules() if hasattr(layer, "base_layer")]

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.policy(batch)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Disable the adapters inside the block."""
        # peft's enable_adapters() also freezes the adapters, and FSDP keeps the requires_grad of its first pass.
        for layer in self._layers:
            layer._disable_adapters = True
        yield
        for layer in self._layers:
            layer._disable_adapters = False
