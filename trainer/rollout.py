"""Sampling answers: one inference engine per rank, and the only file that knows vLLM.

    engine = make_engine("path/to/model", EngineOptions(engine="vllm", ...), rank=0, world=1, device="cuda")
    completions = engine.generate(prompts, sampling, seeds=[[1, 2], [3, 4]], on_finish=grade, progress=None)
    engine.sleep(); ...; engine.wake()          # its memory belongs to the trainer in between
    engine.sync_weights(named_tensors)          # after every policy update
    engine.close()

`VllmEngine` runs vLLM inside the trainer's process, on the GPU and on the CPU build alike; `HfEngine` is the fallback
for machines where vLLM cannot run: transformers' own `generate`, one padded batch at a time. Both return the log-prob
of every sampled token under the distribution it was sampled from (after temperature, top-p and top-k).

Left out: servers on other machines, asynchronous rollouts, quantised engines, multi-modal prompts.

Axes: P prompts, S samples of a prompt, T response tokens.
"""

import gc
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trainer.imports import quick_imports

OnFinish = Callable[[int, int, "Completion"], None]  # (prompt index, sample index, completion)
NamedTensors = Iterable[tuple[str, torch.Tensor]]
NOT_FINITE = "lower lr, or go back to an earlier checkpoint"  # what there is to do
MOST_SEQUENCES = {"vllm": 1024, "hf": 256}  # decoded at once; vLLM's own default on an H100, and a batch of `generate`


@dataclass(frozen=True)
class Sampling:
    """How to sample. Every field is explicit, so that nothing of the model's own generation_config leaks in."""

    temperature: float  # > 0; log-probabilities are those of logits / temperature
    top_p: float  # 1.0 = off
    top_k: int  # 0 = off
    max_tokens: int  # response tokens at most
    stop_token_ids: tuple[int, ...]  # sampling one of these, and nothing else, ends the answer; it stays and is trained


@dataclass(slots=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]  # (T,) the stop token included
    logprobs: list[float]  # (T,) nats, of the sampled tokens, under the sampling distribution
    finish_reason: str  # "stop", or "length" when max_tokens cut it
    text: str  # decoded without special tokens


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs beyond the model."""

    engine: str  # vllm | hf
    dtype: str  # float32 | bfloat16
    vocab_size: int  # tokens of the tokenizer; rows of the model's head beyond them are never sampled
    max_model_tokens: int  # prompt + response
    max_sequences: int  # decoded at once
    memory_share: float  # share of a GPU's memory for the engine (weights + KV cache)
    cpu_cache_bytes: int  # KV cache on a CPU
    tensor_parallel: int  # ranks that hold one engine together
    arguments: dict[str, Any]  # further arguments of vllm.LLM, which override those of this file
    trust_remote_code: bool


class EngineError(RuntimeError):
    """The engine did not start or failed while it sampled; the text has its own words, the cause its traceback."""


@contextmanager
def _failing_as_one() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        raise EngineError(f"the engine failed while sampling: {type(error).__name__}: {error}") from error


class Engine(Protocol):
    """What the trainer and the evaluation ask of an engine."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[list[int]],
        on_finish: OnFinish | None,
        progress: Callable[[int], object] | None,
    ) -> list[list[Completion]]:
        """Sample len(seeds[i]) answers to prompt i; both callbacks run as answers finish, progress(1) for each.

        Raises FloatingPointError for a log-probability that is not finite, EngineError when the engine fails.
        """
        ...

    def sync_weights(self, weights: NamedTensors) -> None:
        """Load new weights under Hugging Face names; consumes the whole iterable."""
        ...

    def checksum(self, names: list[str]) -> dict[str, float]:
        """`weight_sum` of each named tensor as the engine holds it; without names whose layout the engine changed."""
        ...

    def sleep(self) -> None:
        """Give the engine's memory to the optimizer phase. Weights and cache are lost; a CPU engine keeps them."""
        ...

    def wake(self) -> None:
        """Take the memory back. The engine has no weights until the next `sync_weights`."""
        ...

    def close(self) -> None:
        """Shut down; call last, after the final collective."""
        ...


