"""Our rules beside TRL's and verl's own losses: the gradient of every token's log-prob, on one made-up update.

    make beside

Their code is called as it is installed (GRPOTrainer._compute_loss; the functions of verl's policy loss registry), with
our parameters. Sixty responses of 1 to 150 tokens, A of both signs and 0, ratios from e^-3 to e^3, float64.

cut       share of tokens of A != 0 that are left without a gradient
gradient  the largest relative difference of any token's; ours has float32 weights of aggregation, hence about 1e-7
tokens    of how many the gradient differs by more than 1e-6
loss      relative; "-" where ours is another function with the same gradient (rules that give weights)
halves    the gradient again, their update now cut into two micro-batches as their trainer would; ours never changes
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.core_algos import get_policy_loss_fn  # pyright: ignore[reportMissingImports]
from verl.workers.config import ActorConfig, PolicyLossConfig  # pyright: ignore[reportMissingImports]

from bandpo.objective import aggregation_weights
from bandpo.rule import Rule, View, WithPenalty, clipped_loss, totals
from bandpo.rules import load_rule

LENGTHS = [1 + 37 * k * k % 150 for k in range(60)]
LONGEST = 160  # max_response_tokens
SAME = 1e-6


def made_up_update() -> View:
    """Rare to sure tokens, half of the ratios near 1, every fifth exactly 1; those of responses on both sides of 1."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    tokens = sum(LENGTHS)
    old = -torch.logspace(-3, 1.2, tokens, dtype=torch.float64)[torch.randperm(tokens, generator=generator)]
    noise = torch.randn(tokens, generator=generator, dtype=torch.float64).clamp(-3, 3)
    noise[::2] *= 0.2
    noise += (0.15 + 0.1 * torch.randn(len(lengths), generator=generator)).double().repeat_interleave(lengths)
    noise[::5] = 0
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    advantages[::10] = 0.0
    advantages = advantages.repeat_interleave(lengths)
    logprobs = (old + noise).clamp(max=-1e-4).requires_grad_()
    return View(logprobs, old, advantages, torch.zeros_like(old), lengths, torch.arange(len(lengths)))


def padded(values: Tensor, lengths: Tensor) -> Tensor:
    """(T,) -> (sequences, longest), zeros behind."""
    return pad_sequence(list(values.split(lengths.tolist())), batch_first=True)


@dataclass(frozen=True)
class Case:
    """A rule of ours and what the others call the same."""

    rule: Rule
    theirs: Callable[[View, int], Tensor]  # (micro-batch, micro-batches of the update) -> loss
    beside: str
    surrogate: str = "ppo"
    dual_clip: float | None = None
    aggregation: str = "token-mean"
    scale: float = 1.0  # what theirs counts more

    def ours(self, update: View) -> tuple[Tensor, bool]:
        """() the loss, and whether it is to have their loss's value too."""
        sums = totals(self.rule, [update], lambda sums: sums, surrogate=self.surrogate)
        clipped = clipped_loss(
            self.rule, replace(update, totals=sums), surrogate=self.surrogate, dual_clip=self.dual_clip
        )
        numbers = {"sequences": len(LENGTHS), "tokens": sum(LENGTHS), "max_response_tokens": LONGEST}
        weights = aggregation_weights(update.lengths, aggregation=self.aggregation, **numbers)
        return self.scale * (weights * clipped.losses).sum(), clipped.lower is not None


# ---- theirs ----


class TRL(GRPOTrainer):
    """The trainer without a model: log-probs are given, all else is the class's own."""

    def __init__(self, config: GRPOConfig, micro_batches: int) -> None:
        self.args, self.accelerator, self.model = config, Accelerator(cpu=True), torch.nn.Identity()
        self.loss_type, self.importance_sampling_level = config.loss_type, config.importance_sampling_level
        self.epsilon_low = config.epsilon
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.max_completion_length, self.beta = config.max_completion_length, config.beta
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.current_gradient_accumulation_steps = micro_batches
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model: View, *_, **__):
        logprobs = padded(model.logprobs, model.lengths)
        return logprobs, torch.zeros_like(logprobs), None


