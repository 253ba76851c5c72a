"""The gradients of an update by the trainer's own code, on however many processes the launcher started.

    [tests/ranks.py 2] tests/gradient_script.py OUTPUT_FOLDER SHARDING[,SHARDING] MODEL_FOLDER...

Collates and backpropagates the sequences of tiny.ragged through train.py's `collate` and `optimize`, for every loss
aggregation and several `micro_batch_tokens`; rank 0 writes the full gradients, and the policy as a checkpoint would.
Half of the sequences have no advantage: without a KL term they need no backward pass.
"""

import math
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tiny import make_sample, policy_options, ragged
from torch.distributed.tensor import DTensor

import train
from configs import load
from configs.schema import Config, Plan
from trainer.policy import Policy
from trainer.preflight import check_processes, find_rule
from trainer.ranks import Ranks
from trainer.run import Run
from trainer.types import MicroBatch, Sample, State

AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm")
BUDGETS = (32, 64, 4096)
SETTINGS = [(f"{aggregation} {budget}", aggregation, budget, 0.0) for aggregation in AGGREGATIONS for budget in BUDGETS]
SETTINGS += [(f"with_kl {budget}", AGGREGATIONS[0], budget, 0.1) for budget in BUDGETS]
LONGEST = 24
PROMPTS, SAMPLES = 4, 4


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the full gradients in place of a step."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.seen = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone() for p in parameters]


def samples() -> list[Sample]:
    """Sorted by length, so that the first rank has all the short ones: the worst case for equal counts."""
    rows = sorted(ragged(PROMPTS * SAMPLES, longest=LONGEST), key=lambda s: len(s[1]))
    return [make_sample(p, r, index=i, advantage=a if i // SAMPLES % 2 else 0.0) for i, (p, r, a) in enumerate(rows)]


def without_reference(batch: MicroBatch, kl_coef: float) -> MicroBatch:
    """The micro-batch with old log-probs of the update itself, and a reference where there is a KL term."""
    return replace(batch, ref_logprobs=batch.rollout_logprobs) if kl_coef else batch


def part_of_a_run(cfg: Config, plan: Plan, policy: Policy, recorder: Recorder, accelerator: Accelerator) -> Run:
    """What `collate` and `optimize` need of a run; the rest is left out."""
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Run))
    parts |= {"cfg": cfg, "plan": plan, "policy": policy, "optimizer": recorder, "ranks": Ranks(accelerator)}
    return Run(**{**parts, "state": State(), "rule": find_rule(cfg)})


def main(out: str, shardings: str, *models: str) -> None:
    accelerator = Accelerator()
    check_processes(accelerator)
    for sharding, model in product(shardings.split(","), models):
        write_gradients(model, Path(out), sharding, accelerator)


def write_gradients(model: str, out: Path, sharding: str, accelerator: Accelerator) -> None:
    checkpointing = sharding == "fsdp2"  # must change nothing
    options = policy_options(sharding=sharding, attention="auto", gradient_checkpointing=checkpointing)
    policy = Policy.load(model, options, accelerator, trainable=True)
    if sharding == "fsdp2":
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        if accelerator.num_processes > 1:
            assert all(p.to_local().numel() < p.numel() for p in policy.parameters() if isinstance(p, DTensor))
    names = [name for name, _ in policy.causal_lm.named_parameters()]
    result: dict[str, dict[str, torch.Tensor]] = {}
    passes: list[int] = []  # backward passes of the model
    policy.causal_lm.get_input_embeddings().register_full_backward_hook(lambda *_: passes.append(1))
    for name, aggregation, budget, kl_coef in SETTINGS:
        overrides = [
            f"--loss_aggregation={aggregation}",
            f"--micro_batch_tokens={budget}",
            f"--sharding={sharding}",
            f"--kl_coef={kl_coef}",
            "--max_rollout_kl=1e9",
        ]
        fixed = f"--prompts_per_step={PROMPTS} --samples_per_prompt={SAMPLES} --minibatches=1 --grad_clip=1e9"
        lengths = f"--epochs=1 --max_prompt_tokens=8 --max_response_tokens={LONGEST}"
        cfg = load(Config, ["--config", "demo_band.yaml", *overrides, *fixed.split(), *lengths.split()])
        plan = Plan(cfg)
        recorder = Recorder(policy.parameters(), lr=0.0)
        run = part_of_a_run(cfg, plan, policy, recorder, accelerator)
        share = PROMPTS * SAMPLES // plan.processes
        minibatches = train.make_minibatches(run, samples()[plan.rank * share : (plan.rank + 1) * share])
        minibatches = [[without_reference(batch, kl_coef) for batch in minibatch] for minibatch in minibatches]
        counts = run.ranks.gather([len(minibatches[0])])
        assert len(set(counts)) == 1, f"micro-batches per rank: {counts}"
        passes.clear()
        stats = train.update_policy(run, minibatches)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in recorder.seen))
        assert abs(stats.grad_norms[0] - norm) < 1e-5 * norm  # the reported norm is of the full gradient
        result[name] = dict(zip(names, recorder.seen, strict=True))
        result[name]["loss"] = torch.tensor(run.ranks.all_reduce_sum({"loss": (stats.loss, 1)})["loss"][0])
        result[name]["counts"] = torch.tensor(counts)
        result[name]["spared"] = torch.tensor(len(minibatches[0]) - len(passes))
    weights = policy.full_weights()
    if accelerator.is_main_process:
        name = f"{Path(model).name}_{sharding}_{accelerator.num_processes}"
        torch.save(result, out / f"{name}.pt")
        policy.write(out / f"{name}_policy", weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
