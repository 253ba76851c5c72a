"""What a GPU has to show: the operator, the log-prob and update phases, then whole steps with vLLM.

    python -m bench.workload --size 3b --out build/3b       # random weights in the shape of Qwen2.5-3B, made once
    python -m bench.gpu --model build/3b                    # everything; or a part, each of which ends within minutes:
    python -m bench.gpu --model build/3b --parts phases --variants attention=sdpa
    python -m bench.gpu --size 1m --prompts 4 --samples 2 --tokens 32 --mean 16 --prompt_tokens 20    # on a CPU

Parts: `operator`; `phases` on answers that are made up (geometric lengths with mean --mean), with what is configured by
default and then with each of --variants; `steps` with vLLM: rollout, sleep and wake, sync, memory. Every measurement is
a process of its own; one that fails is reported and the next one starts. Figures are
appended to --out as well, a JSON line each, with hardware and versions.

Aims on an H200 at 3B: update at least 300 model TFLOP/s, old log-probs 350, sync 0.25 s.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.band import METHODS, bounds_of
from bench.step import table
from bench.workload import make_workload

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "vllm", "flash-attn")
PARTS = ("operator", "phases", "steps")
VARIANTS = ("", "attention=sdpa", "gradient_checkpointing=false")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder made by bench.workload; else one of --size is made")
    parser.add_argument("--size", default="3b", help="a name of bench.workload.SIZES")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens at most")
    parser.add_argument("--mean", type=int, default=700, help="response tokens of made-up answers")
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--micro_batch_tokens", type=int, default=32768)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, metavar="KEY=VALUE", help="of the phases")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.jsonl", help="JSON lines are appended")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    failed = 0
    if "operator" in options.parts:
        found = operator(1 << 20)
        print("bounds of a million tokens, ms: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
        keep(options.out, "operator", {f"{name}_ms": value for name, value in found.items()})
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if not model and set(options.parts) - {"operator"}:
            model = make_workload(Path(folder), options.size, max(64, 3 * options.prompts), options.prompt_tokens)
        shared = ["--model", str(model), "--steps", "2"]
        for name in ("prompts", "samples", "tokens", "prompt_tokens"):
            shared += [f"--{name}", str(getattr(options, name))]
        keys = ["--set", f"micro_batch_tokens={options.micro_batch_tokens}"]
        for variant in options.variants if "phases" in options.parts else ():
            name = f"phases without an engine, {variant or 'as configured'}"
            words = [*shared, "--synthetic", str(options.mean), *keys, *filter(None, [variant])]
            failed += not measured(name, words, options.out)
        if "steps" in options.parts:
            failed += not measured("whole steps with vLLM, all answers of full length", [*shared, *keys], options.out)
    return int(failed > 0)


def measured(name: str, words: list[str], out: Path) -> bool:
    """Run bench.step in a process of its own and print its table; whether it succeeded."""
    print(f"\n{name}", flush=True)
    line = [sys.executable, "-m", "bench.step", "--json", *words]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"failed with exit code {done.returncode}: {name}", flush=True)
        return False
    result = json.loads(done.stdout.splitlines()[-1])
    print(table(result), flush=True)
    keep(out, name, result)
    return True


def keep(out: Path, part: str, figures: dict[str, float]) -> None:
    """A JSON line for each figure."""
    with out.open("a") as file:
        for name, value in figures.items():
            file.write(json.dumps({"part": part, "figure": name, "value": value, "on": machine()}) + "\n")


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


def operator(tokens: int) -> dict[str, float]:
    """Milliseconds to compute the bounds of this many tokens, by method of bench/band.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.rand(tokens, device=device).log()
    return {method: 1e3 * seconds(partial(bounds_of(method), old)) for method in METHODS}


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