def trl(loss_type: str, **keys: Any) -> Callable[[View, int], Tensor]:
    """TRL's loss of a micro-batch, as GRPOConfig's keys have it."""

    def loss(part: View, micro_batches: int) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                folder, use_cpu=True, bf16=False, report_to=[], loss_type=loss_type, max_completion_length=LONGEST,
                gradient_accumulation_steps=micro_batches, **keys,
            )  # fmt: skip
        mask = padded(torch.ones_like(part.p), part.lengths)
        empty = mask.new_zeros((len(mask), 0), dtype=torch.int64)
        inputs = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": mask.long(), "completion_mask": mask}
        inputs |= {"advantages": padded(part.advantages, part.lengths)[:, 0]}
        inputs |= {"old_per_token_logps": padded(part.old_logprobs, part.lengths)}
        inputs |= {"num_items_in_batch": torch.tensor(float(sum(LENGTHS)))}
        return TRL(config, micro_batches)._compute_loss(part, inputs)

    return loss


def verl(
    mode: str, aggregation: str, policy_loss: dict[str, Any] | None = None, **keys: Any
) -> Callable[[View, int], Tensor]:
    """verl's registered loss of a micro-batch, as ActorConfig's keys have it."""

    def loss(part: View, _: int) -> Tensor:
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation,
            policy_loss=PolicyLossConfig(loss_mode=mode, **(policy_loss or {})), **keys,
        )  # fmt: skip
        config.global_batch_info.update(dp_size=1, batch_num_tokens=sum(LENGTHS), global_batch_size=len(LENGTHS))
        config.global_batch_info["loss_scale_factor"] = LONGEST
        names = {"old_log_prob": part.old_logprobs, "log_prob": part.logprobs, "advantages": part.advantages}
        tensors = {name: padded(values, part.lengths) for name, values in names.items()}
        mask = padded(torch.ones_like(part.p), part.lengths).bool()
        return get_policy_loss_fn(mode)(**tensors, response_mask=mask, loss_agg_mode=aggregation, config=config)[0]

    return loss


# ---- the table ----


def plain(view: View) -> Tensor:
    return torch.ones_like(view.p)


def quadratic(view: View, *, beta: float = 0.1) -> WithPenalty:
    return WithPenalty(torch.ones_like(view.p), beta / 2 * (view.logprobs - view.old_logprobs).square())


