"""Log-probs of given tokens and exact entropy from hidden states, without the logits of all tokens in memory.

    logprobs, entropy = token_logprobs(
        hidden, head.weight, targets, temperature=1.0, vocab_size=V, chunk_tokens=1024
    )

With 151,936 vocabulary rows, the float32 logits of 4,096 tokens take 2.5 GB, and softmax, entropy and gradient need
several such tensors. Here only the logits of `chunk_tokens` tokens exist at a time, and backward recomputes them.
`python -m bench.memory` measures both.

Matrix products use all rows of the head. Logits from `vocab_size` on are masked afterwards. A padded head (Qwen2.5:
151,936 rows for 151,665 tokens) aligns the rows of logits to 16 bytes, as cuBLAS's fast kernels require. A product with
the first `vocab_size` rows does not.

Not supported: heads with a bias or soft-capped logits (trainer/policy.py raises ValueError), a head sharded over the
vocabulary (tensor parallelism), second derivatives.

Axes: T tokens, H hidden size, V rows of the head, C tokens of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_TOKENS = 64  # tokens per softmax, to limit its copies of the logits


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Return log-probs of `targets` and entropy, both (T,) float32 in nats, with gradient to hidden states and head.

    hidden: (T, H) states that predict each target. head_weight: (V, H) unsharded tensor, tied to the embedding or not.
    Under FSDP, call this inside the forward of the module that owns it. targets: (T,) token ids below `vocab_size`.
    vocab_size: rows of the head from this index on are padding with probability 0 and gradient 0. Their weights must be
    finite. temperature: above 0; both results refer to the distribution at this temperature.

    Matrix products have the dtype of autocast if it is on, else that of `hidden`. Softmax, all sums and the head's
    gradient over chunks are float32. On a GPU, a bfloat16 product has float32 results. A CPU has no such kernel and
    rounds them to bfloat16. Log-probs are at most 0.
    """
    assert hidden.dim() == 2 and len(hidden) == len(targets), f"{tuple(hidden.shape)} states, {len(targets)} targets"
    assert vocab_size <= len(head_weight), f"vocab_size {vocab_size} is more than the head's {len(head_weight)} rows"
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _TokenLogprobs.apply(hidden, head_weight, targets, temperature, vocab_size, chunk_tokens, dtype)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, vocab_size, chunk_tokens, dtype):
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head_weight.to(dtype)
            logprobs, entropy, normalizers = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
            for start in range(0, len(targets), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                logits = _logits(hidden[chunk].to(dtype), weight, temperature)[:, :vocab_size]  # float32
                for first in range(0, len(logits), BLOCK_TOKENS):
                    block = logits[first : first + BLOCK_TOKENS]
                    rows = slice(start + first, start + first + len(block))
                    top = block.amax(dim=-1)
                    block -= top[:, None]
                    powers = block.exp()
                    total = powers.sum(dim=-1)
                    log_total = total.log()
                    logprobs[rows] = block.gather(1, targets[rows, None]).squeeze(1) - log_total
                    entropy[rows] = log_total - powers.mul_(block).sum(dim=-1) / total
                    normalizers[rows] = top + log_total
                del logits, block, powers  # free them before the next chunk allocates its own
        ctx.save_for_backward(hidden, head_weight, targets, normalizers, entropy)
        ctx.settings = (temperature, vocab_size, chunk_tokens, dtype)
        ctx.set_materialize_grads(False)  # the gradient of an unused entropy is None and is not computed
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, head_weight, targets, normalizers, entropy = ctx.saved_tensors
        temperature, vocab_size, chunk_tokens, dtype = ctx.settings
        grad_logprobs = torch.zeros_like(normalizers) if grad_logprobs is None else grad_logprobs
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head_weight.to(dtype)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for start in range(0, len(targets), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                states = hidden[chunk].to(dtype)
                logs = _logits(states, weight, temperature).sub_(normalizers[chunk, None])  # (C, V) float32, ln p
                scale = grad_logprobs[chunk, None] / temperature
                if grad_entropy is None:
                    probs = logs.exp_().mul_(-scale)
                else:  # d entropy / d logit = -p (ln p + entropy) / temperature
                    of_entropy = grad_entropy[chunk, None] / temperature
                    probs = logs.exp().mul_(logs.add_(entropy[chunk, None]).mul_(of_entropy).add_(scale).neg_())
                probs[:, vocab_size:] = 0
                grad_logits = probs.scatter_add_(1, targets[chunk, None], scale).to(dtype)
                grad_hidden[chunk] = grad_logits @ weight
                if grad_weight is not None and dtype == torch.float32:  # no second tensor of the head's size
                    grad_weight.addmm_(grad_logits.T, states)
                elif grad_weight is not None:
                    grad_weight += _product(grad_logits.T, states)
                del logs, probs, grad_logits
        grad_weight = None if grad_weight is None else grad_weight.to(head_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _logits(states: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return (C, V) float32 logits at the temperature."""
    return _product(states, weight.T).div_(temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with float32 result. Rounding logits to bfloat16 would change them by 0.01 to 0.05."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        return (left @ right).float()
    return torch.mm(left, right, out_dtype=torch.float32)
