"""Chunked log-probs and entropy against plain log_softmax, in every precision, tied, sharded, and their memory."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bandpo.logprobs as module
from bandpo.logprobs import token_logprobs

T, H, V = 23, 8, 40
OPTIONS = {"temperature": 0.7, "vocab_size": 37, "chunk_tokens": 5}


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator) * scale
    weight = torch.randn(V, H, generator=generator)
    return hidden.to(dtype), weight, torch.randint(37, (T,), generator=generator)


def plain(hidden, weight, targets, *, temperature, vocab_size, chunk_tokens=None):
    """All logits at once."""
    table = ((hidden @ weight.T)[:, :vocab_size].float() / temperature).log_softmax(-1)
    return table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(-1)


def gradients(function, hidden, weight, targets, of: str = "log-probs", **options) -> list[torch.Tensor]:
    """[log-probs, entropy, gradient of the states, of the head]; the gradient of a sum of `of`, each token weighted."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, **options)
    weighted = {"log-probs": logprobs * torch.linspace(-1, 2, T), "entropy": entropy * torch.linspace(3, -1, T)}
    weighted["both"] = weighted["log-probs"] + weighted["entropy"]
    grads = torch.autograd.grad(weighted[of].sum(), (hidden, weight))
    return [logprobs.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize("chunk_tokens", [1, 5, T, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab_size", [37, V])
@pytest.mark.parametrize("of", ["log-probs", "entropy", "both"])
def test_equals_log_softmax_forward_and_backward(chunk_tokens: int, temperature: float, vocab_size: int, of: str):
    options = {"temperature": temperature, "vocab_size": vocab_size, "chunk_tokens": chunk_tokens}
    found, wanted = gradients(token_logprobs, *inputs(), of, **options), gradients(plain, *inputs(), of, **options)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (found[3][vocab_size:] == 0).all()


@pytest.mark.parametrize("of", ["log-probs", "entropy", "both"])
def test_rows_beyond_the_vocabulary_have_no_effect(of: str):
    """Products use all rows of the head; those from vocab_size on may have any finite weights."""
    hidden, weight, targets = inputs()
    without = gradients(token_logprobs, hidden, weight[:37], targets, of, **OPTIONS)
    large = torch.cat([weight[:37], torch.full((3, H), 1e4)])
    found = gradients(token_logprobs, hidden, large, targets, of, **OPTIONS)
    assert (found[3][37:] == 0).all()
    for one, other in zip([*found[:3], found[3][:37]], without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_logits_have_the_row_stride_of_the_head(monkeypatch: pytest.MonkeyPatch):
    """A width of vocab_size = 37 would start rows at addresses that are not multiples of 16 bytes."""
    widths = []
    product = module._product

    def record(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        widths.append(right.shape[1])
        return product(left, right)

    monkeypatch.setattr(module, "_product", record)
    gradients(token_logprobs, *inputs(), "both", **OPTIONS)
    assert set(widths) == {V}  # float32: the head's gradient is an addmm


def test_by_hand():
    # Logits (0, ln 3): probabilities 1/4 and 3/4; at temperature 1/2: 1/10 and 9/10.
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)], [50.0]])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        logprobs, entropy = token_logprobs(
            hidden, weight, torch.tensor([1]), temperature=temperature, vocab_size=2, chunk_tokens=8
        )
        assert logprobs.item() == pytest.approx(math.log(p), rel=1e-6)
        assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-6)


def test_the_gradient_of_the_entropy_against_float64():
    """Relative error below 1e-4, where the policy is unsure and where it is sure."""
    for scale in (0.1, 1.0, 10.0):
        hidden, weight, targets = inputs(scale=scale)
        found = gradients(token_logprobs, hidden, weight, targets, "entropy", **OPTIONS)
        states, head = (tensor.double().requires_grad_() for tensor in (hidden, weight))
        table = ((states @ head.T)[:, :37] / 0.7).log_softmax(-1)
        entropy = -(table.exp() * table).sum(-1)
        wanted = torch.autograd.grad((entropy * torch.linspace(3, -1, T)).sum(), (states, head))
        for one, other in zip(found[2:], wanted, strict=True):
            assert (one - other).norm() < 1e-4 * other.norm()


def test_no_grad_works():
    hidden, weight, targets = inputs()
    logprobs, _ = token_logprobs(hidden.requires_grad_(), weight, targets, **OPTIONS)
    with torch.no_grad():
        again = token_logprobs(hidden, weight, targets, **OPTIONS)
    assert torch.equal(again[0], logprobs) and not again[0].requires_grad


def test_chunks_do_not_change_the_numbers_of_a_token():
    found = [token_logprobs(*inputs(), **{**OPTIONS, "chunk_tokens": c})[0] for c in (4, 8, T)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-6, atol=1e-6)


def test_only_the_gradients_asked_for():
    hidden, weight, targets = inputs()
    token_logprobs(hidden.requires_grad_(), weight, targets, **OPTIONS)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_large_logits_neither_overflow_nor_give_positive_logprobs():
    hidden, weight, targets = inputs(scale=300.0)
    logprobs, entropy = token_logprobs(hidden, weight, targets, **OPTIONS)
    best = (hidden @ weight[:37].T).argmax(-1)
    certain, _ = token_logprobs(hidden, weight, best, **OPTIONS)
    assert logprobs.isfinite().all() and (logprobs <= 0).all() and (certain <= 0).all() and certain.max() == 0
    assert (entropy >= 0).all() and entropy.min() == 0


