"""What a GPU has to show, in one call: the operator, the log-prob and update phases, then whole steps with vLLM.

    python -m bench.gpu | tee gpu.txt        # random weights in the shape of Qwen2.5-3B; nothing is downloaded
    python -m bench.gpu --skip_vllm          # where vLLM is not installed
    python -m bench.gpu --size 1m --prompts 4 --samples 2 --tokens 32 --mean 16 --prompt_tokens 20    # on a CPU

The phases first, on answers that are made up (geometric lengths with mean --mean), in what is configured by default and
with each of --variants; then with vLLM: rollout, sleep and wake, sync, memory. Every part is a process of its own; one
that fails is told and the next one goes on.

Aims on an H200 at 3B: update at least 300 model TFLOP/s, old log-probs 350, sync under 1 s.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bandpo.objective import clip_bounds
from bench.workload import make_workload

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "vllm", "flash-attn", "liger-kernel")
VARIANTS = ("", "packing=off", "gradient_checkpointing=false", "compile=true", "logprob_kernel=liger")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b", help="a name of bench.workload.SIZES")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens at most")
    parser.add_argument("--mean", type=int, default=700, help="response tokens of made-up answers")
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--micro_batch_tokens", type=int, default=32768)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, metavar="KEY=VALUE", help="of the phases")
    parser.add_argument("--skip_vllm", action="store_true")
    options = parser.parse_args()
    print(machine(), flush=True)
    print(operator(), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_workload(Path(folder), options.size, max(64, 3 * options.prompts), options.prompt_tokens)
        shared = ["--model", str(model), "--steps", "2"]
        for name in ("prompts", "samples", "tokens", "prompt_tokens"):
            shared += [f"--{name}", str(getattr(options, name))]
        keys = ["--set", f"micro_batch_tokens={options.micro_batch_tokens}"]
        for variant in options.variants:
            print(f"\nphases without an engine, {variant or 'as configured'}", flush=True)
            failed += run([*shared, "--made_up", str(options.mean), *keys, *filter(None, [variant])])
        if not options.skip_vllm:
            print("\nwhole steps with vLLM, all answers as long as may be", flush=True)
            failed += run([*shared, *keys])
    return int(failed > 0)


def run(words: list[str]) -> int:
    """bench.step in a process of its own; 1 when it failed."""
    done = subprocess.run([sys.executable, "-m", "bench.step", *words], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    table = [i for i, line in enumerate(lines) if "M parameters, " in line]  # after what the trainer prints
    print("\n".join(lines[table[0] :]) if table else done.stderr[-2000:], flush=True)
    return int(done.returncode != 0)


def machine() -> str:
    """Hardware and versions."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}; Python {platform.python_version()}, {', '.join(versions)}"


def operator() -> str:
    """Milliseconds to compute the bounds of a million tokens, by method."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.rand(1 << 20, device=device).log()
    lines = [f"bounds of {len(old):,} tokens, ms:"]
    for clip, divergence in (("fixed", "kl"), ("dcpo", "kl"), ("band", "kl"), ("band", "tv"), ("band", "chi2")):

        def bounds(clip: str = clip, divergence: str = divergence) -> object:
            settings = {"ratio_cap": 10.0, "clip_low": 0.2, "clip_high": 0.2}
            return clip_bounds(old, clip=clip, delta=0.05, divergence=divergence, **settings)

        lines.append(f"{clip} {divergence} {1e3 * seconds(bounds):.3f}")
    return " ".join(lines)


def seconds(function: Callable[[], object]) -> float:
    """The fastest of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
