"""An engine asked what matters: does it sample what the model says, take new weights, give its memory away and end?

    python tests/engine_script.py MODEL_FOLDER OTHER_WEIGHTS [--device cuda:0 --dtype bfloat16 --graphs --cycles 3]
    python tests/as_on_gpu.py tests/engine_script.py MODEL_FOLDER OTHER_WEIGHTS

Prints one JSON object. OTHER_WEIGHTS is a model of the same shape, handed over after each sleep. Ends while asleep.
"""

import argparse
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trainer.clock import memory_in_use_gib
from trainer.rollout import Completion, EngineOptions, Sampling, VllmEngine

TOKENS = 22  # of the tokenizer; the head has more rows
SAMPLING = Sampling(temperature=0.8, top_p=1.0, top_k=0, max_tokens=6, stop_token_ids=(1,))
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
SEEDS = [[1, 2], [3, 4], [5, 6]]


def gap(model: Any, prompts: list[list[int]], completions: list[list[Completion]]) -> float:
    """Largest difference between the engine's log-probs and those of transformers' model."""
    worst = 0.0
    for prompt, row in zip(prompts, completions, strict=True):
        for completion in row:
            tokens = completion.token_ids
            with torch.no_grad():
                ids = torch.tensor([prompt + tokens], device=model.device)
                logits = model(ids).logits[0, len(prompt) - 1 : -1, :TOKENS].float().cpu()
            expected = (logits / SAMPLING.temperature).log_softmax(-1)[range(len(tokens)), tokens]
            worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--cycles", type=int, default=1)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    options = EngineOptions(
        engine="vllm",
        dtype=arguments.dtype,
        vocab_size=TOKENS,
        max_model_tokens=32,
        max_sequences=8,
        memory_share=0.02,  # a large card's cache of a toy model has millions of blocks, an object each
        cpu_cache_bytes=50_000_000,
        tensor_parallel=1,
        arguments={"enforce_eager": not arguments.graphs} if arguments.device != "cpu" else {},
        trust_remote_code=False,
    )
    engine = VllmEngine(arguments.models[0], options, rank=0, world=1, device=arguments.device)

    def sample(order: list[int]) -> list[list[Completion]]:
        prompts, seeds = [PROMPTS[i] for i in order], [SEEDS[i] for i in order]
        return engine.generate(prompts, SAMPLING, seeds=seeds, on_finish=lambda *finished: None)

    together, again, alone = sample([0, 1, 2]), sample([2, 0]), sample([1])
    loaded: list[Any] = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in arguments.models]
    model, other = (each.to(device, dtype) for each in loaded)
    before = gap(model, PROMPTS, together)
    weights: list[tuple[str, Any]] = list(other.named_parameters())
    if other.config.tie_word_embeddings:
        weights.append(("lm_head.weight", other.get_input_embeddings().weight))
    in_use = []
    for _ in range(arguments.cycles):
        awake = memory_in_use_gib(device)
        engine.sleep()
        in_use.append((awake, memory_in_use_gib(device)))
        engine.wake()
        engine.sync_weights((name, weight.detach()) for name, weight in weights)
    after = sample([0, 1, 2])
    result = {
        "runner": type(engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__,
        "largest_id": max(t for row in together for c in row for t in c.token_ids),
        "gap_before": before,
        "gap_after_sync": gap(other, PROMPTS, after),
        "gap_to_old_weights": gap(model, PROMPTS, after),
        "same_in_another_batch": [
            one.token_ids == first.token_ids
            for row, firsts in zip([*again, *alone], [together[2], together[0], together[1]], strict=True)
            for one, first in zip(row, firsts, strict=True)
        ],
        "different_seeds_differ": together[0][0].token_ids != together[0][1].token_ids,
        "compared": sorted(engine.checksum([name for name, _ in weights])),
        "in_use_gib": in_use,
        "memory_share": options.memory_share,
    }
    engine.sleep()
    engine.close()
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