def test_no_tokens():
    hidden, weight = torch.empty(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.empty(0, dtype=torch.long), **OPTIONS)
    assert logprobs.shape == entropy.shape == (0,)
    (grad,) = torch.autograd.grad(logprobs.sum(), weight)
    assert (grad == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_states_with_a_float32_head(autocast: bool):
    """Products in bfloat16, everything after them in float32: as good as bfloat16 logits are, gradients too."""
    hidden, weight, targets = inputs(torch.float32 if autocast else torch.bfloat16)
    wanted = gradients(plain, hidden.float(), weight, targets, **{k: OPTIONS[k] for k in ("temperature", "vocab_size")})

    def function(*tensors, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return token_logprobs(*tensors, **options)

    found = gradients(function, hidden, weight, targets, **OPTIONS)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, hidden.dtype, torch.float32]
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()
    exact = gradients(token_logprobs, hidden.float(), weight, targets, **OPTIONS)
    assert not torch.equal(found[0], exact[0])  # it was computed in bfloat16


def test_the_head_gradient_is_summed_in_float32():
    """bfloat16 would lose small contributions of many chunks to a large sum (1 + 1/512 = 1 there)."""
    tokens = 600
    hidden = torch.full((tokens, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=2, chunk_tokens=1)
    (grad,) = torch.autograd.grad(logprobs.sum(), weight)
    assert grad.flatten().tolist() == [300, -300]  # each token adds 1 - 1/2


def test_tied_head_adds_to_the_gradient_of_the_embedding():
    ids, targets = torch.tensor([1, 2, 3, 1]), torch.tensor([2, 3, 1, 0])
    embedding = torch.randn(V, H, requires_grad=True)

    def tied(function):
        logprobs, _ = function(embedding[ids].tanh(), embedding, targets, **OPTIONS)
        return torch.autograd.grad(logprobs.sum(), embedding)[0]

    torch.testing.assert_close(tied(token_logprobs), tied(plain), rtol=1e-5, atol=1e-5)


def test_under_gradient_checkpointing():
    hidden, weight, targets = inputs()

    def function(hidden, weight, targets, **options):
        return checkpoint(token_logprobs, hidden, weight, targets, use_reentrant=False, **options)

    for one, other in zip(
        gradients(function, hidden, weight, targets, **OPTIONS),
        gradients(plain, hidden, weight, targets, **OPTIONS),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class LargestResult(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_is_larger_than_the_logits_of_a_chunk():
    hidden, weight, targets = torch.randn(64, 4), torch.randn(500, 4), torch.randint(500, (64,))
    sizes = []
    for function in (token_logprobs, plain):
        with LargestResult() as largest:
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            both = function(x, w, targets, temperature=1.0, vocab_size=500, chunk_tokens=8)
            torch.cat(both).sum().backward()
        sizes.append(largest.elements)
    assert sizes == [8 * 500, 64 * 500]


def test_wrong_sizes_are_refused():
    hidden, weight, targets = inputs()
    with pytest.raises(AssertionError, match="23 targets"):
        token_logprobs(hidden[:3], weight, targets, **OPTIONS)
    with pytest.raises(AssertionError, match="vocab_size 41 is more than the head's 40 rows"):
        token_logprobs(hidden, weight, targets, **{**OPTIONS, "vocab_size": 41})


# ---- sharded over processes ----


class TinyModel(nn.Module):
    """A model in the shape of ours: the head is used inside the forward of the root module."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(self.body(self.embedding(ids)).tanh(), self.head.weight, targets, **OPTIONS)


def _compare_sharded(rank: int, world: int, folder: str) -> None:
    """Every process: gradients of the sharded model, gathered, against those of a plain one on all data."""
    # A file as meeting point: a port that was free a moment ago may be taken.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    ids, targets = torch.arange(2 * T).view(2, T) % 37, torch.arange(2 * T).flip(0).view(2, T) % 37
    worst = {}
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            plain_model, sharded = TinyModel(tied), TinyModel(tied)
            sharded.load_state_dict(plain_model.state_dict())
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            fully_shard(sharded.body, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            fully_shard(sharded, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            for part in range(2):  # two micro-batches: gradients accumulate
                sharded(ids[rank].chunk(2)[part], targets[rank].chunk(2)[part])[0].sum().backward()
                for r in range(world):
                    plain_model(ids[r].chunk(2)[part], targets[r].chunk(2)[part])[0].sum().backward()
            for (name, one), (_, other) in zip(sharded.named_parameters(), plain_model.named_parameters(), strict=True):
                assert isinstance(one.grad, DTensor) and other.grad is not None
                gap = (one.grad.full_tensor() * world - other.grad).norm() / other.grad.norm()
                worst[f"{name} tied={tied} {dtype}"] = gap.item()
    if rank == 0:
        torch.save(worst, Path(folder) / "worst.pt")
    dist.barrier()  # gloo fails where one rank ends while the other still communicates
    dist.destroy_process_group()


@pytest.mark.slow
def test_under_fsdp2_on_two_processes(tmp_path: Path):
    spawn(_compare_sharded, args=(2, str(tmp_path)), nprocs=2)
    worst = torch.load(tmp_path / "worst.pt")
    assert len(worst) == 2 * (4 + 3)
    for name, gap in worst.items():
        assert gap < (1e-5 if "float32" in name else 2e-2), (name, gap)
