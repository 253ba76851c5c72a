"""What a step would wait for on 8, 64 and 512 GPUs, on paper: nothing here was measured on a GPU by us.

    python -m bench.on_paper [--gpus 8,64,512] [--config qwen3b_band.yaml] [--token_ms 5.5]

Starts from the times that were published for the same work on 8 H200 with another trainer (PUBLISHED) and from the
work that the configuration asks for, and splits each phase into what n GPUs share and what they all wait for:

    rollout      work / n + tail: the longest answer is decoded token by token, whatever else is done
    updates      work / n, but no less than the time to gather weights and to scatter gradients, which is hidden behind
                 the work while it is shorter
    passes       the same for the forward passes: old log-probs and the reference
    sync         every rank receives all weights, in the engine's precision
    verifier     what remains to be graded when the last answer is there: one answer of each worker

A rank receives (n - 1) / n of what it gathers over its slowest link: NVLink within a machine, the network beyond.
"""

import argparse
import math
from dataclasses import dataclass

from configs import load
from configs.memory import MODELS, Size
from configs.schema import Config

GPUS_A_MACHINE = 8
NVLINK, NETWORK = 450e9, 50e9  # bytes a second into one GPU, of an H200 machine with 400 Gbit/s a GPU; datasheets
ANSWERS_A_SECOND = 490  # of one verifier process on mixed answers: the lowest of docs/LOG.md

# arXiv 2603.04918's log of its main run, means of steps 1 to 4: verl on 8 H200, 4,096 sequences of 704 response tokens.
PUBLISHED_GPUS, PUBLISHED_S = 8, {"rollout": 36.6, "passes": 12.6 + 13.0, "updates": 42.5}
SEQUENCE_TOKENS = 874  # of prompt and answer, mean


@dataclass(frozen=True)
class Step:
    """Seconds of the phases of a step, and of the rollout's tail."""

    rollout: float
    tail: float  # of the rollout: decoding the longest answer
    passes: float
    updates: float
    sync: float
    verifier: float
    gathers_wait: float  # of passes and updates: gathering that is longer than the work it hides behind

    @property
    def whole(self) -> float:
        return self.rollout + self.passes + self.updates + self.sync + self.verifier


def estimate(cfg: Config, size: Size, gpus: int, token_s: float) -> Step:
    """One step of `cfg` on `gpus` GPUs. token_s: seconds of one token of a sequence that is decoded almost alone."""
    tail = cfg.max_response_tokens * token_s
    share = PUBLISHED_GPUS / gpus
    link = NVLINK if gpus <= GPUS_A_MACHINE else NETWORK
    received = (gpus - 1) / gpus / link  # seconds for each byte that is gathered
    sequences = cfg.prompts_per_step * cfg.samples_per_prompt
    # Every update has a micro-batch at least, on every rank.
    cut = sequences * SEQUENCE_TOKENS / gpus / cfg.micro_batch_tokens / cfg.updates_per_step
    micro_batches = cfg.updates_per_step * math.ceil(cut)
    forward = 2 * size.parameters * received  # a gather in bfloat16
    backward = (2 + 4) * size.parameters * received  # the gather again, and gradients in float32
    work = {phase: seconds * share for phase, seconds in PUBLISHED_S.items()}
    passes_gather = (1 - 1 / cfg.updates_per_step + (cfg.kl_coef > 0)) * micro_batches * forward
    updates_gather = micro_batches * (forward + backward)
    passes, updates = max(work["passes"], passes_gather), max(work["updates"], updates_gather)
    return Step(
        rollout=max(0.0, PUBLISHED_S["rollout"] - tail) * share + tail,
        tail=tail,
        passes=passes,
        updates=updates,
        sync=2 * size.parameters * received,
        verifier=1 / ANSWERS_A_SECOND,
        gathers_wait=passes - work["passes"] + updates - work["updates"],
    )


def table(cfg: Config, size: Size, gpus: list[int], token_s: float) -> str:
    rows = [
        "| GPUs | sequences a GPU | step, s | rollout | of it the tail | passes | updates | of both, gathers | sync |"
    ]
    rows.append("|" + "---|" * 9)
    for n in gpus:
        step = estimate(cfg, size, n, token_s)
        seconds = [step.rollout, step.tail, step.passes, step.updates, step.gathers_wait, step.sync]
        sequences = cfg.prompts_per_step * cfg.samples_per_prompt / n
        rows.append(f"| {n} | {sequences:.0f} | {step.whole:.0f} | " + " | ".join(f"{s:.2g}" for s in seconds) + " |")
    return "\n".join(rows)


def enough_gpus(cfg: Config, token_s: float) -> float:
    """The number of GPUs at which a rollout's tail is as long as the work that the GPUs share."""
    tail = cfg.max_response_tokens * token_s
    return PUBLISHED_GPUS * (PUBLISHED_S["rollout"] - tail) / tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="8,64,512")
    parser.add_argument("--config", default="qwen3b_band.yaml")
    parser.add_argument("--token_ms", type=float, default=5.5, help="a token of a sequence decoded almost alone, ms")
    options = parser.parse_args()
    cfg, token_s = load(Config, ["--config", options.config]), options.token_ms / 1000
    print(table(cfg, MODELS[cfg.model], [int(n) for n in options.gpus.split(",")], token_s))
    print(f"\nThe tail is as long as the shared work at {enough_gpus(cfg, token_s):.0f} GPUs.")


if __name__ == "__main__":
    main()
