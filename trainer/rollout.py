"""Sampling responses: one inference engine per rank. The only file that imports vLLM.

    engine = make_engine("path/to/model", EngineOptions(engine="vllm", ...), rank=0, world=1, device="cuda")
    completions = engine.generate(prompts, sampling, seeds=[[1, 2], [3, 4]], on_finish=grade)
    engine.sleep(); ...; engine.wake()          # in between, its GPU memory is free for the trainer
    engine.sync_weights(named_tensors)          # after each step of updates
    engine.close()

`VllmEngine` runs vLLM inside the trainer's process, on a GPU or with the CPU build. `HfEngine` is the fallback without
vLLM: `generate` of transformers, one padded batch at a time. Both return the log-prob of each sampled token under the
sampling distribution (after temperature, top-p and top-k).

Not supported: inference servers, asynchronous rollouts, quantized engines, multi-modal prompts.

Axes: P prompts, S samples per prompt, T response tokens.
"""

import bisect
import gc
import logging
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.clock import gc_paused
from trainer.logging import format_error

OnFinish = Callable[[int, int, "Completion"], None]  # (prompt index, sample index, completion)
NamedTensors = Iterable[tuple[str, torch.Tensor]]
NOT_FINITE = "lower lr, or go back to an earlier checkpoint"  # advice for weights that are not finite
MOST_SEQUENCES = {"vllm": 1024, "hf": 256}  # maximum decoded at once; vllm: its default on an H100


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The generation_config of the model is ignored."""

    temperature: float  # > 0; log-probs are those of logits / temperature
    top_p: float  # 1.0: off
    top_k: int  # 0: off
    max_tokens: int  # maximum number of response tokens
    stop_token_ids: tuple[int, ...]  # ids that end a response; the id stays in it and is trained on
    stop: tuple[str, ...] = ()  # texts that end a response; the text stays in it and is trained on


@dataclass(slots=True)
class Completion:
    """One sampled response."""

    token_ids: list[int]  # (T,) including the stop token
    logprobs: list[float]  # (T,) nats, under the sampling distribution
    finish_reason: str  # "stop", or "length" if max_tokens truncated it
    text: str  # decoded without special tokens


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine."""

    engine: str  # vllm | hf
    dtype: str  # float32 | bfloat16
    vocab_size: int  # size of the tokenizer; extra rows of the model's head are never sampled
    max_model_tokens: int  # prompt + response
    max_sequences: int  # maximum number decoded at once
    memory_share: float  # share of a GPU's memory for weights and KV cache
    cpu_cache_bytes: int  # size of the KV cache on a CPU
    tensor_parallel: int  # ranks that share one engine
    arguments: dict[str, Any]  # additional arguments of vllm.LLM, which override those of `engine_arguments`
    trust_remote_code: bool


class EngineError(RuntimeError):
    """Raised if the engine does not start, or fails while sampling."""


class EngineMismatch(RuntimeError):
    """Raised if the policy in the engine differs from the trained policy."""


@contextmanager
def engine_errors(action: str, advice: Callable[[str], str] = lambda message: "") -> Iterator[None]:
    """Raise a one-line EngineError for an error of the engine inside the block."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        needed = "Triton compiles a launcher at the first kernel; install gcc and python3-dev (Python.h)"
        raise EngineError(f"{action}: {format_error(error, 200)}: {needed}") from error
    except ImportError as error:  # a package that only some models need
        raise EngineError(f"{action}: {format_error(error, 200)}; install the package, or use engine: hf") from error
    except (RuntimeError, ValueError, AssertionError, KeyError, OSError) as error:
        message = f"{action}: {type(error).__name__}: {format_error(error, 500)}"
        raise EngineError(message + advice(str(error))) from error


class Engine(Protocol):
    """Interface of the engines."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, *, seeds: list[list[int]], on_finish: OnFinish
    ) -> list[list[Completion]]:
        """Sample len(seeds[i]) responses to prompt i; call `on_finish` as each response finishes.

        Raises FloatingPointError for a log-prob that is not finite, EngineError if the engine fails.
        """
        ...

    def sync_weights(self, weights: NamedTensors) -> None:
        """Load new weights by Hugging Face name. Consumes the whole iterable."""

    def checksum(self, names: list[str]) -> dict[str, float]:
        """Return `weight_sum` of each named tensor in the engine. Names that the engine does not have are omitted."""
        ...

    def sleep(self) -> None:
        """Release GPU memory for the updates. Weights and KV cache are discarded. No effect on a CPU."""

    def wake(self) -> None:
        """Allocate the memory again. The engine has no weights until the next `sync_weights`."""

    def close(self) -> None:
        """Shut down, after the last collective."""