@quick_imports()
def make_engine(model: str, options: EngineOptions, *, rank: int, world: int, device: str) -> Engine:
    """The engine of this rank. `model` is a folder or hub id; call it after Accelerator() (see VllmEngine).

    Raises ValueError for an unknown engine, and what the engine raises when it does not start.
    """
    kinds = {"vllm": VllmEngine, "hf": HfEngine}
    if options.engine not in kinds:
        raise ValueError(f"engine: {options.engine!r} is not one of {', '.join(kinds)}")
    return kinds[options.engine](model, options, rank=rank, world=world, device=device)


def weight_sum(weight: torch.Tensor) -> float:
    """Sum in double precision, a slice of rows at a time: a copy of an embedding in float64 would fill a small GPU."""
    return sum(rows.sum(dtype=torch.float64) for rows in weight.split(4096)).item() if weight.numel() else 0.0  # type: ignore[union-attr]


class VllmEngine:
    """vLLM in this process. Traps it takes care of, each without an error message of its own:

    - built before Accelerator(), it initialises torch.distributed with a world of one: N separate trainings;
    - a tied output head stays stale on the CPU build unless "lm_head.weight" is sent along;
    - cached prefixes of old weights are used unless the cache is reset before sampling.

    It seeds torch's global generator at construction; every sample is drawn from a stream of its own.
    """

    def __init__(self, model: str, options: EngineOptions, *, rank: int, world: int, device: str):
        if world > 1 and not torch.distributed.is_initialized():
            raise RuntimeError("the engine must be built after Accelerator(), which starts the process group")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # same process: weights are handed over by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says that a CPU has no Triton
        arguments = engine_arguments(model, options, world=world, device=device)
        self.eager = arguments["enforce_eager"]
        with warnings.catch_warnings(), self._uncompiled():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own imports
            from vllm import LLM

            gc.collect()
            gc.freeze()  # vLLM collects garbage five times as it starts, and what is imported by now is none
            try:
                self.llm = LLM(**arguments, use_tqdm_on_load=False)
            except (RuntimeError, ValueError, AssertionError, KeyError, OSError) as error:
                hint = f"; lower max_response_tokens or `vllm: {{max_num_seqs: {options.max_sequences}}}`"
                hint += "" if "kv_cache_memory_bytes" in arguments else ", or raise engine_memory_share"
                of_memory = re.search("memory|KV cache", str(error))
                told = " ".join(f"vLLM could not start: {type(error).__name__}: {error}".split())[:500]
                raise EngineError(f"{told}{hint if of_memory else ''}") from error
        self.tokenizer = self.llm.get_tokenizer()
        self.requests = 0
        self.asleep = False

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[list[int]],
        on_finish: OnFinish | None,
        progress: Callable[[int], object] | None,
    ) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        found: dict[str, tuple[int, int]] = {}  # request id -> (prompt index, sample index)
        results: list[list[Any]] = [[None] * len(row) for row in seeds]
        # Prefixes may be of old weights; and what an earlier call left must not change the rounding of this one.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine kept cached prefixes of an earlier call: a request is still running")
        with self._uncompiled():
            for i, (prompt, row) in enumerate(zip(prompts, seeds, strict=True)):
                for j, seed in enumerate(row):
                    params = SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=sampling.top_k,
                        max_tokens=sampling.max_tokens,
                        stop_token_ids=list(sampling.stop_token_ids),
                        ignore_eos=True,  # the stop ids above are all there are
                        seed=seed,  # its own stream: a sample does not depend on what else is in the batch
                        logprobs=0,  # the sampled token's alone
                        flat_logprobs=True,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                        skip_clone=True,  # each request has its own
                    )
                    request_id = str(self.requests)
                    self.requests += 1
                    engine.add_request(request_id, tokens_input(prompt), params)
                    found[request_id] = (i, j)
            try:
                while engine.has_unfinished_requests():
                    with _failing_as_one():
                        finished = engine.step()
                    for request in finished:
                        i, j = found.pop(request.request_id)
                        results[i][j] = self._completion(request.outputs[0], i, j)  # type: ignore[union-attr]
                        if on_finish:
                            on_finish(i, j, results[i][j])
                        if progress:
                            progress(1)
            finally:  # an interrupt leaves no request behind for the next call
                engine.abort_request(list(found))
        return results

    def _uncompiled(self) -> AbstractContextManager[None]:
        """Eager, vLLM would still compile a helper for ten seconds to gain nothing; the trainer may compile."""
        return torch._dynamo.config.patch(disable=True) if self.eager else nullcontext()

    def _completion(self, output: Any, i: int, j: int) -> Completion:
        token_ids, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
        if len(logprobs) != len(token_ids) or not all(-float("inf") < x <= 1e-6 for x in logprobs):
            told = f"the engine returned log-probs that are not finite for prompt {i}, sample {j}"
            raise FloatingPointError(f"{told}: {NOT_FINITE}")
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(token_ids, logprobs, output.finish_reason, text)

    def sync_weights(self, weights: NamedTensors) -> None:
        # Layer by layer into the tensors that are in use, so that CUDA graphs stay valid. The CPU build repacks
        # matrices at load; this does it again.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def checksum(self, names: list[str]) -> dict[str, float]:
        def sums(model: torch.nn.Module) -> dict[str, float]:
            own = dict(model.named_parameters())
            return {name: weight_sum(own[name]) for name in names if name in own and own[name].numel()}

        return self.llm.apply_model(sums)[0]

    def sleep(self) -> None:
        self.llm.sleep(level=2)  # weights are thrown away: the next sync brings all of them
        self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        self.wake()  # memory that is not there cannot be freed
        gc.freeze()  # spares one of two collections in what follows, which unfreezes all
        self.llm.llm_engine.engine_core.shutdown()