def cases() -> list[Case]:
    """What either library has and we have too; the last two are rules that a user would write in a line."""
    higher = load_rule("fixed", {"clip_low": 0.2, "clip_high": 0.28})
    clip = {"epsilon": 0.2, "epsilon_high": 0.28}
    verl_clip: Any = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    narrow = load_rule("fixed", {"clip_low": 0.05, "clip_high": 0.07})
    sequence = {"epsilon": 0.05, "epsilon_high": 0.07, "importance_sampling_level": "sequence"}
    mean, norm = "seq-mean-token-mean", "seq-mean-token-sum-norm"
    capped = load_rule("fixed", {"clip_low": 1.0, "clip_high": 4.0})
    sapo, tv, kl = load_rule("sapo", {}), load_rule("dppo_tv", {}), load_rule("dppo_kl", {})
    cov = load_rule("clip_cov", {"share": 1.0, "clip_low": 0.2, "clip_high": 0.28})
    all_of_them = {"clip_cov_ratio": 1.0}
    kl_cov = load_rule("kl_cov", {"share": 0.01})
    largest = {"kl_cov_ratio": 0.01, "ppo_kl_coef": 1.0}
    return [
        Case(higher, trl("grpo", **clip), "TRL grpo", aggregation=mean),
        Case(higher, trl("bnpo", **clip), "TRL bnpo"),
        Case(higher, trl("dr_grpo", **clip), "TRL dr_grpo", aggregation=norm),
        Case(higher, trl("dapo", **clip), "TRL dapo"),
        Case(higher, trl("grpo", delta=2.0, **clip), "TRL grpo, delta 2", dual_clip=2.0, aggregation=mean),
        Case(capped, trl("cispo", epsilon_high=5.0), "TRL cispo", "cispo"),
        Case(sapo, trl("sapo"), "TRL sapo", aggregation=mean),
        Case(narrow, trl("grpo", **sequence), "TRL grpo, sequence", "gspo", aggregation=mean),
        Case(narrow, trl("luspo", **sequence), f"TRL luspo, / {LONGEST}", "gspo", aggregation=norm, scale=LONGEST),
        Case(higher, verl("vanilla", "token-mean", **verl_clip), "verl vanilla", dual_clip=3.0),
        Case(higher, verl("vanilla", norm, **verl_clip), "verl vanilla", dual_clip=3.0, aggregation=norm),
        Case(narrow, verl("gspo", "seq-mean-token-mean", clip_ratio_low=0.05, clip_ratio_high=0.07), "verl gspo",
             "gspo", aggregation=mean),
        Case(higher, verl("cispo", "token-mean", **verl_clip), "verl cispo", "cispo"),
        Case(sapo, verl("sapo", "token-mean"), "verl sapo", aggregation=mean),
        Case(tv, verl("dppo_tv", "token-mean", clip_ratio_c=20.0), "verl dppo_tv"),
        Case(kl, verl("dppo_kl", "token-mean", clip_ratio_low=0.05, clip_ratio_high=0.05, clip_ratio_c=20.0),
             "verl dppo_kl"),
        Case(cov, verl("clip_cov", "token-mean", all_of_them, **verl_clip), "verl clip_cov"),
        Case(kl_cov, verl("kl_cov", "token-mean", largest), "verl kl_cov"),
        Case(Rule("plain", plain), verl("gpg", "token-mean"), "verl gpg"),
        Case(Rule("quadratic", quadratic), verl("dro", "token-mean", {"dro_beta": 0.1}), "verl dro"),
    ]  # fmt: skip


def halves(update: View) -> list[View]:
    """The update as two micro-batches, with the same number of sequences each."""
    middle = len(update.lengths) // 2
    cut = int(update.lengths[:middle].sum())
    ends = ((slice(0, cut), slice(0, middle)), (slice(cut, None), slice(middle, None)))
    names = ("logprobs", "old_logprobs", "advantages", "entropy")
    return [
        replace(
            update,
            **{name: getattr(update, name)[tokens] for name in names},
            lengths=update.lengths[rows],
            numbers=update.numbers[rows],
        )
        for tokens, rows in ends
    ]


def differences(one: Tensor, other: Tensor) -> Tensor:
    """The relative difference of every element; 0 where both are 0."""
    larger = torch.maximum(one.abs(), other.abs())
    return (one - other).abs() / larger.where(larger > 0, 1.0)


def row(case: Case) -> tuple[str, ...]:
    """A line of the table."""
    update = made_up_update()
    loss, comparable = case.ours(update)
    own = torch.autograd.grad(loss, update.logprobs)[0]
    whole, halved = ([case.theirs(part, len(parts)) for part in parts] for parts in ([update], halves(update)))
    found, cut = (
        differences(own, torch.autograd.grad(torch.stack(losses).sum(), update.logprobs)[0])
        for losses in (whole, halved)
    )
    verdict = "same" if found.max() < SAME else "DIFFERS"
    return (
        f"{case.rule.name} {'' if case.surrogate == 'ppo' else case.surrogate}",
        case.aggregation,
        case.beside,
        f"{(own == 0)[update.advantages != 0].double().mean():.0%}",
        f"{found.max():.0e}",
        str((found > SAME).sum().item()),
        f"{differences(loss, whole[0]):.0e}" if comparable else "-",
        f"{cut.max():.0e}",
        verdict + ("" if cut.max() < SAME else ", depends on the cut"),
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"TRL {version('trl')}, verl {version('verl')}; {sum(LENGTHS):,} tokens")
    line = "{:14}{:25}{:20}{:>5}{:>10}{:>8}{:>8}{:>8}  {}"
    print(line.format("ours", "aggregation", "beside", "cut", "gradient", "tokens", "loss", "halves", ""))
    for case in cases():
        print(line.format(*row(case)), flush=True)


if __name__ == "__main__":
    main()