@gc_paused()
def make_engine(model: str, options: EngineOptions, *, rank: int, world: int, device: str) -> Engine:
    """Start the engine of this rank, after Accelerator(). model: a folder or hub id.

    Raises EngineError if the engine does not start.
    """
    kinds = {"vllm": VllmEngine, "hf": HfEngine}
    return kinds[options.engine](model, options, rank=rank, world=world, device=device)


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """Return the sum as a float64 scalar on the device.

    It is computed over 4,096 rows at a time, to avoid a float64 copy of a whole embedding.
    """
    return torch.stack([rows.sum(dtype=torch.float64) for rows in weight.split(4096)]).sum()


def read_sums(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Convert the sums to floats with one read from the device."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


# ---- vLLM ----


class VllmEngine:
    """vLLM in the trainer's process. It must be constructed after Accelerator(), whose process group it joins.

    Prevents two errors that vLLM does not report:

    - In the CPU build, a tied output head keeps old weights unless "lm_head.weight" is sent.
    - Prefixes cached under old weights are reused unless the cache is reset before sampling.

    vLLM seeds torch's global RNG at construction. Each sample has its own seed.
    """

    def __init__(self, model: str, options: EngineOptions, *, rank: int, world: int, device: str):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # same process: weights are passed by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # reports that a CPU has no Triton
        arguments = engine_arguments(model, options, world=world, device=device)
        self.eager = arguments["enforce_eager"]
        advice = partial(start_advice, arguments=arguments)
        with warnings.catch_warnings(), self._uncompiled(), engine_errors("vLLM could not start", advice):
            warnings.simplefilter("ignore", FutureWarning)  # from vLLM's own imports
            from vllm import LLM

            gc.collect()
            gc.freeze()  # vLLM collects garbage five times as it starts; skip the modules imported so far
            if device.startswith("cpu"):
                remove_shared_memory(rank, options.tensor_parallel)
            self.llm = LLM(**arguments, use_tqdm_on_load=False)
        self.tokenizer = self.llm.get_tokenizer()
        self.requests = 0
        self.asleep = False

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, *, seeds: list[list[int]], on_finish: OnFinish
    ) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        running: dict[str, tuple[int, int]] = {}  # request id -> (prompt index, sample index)
        results: list[list[Any]] = [[None] * len(row) for row in seeds]
        # Cached prefixes may belong to old weights. Those of an earlier call would also change the rounding.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine kept cached prefixes of an earlier call: a request is still running")
        with self._uncompiled():
            for i, j, seed in ((i, j, seed) for i, row in enumerate(seeds) for j, seed in enumerate(row)):
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_tokens,
                    stop_token_ids=list(sampling.stop_token_ids),
                    stop=list(sampling.stop),
                    skip_special_tokens=False,  # in the text that is searched for `stop`
                    ignore_eos=True,  # only stop_token_ids and stop end a response
                    seed=seed,  # a sample does not depend on the rest of the batch
                    logprobs=0,  # log-prob of the sampled token only
                    flat_logprobs=True,
                    detokenize=bool(sampling.stop),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,  # each request has its own
                )
                running[str(self.requests)] = (i, j)
                engine.add_request(str(self.requests), tokens_input(prompts[i]), params)
                self.requests += 1
            try:
                while engine.has_unfinished_requests():
                    with engine_errors("the engine failed while sampling"):
                        finished = engine.step()
                    for request in finished:
                        i, j = running.pop(request.request_id)
                        results[i][j] = self._completion(request.outputs[0], i, j)  # type: ignore[union-attr]
                        on_finish(i, j, results[i][j])
            finally:  # after an interrupt, no request may stay for the next call
                engine.abort_request(list(running))
        return results

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Context manager without torch.compile: with enforce_eager, vLLM would still compile a helper for 10 s."""
        return torch.compiler.set_stance("force_eager") if self.eager else nullcontext()

    def _completion(self, output: Any, i: int, j: int) -> Completion:
        token_ids, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
        if len(logprobs) != len(token_ids) or not all(-float("inf") < x <= 1e-6 for x in logprobs):
            raise FloatingPointError(
                f"the engine returned log-probs that are not finite for prompt {i}, sample {j}: {NOT_FINITE}"
            )
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(token_ids, logprobs, output.finish_reason, text)

    def sync_weights(self, weights: NamedTensors) -> None:
        # Copies into the existing tensors layer by layer, so CUDA graphs stay valid. The CPU build repacks matrices.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def checksum(self, names: list[str]) -> dict[str, float]:
        def sums(model: torch.nn.Module) -> dict[str, float]:
            own = dict(model.named_parameters())
            return read_sums({name: weight_sum(own[name]) for name in names if name in own and own[name].numel()})

        return self.llm.apply_model(sums)[0]

    def sleep(self) -> None:
        self.llm.sleep(level=2)  # discards the weights; the next sync loads all of them
        self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        self.wake()  # memory that is not mapped cannot be freed
        gc.freeze()  # saves one of the two garbage collections of the shutdown
        self.llm.llm_engine.engine_core.shutdown()  # private: vllm.LLM has no method for it


def remove_shared_memory(rank: int, group_size: int) -> None:
    """Remove this rank's shared memory of an earlier run.

    vLLM's CPU build uses the same names in all runs, does not remove the memory, and fails if it exists.
    """
    first = rank - rank % group_size
    ranks = "-".join(str(each) for each in range(first, first + group_size))
    for left in Path("/dev/shm").glob(f"*tp:*-[[]{ranks}]-cpushm_{rank - first}"):
        left.unlink()


def start_advice(message: str, arguments: dict[str, Any]) -> str:
    """Return advice for an error at vLLM's start, as the end of an error message."""
    if "inspected" in message:  # the model's class could not be imported
        return "; vLLM's class of this model needs a package, named in the log above: install it, or use engine: hf"
    if not re.search("memory|KV cache", message):
        return ""
    share = "" if "kv_cache_memory_bytes" in arguments else ", or raise engine_memory_share"
    return f"; lower max_response_tokens or `vllm: {{max_num_seqs: {arguments['max_num_seqs']}}}`{share}"