def engine_arguments(model: str, options: EngineOptions, *, world: int, device: str) -> dict[str, Any]:
    """What vLLM is started with on a device, cpu or cuda."""
    on_cpu = device.startswith("cpu")
    memory: dict[str, Any] = (
        # The CPU build has no sleep mode, its default cache would take most of the machine's memory, its attention
        # computes whole blocks, by default of 128 tokens (smaller ones are faster), and a prompt that is computed in
        # two pieces ends in an error where the request has a seed.
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
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, not of the raw logits
        "generation_config": "vllm",  # ignore the model's own sampling defaults
        "trust_remote_code": options.trust_remote_code,
        "enforce_eager": on_cpu,
        "disable_log_stats": True,
        "logits_processors": [only_tokenizer_rows(options.vocab_size)],
        **options.arguments,
    }


def only_tokenizer_rows(vocab_size: int) -> type:
    """A logits processor for models whose head has rows beyond the tokenizer (Qwen2.5: 151,936 against 151,665).

    Such ids are sampled at temperature 1 and mean nothing; the trainer masks the same rows. One class for both of
    vLLM's model runners: the first, which the CPU build takes, and the second, which a GPU takes.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunners
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunners

    class OnlyTokenizerRows(FirstRunners, SecondRunners):
        def __init__(self, *about: object):
            pass

        def apply(self, logits: torch.Tensor, *about: object) -> torch.Tensor:
            logits[:, vocab_size:] = -float("inf")
            return logits

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: object) -> None:
            pass

    return OnlyTokenizerRows


class SharedEngine:
    """One engine that several ranks hold together: each asks for its own answers, all compute those of all.

    `generate` is collective over every rank of the run, also of one that asks for nothing.
    """

    def __init__(self, engine: Engine, rank: int, ranks_an_engine: int, gather: Callable[[list[Any]], list[Any]]):
        self.engine, self.gather = engine, gather
        self.first = rank - rank % ranks_an_engine
        self.rank, self.end = rank, self.first + ranks_an_engine
        self.sync_weights, self.checksum = engine.sync_weights, engine.checksum
        self.sleep, self.wake, self.close = engine.sleep, engine.wake, engine.close

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[list[int]],
        on_finish: OnFinish | None,
        progress: Callable[[int], object] | None,
    ) -> list[list[Completion]]:
        asked = self.gather([(prompts, seeds)])  # of each rank of the run
        of_engine = asked[self.first : self.end]
        before = sum(len(theirs) for theirs, _ in asked[self.first : self.rank])
        mine = range(before, before + len(prompts))

        def finished(i: int, j: int, completion: Completion) -> None:
            if i in mine and on_finish:
                on_finish(i - before, j, completion)
            if i in mine and progress:
                progress(1)

        completions = self.engine.generate(
            [prompt for theirs, _ in of_engine for prompt in theirs],
            sampling,
            seeds=[row for _, theirs in of_engine for row in theirs],
            on_finish=finished,
            progress=None,
        )
        return [completions[i] for i in mine]


class HfEngine:
    """transformers' generate on a copy of the model: slow, simple, runs wherever torch does."""

    def __init__(self, model: str, options: EngineOptions, *, rank: int, world: int, device: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if options.tensor_parallel > 1:
            raise ValueError("engine: hf has no tensor parallelism; set tensor_parallel: 1 or engine: vllm")
        remote = options.trust_remote_code
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=remote)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, options.dtype), trust_remote_code=remote
        )
        self.model = loaded.to(device).eval()
        self.device, self.options = device, options

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[list[int]],
        on_finish: OnFinish | None,
        progress: Callable[[int], object] | None,
    ) -> list[list[Completion]]:
        results: list[list[Any]] = [[None] * len(row) for row in seeds]
        jobs = [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        for start in range(0, len(jobs), self.options.max_sequences):
            chunk = jobs[start : start + self.options.max_sequences]
            i, j = chunk[0]
            done = self._generate_batch([prompts[i] for i, _ in chunk], sampling, seeds[i][j])
            for (i, j), completion in zip(chunk, done, strict=True):
                results[i][j] = completion
                if on_finish:
                    on_finish(i, j, completion)
                if progress:
                    progress(1)
        return results

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """One padded batch; its samples share the random stream that starts at `seed`."""
        from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

        vocab_size = self.options.vocab_size
        width, pad = max(map(len, prompts)), 0  # masks come from lengths: any id will do

        class OnlyTokenizerRows(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                scores[:, vocab_size:] = -float("inf")
                if not scores.amax(-1).isfinite().all():  # a NaN counts as the largest
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
        # generate() fills unset fields from the model's own file; an empty one keeps its sampling defaults out.
        self.model.generation_config = GenerationConfig()
        torch.manual_seed(seed)
        with _failing_as_one():
            out = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([OnlyTokenizerRows()]),
            )
        tokens_out = out.sequences[:, width:].tolist()  # (P, T)
        scores = torch.stack(out.scores, dim=1).float().log_softmax(-1)  # (P, T, V) after temperature and top-p
        logprobs = scores.gather(-1, out.sequences[:, width:, None]).squeeze(-1).tolist()  # (P, T)
        done = []
        for ids, row in zip(tokens_out, logprobs, strict=True):
            ends = [t for t, token in enumerate(ids) if token in sampling.stop_token_ids]
            length = ends[0] + 1 if ends else len(ids)
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            done.append(Completion(ids[:length], row[:length], "stop" if ends else "length", text))
        return done

    def sync_weights(self, weights: NamedTensors) -> None:
        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)

    def checksum(self, names: list[str]) -> dict[str, float]:
        own = self.model.state_dict()
        return {name: weight_sum(own[name]) for name in names if name in own}

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass
