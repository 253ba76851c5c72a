"""Policy model: loading, sharding, log-probs and entropy, gradients, and weights for the engine and checkpoints.

    policy = Policy.load("path/to/model", options, accelerator)
    logprobs, entropy = policy(micro_batch)                        # (T,), (T,)
    engine.sync_weights(policy.named_weights("bfloat16"))          # gathered, under Hugging Face names
    policy.write(folder, policy.full_weights())

Values of the key `sharding`. none: one process. ddp: a full copy per process, through Accelerate. fsdp2: PyTorch's
`fully_shard` over the processes that Accelerate started, with float32 master weights and compute in `precision`.
Accelerate's own FSDP is not used: it silently turns itself off on a CPU, so CPU tests would not cover the GPU code.

Not supported: tensor and context parallelism of the trainer, quantized training.

Axes: N sequences, L positions of the longest, P packed positions without padding, H hidden size, V vocabulary rows,
T response tokens of all sequences, concatenated.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bandpo.logprobs import token_logprobs
from trainer.attention import set_attention
from trainer.lora import Lora, add_adapters, is_adapter, merged, plain_name, write_adapters
from trainer.preflight import refuse_missing_weights
from trainer.types import MicroBatch

# transformers and torch.distributed take 2 s to import. They are imported where they are used, so that an invalid
# config is reported first.
if TYPE_CHECKING:
    from accelerate import Accelerator

# Fields of model configs that scale or cap logits: Granite, Cohere, Gemma, Falcon-H1.
CHANGE_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier", "output_multiplier")

# On Hopper, torch prefers cuDNN attention, which builds a plan per shape. Here the shape differs between batches.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class PolicyOptions:
    """Options to load and run a policy. Fields with the name of a config key hold its resolved value."""

    sharding: str  # none | ddp | fsdp2
    precision: str  # float32 | bfloat16: of the forward and backward; master weights are float32
    attention: str  # auto, or a transformers attn_implementation
    gradient_checkpointing: bool
    temperature: float
    vocab_size: int  # size of the tokenizer; extra rows of the head are masked
    chunk_tokens: int  # response tokens per chunk of logits
    trust_remote_code: bool
    lora: Lora | None = None  # None: all weights are trained


class LogprobModel(nn.Module):
    """Causal LM that returns log-probs and entropy of given tokens without materializing all logits at once.

    DDP and FSDP hooks run when a module is called. A wrapper module makes them cover the head as well.
    """

    def __init__(self, causal_lm: Any, options: PolicyOptions):
        super().__init__()
        self.causal_lm = causal_lm
        self.options = options

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs at the sampling temperature and entropy: each (T,) float32, in nats, with gradient."""
        # fsdp2 casts parameters itself; otherwise they stay float32 and are cast per operation.
        cast = self.options.precision == "bfloat16" and self.options.sharding != "fsdp2"
        by_sequence = {} if batch.sequences is None else {"sequences": batch.sequences, "places": batch.places}
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=cast):
            hidden = self.causal_lm.get_decoder()(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                **by_sequence,
            ).last_hidden_state  # (N, L, H), or (1, P, H) packed
            return token_logprobs(
                # Not indexing: its backward pass sums in thread order where samples share a prompt's last state.
                nn.functional.embedding(batch.predictors, hidden.flatten(0, 1)),
                self.causal_lm.get_output_embeddings().weight,
                batch.targets,
                temperature=self.options.temperature,
                vocab_size=self.options.vocab_size,
                chunk_tokens=self.options.chunk_tokens,
            )