def engine_arguments(model: str, options: EngineOptions, *, world: int, device: str) -> dict[str, Any]:
    """Return the arguments of vllm.LLM on a device, cpu or cuda."""
    on_cpu = device.startswith("cpu")
    # The CPU build has no sleep mode, and its default KV cache takes most of the machine's memory. Its attention
    # computes whole blocks, so 32 tokens per block are faster than the default of 128. Chunked prefill fails for
    # requests with a seed.
    memory: dict[str, Any] = (
        {
            "kv_cache_memory_bytes": options.cpu_cache_bytes,
            "block_size": 32,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, options.max_model_tokens),
        }
        if on_cpu
        else {"gpu_memory_utilization": options.memory_share, "enable_sleep_mode": True}
    )
    return {
        **memory,
        "model": model,
        "dtype": options.dtype,
        "seed": 0,
        "max_model_len": options.max_model_tokens,
        "max_num_seqs": options.max_sequences,
        "tensor_parallel_size": options.tensor_parallel,
        "distributed_executor_backend": "external_launcher" if world > 1 else None,
        "logprobs_mode": "processed_logprobs",  # under the sampling distribution, not the raw logits
        "generation_config": "vllm",  # ignore the model's sampling defaults
        "trust_remote_code": options.trust_remote_code,
        "enforce_eager": on_cpu,
        "disable_log_stats": True,
        "logits_processors": [mask_beyond_tokenizer(options.vocab_size)],
        **options.arguments,
    }


