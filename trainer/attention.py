"""Attention kernel of a policy, and layout of its sequences.

    layout = set_attention(causal_lm, "auto", "bfloat16")     # padded | packed | by_sequence (model_inputs)

Packed sequences are concatenated in one row. Attention kernels keep them separate. Linear attention and convolution
layers (Qwen3.5, LFM2, Mamba hybrids) mix them, which `keeps_packed_sequences_apart` detects. docs/quickstart.md lists
the tested models.
"""

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn


class NotForwarded(Exception):
    """Raised if the model does not pass `sequences` and `places` to its attention."""


def set_attention(causal_lm: Any, attention: str, precision: str) -> str:
    """Set the attention kernel of a model on the CPU; return the layout: packed, by_sequence or padded.

    auto: packs if the model keeps packed sequences apart, else pads. Packing uses flash attention if it is installed, a
    GPU is available and `precision` is bfloat16. Raises ValueError for a kernel that the model does not support.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available

    register_attention()
    auto, flash = attention == "auto", attention.startswith("flash")
    packs = (auto or flash) and _use(causal_lm, "sdpa_by_sequence") and keeps_packed_sequences_apart(causal_lm)
    if flash and not packs:
        raise ValueError(
            f"attention: {attention} packs sequences, which this model's layers would mix; use auto, sdpa or eager"
        )
    has_flash = torch.cuda.is_available() and is_flash_attn_2_available() and precision == "bfloat16"
    packed = ["flash_attention_2" if has_flash else "sdpa_by_sequence"] if packs else []
    for kernel in [*packed, "sdpa", "eager"] if auto else [attention]:
        if _use(causal_lm, kernel):
            return "by_sequence" if kernel == "sdpa_by_sequence" else "packed" if "flash" in kernel else "padded"
    raise ValueError(f"attention: this model does not support {attention}; use auto")


def _use(causal_lm: Any, kernel: str) -> bool:
    """Set the kernel; return False if the model does not support it."""
    try:
        causal_lm.set_attn_implementation(kernel)
    except ValueError:
        return False
    return causal_lm.config.get_text_config()._attn_implementation == kernel  # some models only log a warning


@torch.no_grad()
def keeps_packed_sequences_apart(causal_lm: Any) -> bool:
    """Return True if the hidden states of a packed sequence do not depend on the sequence before it.

    Separate sequences give bitwise equal hidden states, up to the summation order in mixtures of experts. In randomly
    initialized models of 14 architectures that mix sequences, they changed by 0.1 to 1 of their norm.
    """
    hidden = []
    for first in ([1, 2, 3, 4], [8, 7, 6, 5]):
        inputs = model_inputs([[1, 2], [5, 6]], [first, [9, 8, 7, 6]], layout="by_sequence", device=causal_lm.device)
        inputs = {name: value for name, value in inputs.items() if name not in ("predictors", "targets")}
        try:
            out = causal_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state
        except NotForwarded:
            return False
        hidden.append(out[0, -5:].float())
    return bool((hidden[0] - hidden[1]).norm() <= torch.finfo(causal_lm.dtype).eps ** 0.5 * hidden[0].norm())


def model_inputs(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], *, layout: str, device: torch.device
) -> dict[str, Any]:
    """Build the input tensors of a `MicroBatch`. The last token of a response is not an input: it predicts nothing.

    padded: (n, L), for any attention. packed: (1, P), for kernels that find sequence boundaries in `position_ids`.
    by_sequence: (1, P), for attention_by_sequence. The common prefix of a prompt and the previous one is packed once.
    """
    inputs = [r[:-1] for r in responses]
    width = max(len(p) + len(r) for p, r in zip(prompts, inputs, strict=True))
    pieces: list[list[int]] = []  # tokens, in order
    starts: list[int] = []  # position of each piece in its sequence
    places: list[Tensor] = []  # (length,) flat position of each token of a sequence
    end = 0
    for i, (p, r) in enumerate(zip(prompts, inputs, strict=True)):
        shared = len(commonprefix([p, prompts[i - 1]])) if layout == "by_sequence" and i else 0
        own = [*p[shared:], *r]
        places.append(torch.cat([*(place[:shared] for place in places[-1:]), torch.arange(end, end + len(own))]))
        end += len(own)
        pieces.append(own)
        starts.append(shared)
        if layout == "padded":
            pieces.append([0] * ((i + 1) * width - end))
            starts.append(len(p) + len(r))
            end = (i + 1) * width
    shape = (len(inputs), width) if layout == "padded" else (1, end)
    position_ids = torch.cat([torch.arange(s, s + len(piece)) for s, piece in zip(starts, pieces, strict=True)])
    tensors: dict[str, Tensor | None] = {
        "input_ids": torch.tensor([token for piece in pieces for token in piece]).view(shape),
        "position_ids": position_ids.view(shape),
        "predictors": torch.cat([place[len(p) - 1 :] for p, place in zip(prompts, places, strict=True)]),
        "targets": torch.tensor([token for r in responses for token in r]),
        "attention_mask": None,
    }
    if layout == "padded":
        lengths = torch.tensor([len(place) for place in places])
        tensors["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    elif layout == "by_sequence":
        first = torch.empty(end, dtype=torch.long)
        for i in reversed(range(len(places))):
            first[places[i]] = torch.arange(i * width, i * width + len(places[i]))
        tensors["sequences"] = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)  # (n, L)
        tensors["places"] = first
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


def attention_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    sequences: Tensor | None = None,
    places: Tensor | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal SDPA over packed positions: unpack (1, heads, P, d) to padded sequences, repack to (1, P, heads, d).

    The other operations of a layer, nearly all of its compute, see no padding and process a shared prompt once. Padding
    is on the right, where causal attention ignores it. Raises NotForwarded without `sequences` or `places`.
    """
    if sequences is None or places is None:
        raise NotForwarded

    def unpack(states: Tensor) -> Tensor:
        # Embedding lookup instead of indexing: its backward pass is fast on a CPU too.
        rows = nn.functional.embedding(sequences, states[0].transpose(0, 1).flatten(1))  # (N, L, heads * d)
        return rows.unflatten(-1, states.shape[1::2]).transpose(1, 2)  # (N, heads, L, d)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mask = None
    if sliding_window is not None and sequences.shape[1] > sliding_window:
        position = torch.arange(sequences.shape[1], device=query.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < sliding_window)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out, _ = sdpa(module, unpack(query), unpack(key), unpack(value), mask, **settings)  # (N, L, heads, d)
    return nn.functional.embedding(places, out.flatten(0, 1).flatten(1)).unflatten(-1, out.shape[2:])[None], None


def register_attention() -> None:
    """Register `sdpa_by_sequence` as an attn_implementation of transformers."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("sdpa_by_sequence", attention_by_sequence)