class Policy:
    """Model with the operations that depend on its sharding over processes."""

    def __init__(
        self, model: nn.Module, causal_lm: Any, options: PolicyOptions, accelerator: "Accelerator", layout: str
    ):
        self.layout = layout  # padded | packed | by_sequence (attention.model_inputs)
        self.model = model  # LogprobModel, inside DDP or sharded in place
        self.causal_lm = causal_lm  # the transformers model inside it
        self.options = options
        self.accelerator = accelerator
        self.tied = causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight

    @classmethod
    def load(cls, path: str, options: PolicyOptions, accelerator: "Accelerator", *, trainable: bool = True) -> "Policy":
        """Load float32 weights from a folder or hub id and shard them by `options.sharding`; collective.

        Weights are cast to float32 on the device, one group at a time. The host holds only the memory-mapped files,
        shared by all ranks. A frozen model is then moved to the CPU (see `on_device`). Raises ValueError if weights are
        missing or not finite, RuntimeError if the sharding is not as requested.
        """
        causal_lm = _read(path, options)
        check_finite(causal_lm, path)
        causal_lm.eval().requires_grad_(trainable)
        layout = set_attention(causal_lm, options.attention, options.precision)
        disable_dropout(causal_lm)
        if options.lora and trainable:
            add_adapters(causal_lm, options.lora)
        if options.gradient_checkpointing and trainable:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in _decoder_layers(causal_lm):
                layer.training = True  # else it does not checkpoint; its submodules stay in evaluation mode
        model: nn.Module = LogprobModel(causal_lm, options)
        if options.sharding == "fsdp2":
            _fully_shard(model, causal_lm, options, accelerator)
        else:
            _to_float32(model, accelerator.device)
            model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=not trainable)
        sharded = all(_is_sharded(p) for p in causal_lm.parameters())
        got = "fsdp2" if sharded else "ddp" if isinstance(model, nn.parallel.DistributedDataParallel) else "none"
        if trainable and got != options.sharding:
            raise RuntimeError(
                f"sharding: {options.sharding} was requested, the model has {got} on {accelerator.num_processes} "
                "process(es); ddp needs several, none is for one, fsdp2 is for both"
            )
        if not trainable:
            model.to("cpu")
        return cls(model, causal_lm, options, accelerator, layout)

    def text(self) -> str:
        """Return one line with size, sharding, precision, and the memory of weights, gradients and AdamW per rank."""
        weights = list(self.causal_lm.parameters())
        own = [(p.to_local() if _is_sharded(p) else p).numel() for p in weights]  # type: ignore[attr-defined]
        held, trained = sum(own), sum(n for n, p in zip(own, weights, strict=True) if p.requires_grad)
        gib = {"weights": held / 2**28, "gradients": trained / 2**28, "AdamW": trained / 2**27}
        adapters = f" with adapters of rank {self.options.lora.rank}" if self.options.lora else ""
        return (
            f"policy:  {sum(p.numel() for p in weights):,} parameters{adapters}, sharding {self.options.sharding}, "
            f"compute in {self.options.precision}; GiB per rank: {', '.join(f'{k} {v:.3g}' for k, v in gib.items())}"
        )

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probs and entropy of LogprobModel.forward.

        They are views, because `backward` differentiates up to them and FSDP has hooks on the base tensors.
        """
        logprobs, entropy = self.model(batch)
        return logprobs.view_as(logprobs), entropy.view_as(entropy)

    # ---- weights out ----

    def named_weights(self, precision: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every full weight under its Hugging Face name, cast to `precision` before it is gathered. Collective.

        A tied head is also yielded, because the CPU build of vLLM keeps a copy of it. Then every saved buffer, in its
        own dtype, because vLLM's reload clears buffers.
        """
        dtype = getattr(torch, precision)
        for name, parameter in merged(self.causal_lm):
            full = _full(parameter.detach().to(dtype))
            yield name, full
            if self.tied and parameter is self.causal_lm.get_input_embeddings().weight:
                yield "lm_head.weight", full
        parameters = {name for name, _ in self.causal_lm.named_parameters(remove_duplicate=False)}
        yield from ((n, buffer) for n, buffer in self.causal_lm.state_dict().items() if n not in parameters)

    def compared_names(self, *, split: bool) -> list[str]:
        """Return the names of weights that an engine stores unchanged: vectors and the embedding, norms alone if split.

        Engines fuse or repack every other matrix. split: each rank of the engine has a part of biases and embedding.
        """
        embedding = self.causal_lm.get_input_embeddings().weight
        return [
            plain_name(name)
            for name, parameter in self.causal_lm.named_parameters()
            if name.endswith("norm.weight") or (not split and (parameter.dim() == 1 or parameter is embedding))
        ]

    # ---- checkpoints ----

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Gather all float32 weights (adapters merged), adapters and buffers by Hugging Face name. Collective.

        Returns CPU tensors on rank 0 and {} on other ranks. In CPU training they share memory with the trained weights.
        """
        adapters = ((n, _full(p)) for n, p in self.causal_lm.named_parameters() if is_adapter(n))
        weights: dict[str, torch.Tensor] = {}
        for name, weight in chain(self.named_weights("float32"), adapters):
            if self.accelerator.is_main_process and not (self.tied and name == "lm_head.weight"):
                weights[name] = weight.cpu()
        return weights

    def write(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write `full_weights` to a folder in Hugging Face format, which transformers and vLLM can load.

        With LoRA, the adapters are merged into these weights, and also written to the sibling folder `adapter`.
        """
        if self.options.lora:
            adapters = {name: weight for name, weight in weights.items() if is_adapter(name)}
            weights = {name: weight for name, weight in weights.items() if name not in adapters}
            write_adapters(folder.with_name("adapter"), self.options.lora, adapters)
        # Save from a model on the meta device: save_pretrained does not support sharded weights.
        with torch.device("meta"):
            shell = type(self.causal_lm)(copy.deepcopy(self.causal_lm.config))
        shell.save_pretrained(folder, state_dict=weights)
        # Write it unchanged: save_pretrained rejects some configs that transformers loads, such as a temperature
        # without do_sample.
        self.causal_lm.generation_config.to_json_file(folder / "generation_config.json")

    def full_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gather the optimizer state by parameter name on the CPU of rank 0. Collective.

        The result can be loaded with any number of processes.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.model, optimizer, options=options)

    def load_optimizer(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        """Load the state of `full_optimizer` from a file. Collective."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        state = torch.load(path, weights_only=True, map_location="cpu") if self.accelerator.is_main_process else {}
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, broadcast_from_rank0=self.accelerator.num_processes > 1
        )
        set_optimizer_state_dict(self.model, optimizer, state, options=options)

    # ---- gradients ----

    def backward(self, loss: torch.Tensor, *outputs: torch.Tensor, always: bool) -> None:
        """Backpropagate `loss` through `outputs`, the log-probs and entropy that this policy returned. Collective.

        The loss is differentiated with respect to `outputs` first, which is cheap. If all of these gradients are 0 on
        all ranks, the model's backward pass is skipped, unless `always` is set. Each update needs one backward pass, so
        that every weight has a gradient.
        """
        pairs = zip(outputs, torch.autograd.grad(loss, outputs, allow_unused=True), strict=True)
        used = [(output, gradient) for output, gradient in pairs if gradient is not None]
        if not always:
            # clamp gives NaN the gradient 0, so a loss that is not finite must also go through the model.
            needed = torch.stack([gradient.ne(0).any() for _, gradient in used] + [~loss.isfinite()]).any()
            total: Any = self.accelerator.reduce(needed.float(), "sum")
            if total.item() == 0:
                return
        torch.autograd.backward([output for output, _ in used], [gradient for _, gradient in used])

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Clip gradients to a global norm of at most `max_norm`; return the scalar norm before clipping. Collective."""
        # foreach: torch's default for sharded weights is one kernel per weight
        return _full(nn.utils.clip_grad_norm_(self.parameters(), max_norm, foreach=True))

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context manager of a backward pass: DDP all-reduces gradients only in the last one of an update."""
        return nullcontext() if last or self.options.sharding != "ddp" else self.accelerator.no_sync(self.model)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Move a frozen policy to the device inside the block, and to the CPU afterwards."""
        self.model.to(self.accelerator.device)
        yield
        self.model.to("cpu")


def _read(path: str, options: PolicyOptions) -> Any:
    """Load the model on the CPU in the dtype of its files, memory-mapped instead of copied.

    Raises ValueError if the files lack a weight, or if the model changes its logits after the head.
    """
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="eager",  # supported by every model; set_attention replaces it
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
        refuse_missing_weights(path, loaded[1])
        return loaded[0]

    causal_lm = load(_stored_dtype(path))
    check_head(causal_lm, path)
    # Buffers that are computed instead of stored, such as scales, must not be rounded.
    rounded = any(b.is_floating_point() and b.dtype != torch.float32 for b in causal_lm.buffers())
    return load(torch.float32) if rounded else causal_lm


def disable_dropout(causal_lm: nn.Module) -> None:
    """Set every dropout probability to 0: the ratio of a policy to itself must be 1."""
    for module in causal_lm.modules():
        for name, value in vars(module).items():
            if ("drop" in name or isinstance(module, nn.Dropout) and name == "p") and isinstance(value, float):
                setattr(module, name, 0.0)  # nn.Dropout.p, and attention_dropout of Llama and Qwen, for example


def check_finite(causal_lm: nn.Module, path: str) -> None:
    """Raise ValueError with the name of a weight that has NaN or infinity: no later error would name it."""
    # A sum needs no copy of the weight. It may overflow, so weights with such a sum are checked element by element.
    doubtful = [(name, w) for name, w in causal_lm.named_parameters() if not w.sum(dtype=torch.float32).isfinite()]
    broken = [name for name, weight in doubtful if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"model: {path}: {len(broken)} weights hold numbers that are not finite (NaN or infinite), {broken[0]} "
            "among them; download its files again, or start from another model"
        )


class DecoderOutput(tuple[torch.Tensor]):
    """Decoder output with hidden states at index 0 and as `last_hidden_state`. All other attributes are None."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def check_head(causal_lm: Any, path: str) -> None:
    """Raise ValueError if the model's logits differ from the product of hidden states and head.

    token_logprobs computes that product, without bias, scale or soft cap. The check compares it with the model's own
    forward pass, where random hidden states with logits of at most 20 replace the decoder.
    """
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hidden = torch.randn(1, 2, head.weight.shape[1]).to(head.weight.dtype)
        hidden *= 20 / (hidden @ head.weight.T).abs().max()
        expected = (hidden @ head.weight.T).float()
        decoder.forward = lambda *_, **__: DecoderOutput((hidden,))
        try:
            logits = causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.float()
        finally:
            del decoder.forward
    if head.bias is not None or (logits - expected).abs().max() > 0.5:
        config = causal_lm.config.get_text_config()
        fields = ", ".join(f"{name}: {getattr(config, name)}" for name in CHANGE_LOGITS if hasattr(config, name))
        fields = "a bias" if head.bias is not None else fields or "no known field"
        raise ValueError(
            f"model: {path} changes its logits after the head ({fields} of its configuration); log-probs here are of "
            "a plain head, without bias, scale or soft cap. Choose another model"
        )


def _stored_dtype(path: str) -> torch.dtype:
    """Return the dtype of the weights in the model's safetensors files; float32 if they differ or there are none."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns="model*.safetensors"))
    kinds = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop() if len(kinds) == 1 else "", torch.float32)


