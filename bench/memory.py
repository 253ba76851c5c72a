"""Peak memory of log-probs and entropy of a micro-batch, forward and backward: chunks of tokens versus all logits.

    python -m bench.memory [--tokens 4096 --vocab 151936 --hidden 2048 --dtype float32 --chunks 1024 512 256]

Each row is measured in a separate process: the peak of the allocator on a GPU, the peak resident set size on a CPU.
Memory in use before (states, head) and the head's float32 gradient are subtracted, since all methods need them. The
remainder is the logits, tensors derived from them and, with bfloat16 products, bfloat16 copies of the head and its
gradient. Seconds are wall-clock time, for orientation only.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from torch import Tensor

from bandpo.logprobs import token_logprobs

GIB = 1 << 30


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline: log-probs and entropy from the logits of all tokens, both (T,) float32."""
    table = (hidden @ weight.to(hidden.dtype).T).float().log_softmax(dim=-1)  # (T, V)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(dim=-1)
    return table.gather(1, targets[:, None]).squeeze(1), entropy


def measure(chunk: int, args: argparse.Namespace) -> tuple[int, float, float]:
    """Return (bytes, seconds, sum of log-probs) of one method. chunk: tokens per chunk; 0: the baseline."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, dtype=dtype, device=device).requires_grad_()
    weight = torch.empty(args.vocab, args.hidden, device=device).normal_(std=0.02).requires_grad_()
    targets = torch.randint(args.vocab, (args.tokens,), device=device)
    before, start = peak_bytes(device), time.perf_counter()
    if chunk:
        keys = {"temperature": 1.0, "vocab_size": args.vocab, "chunk_tokens": chunk}
        logprobs, _ = token_logprobs(hidden, weight, targets, **keys)
    else:
        logprobs, _ = all_logits(hidden, weight, targets)
    logprobs.sum().backward()
    size = peak_bytes(device) - before - weight.numel() * weight.element_size()
    return size, time.perf_counter() - start, logprobs.sum().item()


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "vocab": 151_936, "hidden": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the products")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 512, 256], help="tokens at a time")
    args = parser.parse_args()
    print(f"{args.tokens} tokens, {args.vocab:,} rows, hidden {args.hidden}, {args.dtype} products, float32 head")
    print(f"{'':>22}{'GiB':>8}{'seconds':>10}{'sum of log-probs':>20}")
    context = multiprocessing.get_context("spawn")
    for chunk in [0, *args.chunks]:
        name = f"chunks of {chunk}" if chunk else "all logits"
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                size, seconds, total = pool.submit(measure, chunk, args).result()
                print(f"{name:>22}{size / GIB:8.2f}{seconds:10.1f}{total:20.1f}", flush=True)
            except BrokenProcessPool:
                print(f"{name:>22}  died: out of memory?", flush=True)


if __name__ == "__main__":
    main()