def mask_beyond_tokenizer(vocab_size: int) -> type:
    """Return a logits processor for heads with more rows than the tokenizer has tokens (Qwen2.5: 151,936 and 151,665).

    The trainer masks the same rows. The class serves both model runners of vLLM: the CPU build uses the first base
    class, GPUs use the second. The second import is private, because vLLM has no public name for it.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor

    class MaskBeyondTokenizer(LogitsProcessor, SecondLogitsProcessor):
        def __init__(self, *settings: object):
            pass

        def apply(self, logits: torch.Tensor, *batch: object) -> torch.Tensor:
            logits[:, vocab_size:] = -float("inf")
            return logits

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: object) -> None:
            pass

    return MaskBeyondTokenizer


class SharedEngine:
    """Engine shared by several ranks (tensor parallelism): all compute all responses, each returns its own.

    `generate` is collective over every rank of the run, including ranks without prompts.
    """

    def __init__(self, engine: Engine, rank: int, ranks_per_engine: int, gather: Callable[[list[Any]], list[Any]]):
        self.engine, self.gather = engine, gather
        self.first = rank - rank % ranks_per_engine
        self.rank, self.end = rank, self.first + ranks_per_engine
        self.sync_weights, self.checksum = engine.sync_weights, engine.checksum
        self.sleep, self.wake, self.close = engine.sleep, engine.wake, engine.close

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, *, seeds: list[list[int]], on_finish: OnFinish
    ) -> list[list[Completion]]:
        of_ranks = self.gather([(prompts, seeds)])
        of_engine = of_ranks[self.first : self.end]
        before = sum(len(theirs) for theirs, _ in of_ranks[self.first : self.rank])
        mine = range(before, before + len(prompts))

        def finished(i: int, j: int, completion: Completion) -> None:
            if i in mine:
                on_finish(i - before, j, completion)

        completions = self.engine.generate(
            [prompt for theirs, _ in of_engine for prompt in theirs],
            sampling,
            seeds=[row for _, theirs in of_engine for row in theirs],
            on_finish=finished,
        )
        return [completions[i] for i in mine]


# ---- transformers ----


class HfEngine(Engine):
    """`generate` of transformers on a copy of the model. Slow, but runs wherever torch does."""

    def __init__(self, model: str, options: EngineOptions, *, rank: int, world: int, device: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        remote = options.trust_remote_code
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=remote)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, options.dtype), trust_remote_code=remote
        )
        self.model = loaded.to(device).eval()
        self.device, self.options = device, options

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], sampling: Sampling, *, seeds: list[list[int]], on_finish: OnFinish
    ) -> list[list[Completion]]:
        results: list[list[Any]] = [[None] * len(row) for row in seeds]
        jobs = [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        for start in range(0, len(jobs), self.options.max_sequences):
            chunk = jobs[start : start + self.options.max_sequences]
            i, j = chunk[0]
            done = self._generate_batch([prompts[i] for i, _ in chunk], sampling, seeds[i][j])
            for (i, j), completion in zip(chunk, done, strict=True):
                results[i][j] = completion
                on_finish(i, j, completion)
        return results

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Sample one padded batch, whose samples share one RNG seeded with `seed`."""
        from transformers import GenerationConfig

        vocab_size, width, pad = self.options.vocab_size, max(map(len, prompts)), 0  # any id: masks come from lengths

        def mask_beyond_tokenizer(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, vocab_size:] = -float("inf")
            if not scores.amax(-1).isfinite().all():  # amax propagates NaN
                raise FloatingPointError(f"the policy's logits are not finite: {NOT_FINITE}")
            return scores

        input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=pad,
            output_scores=True,
            return_dict_in_generate=True,
        )
        # generate() takes unset fields from the model's generation_config, so replace it by an empty one.
        self.model.generation_config = GenerationConfig()
        torch.manual_seed(seed)
        with engine_errors("the engine failed while sampling"):
            out = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=[mask_beyond_tokenizer],
            )
        sampled = out.sequences[:, width:]  # (P, T)
        scores = torch.stack(out.scores, dim=1).float().log_softmax(-1)  # (P, T, V) after temperature, top-p and top-k
        rows = zip(sampled.tolist(), scores.gather(-1, sampled[..., None]).squeeze(-1).tolist(), strict=True)
        done = []
        for ids, logprobs in rows:
            never = len(ids) + 1
            length = next((t for t, token in enumerate(ids, 1) if token in sampling.stop_token_ids), never)
            if sampling.stop:
                length = min(length, self._end_of_text(ids, sampling.stop))
            reason = "stop" if length < never else "length"
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            done.append(Completion(ids[:length], logprobs[:length], reason, text))
        return done

    def _end_of_text(self, ids: list[int], stop: tuple[str, ...]) -> int:
        """Return the number of tokens through the first text in `stop`; len(ids) + 1 if there is none."""

        def stopped(length: int) -> bool:
            text = self.tokenizer.decode(ids[:length])
            return any(each in text for each in stop)

        return bisect.bisect_left(range(1, len(ids) + 1), True, key=stopped) + 1

    def sync_weights(self, weights: NamedTensors) -> None:
        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)

    def checksum(self, names: list[str]) -> dict[str, float]:
        own = self.model.state_dict()
        return read_sums({name: weight_sum(own[name]) for name in names if name in own})