def _to_float32(module: nn.Module, device: torch.device) -> None:
    """Move a module to the device as float32, except parameters that are already sharded."""
    for parameter in module.parameters():
        if not _is_sharded(parameter):
            parameter.data = parameter.data.to(device, torch.float32)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = buffer if buffer is None else buffer.to(device)


def _fully_shard(model: nn.Module, causal_lm: Any, options: PolicyOptions, accelerator: "Accelerator") -> None:
    """Apply FSDP2 in place: one group per decoder layer, one for embeddings, final norm and head.

    Groups are moved to the device one at a time, so only the current group is unsharded there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not torch.distributed.is_initialized():  # a single process without a process group
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    mixed = MixedPrecisionPolicy(param_dtype=getattr(torch, options.precision), reduce_dtype=torch.float32)
    for layer in _decoder_layers(causal_lm):
        _to_float32(layer, accelerator.device)
        fully_shard(layer, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    _to_float32(model, accelerator.device)
    # Reshard this group too, so that between phases every parameter is a DTensor that can be gathered by name. Its
    # input is a MicroBatch; a cast would traverse every token id and log-prob of its samples.
    mixed = replace(mixed, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)


def _decoder_layers(causal_lm: Any) -> list[nn.Module]:
    names = set(causal_lm._no_split_modules or [])
    layers = [module for module in causal_lm.modules() if type(module).__name__ in names]
    if not layers:
        raise RuntimeError(f"{type(causal_lm).__name__} lists no layer class to shard (_no_split_modules is empty)")
    return layers


def _is_sharded(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _full(tensor: Any) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_sharded(tensor) else tensor
