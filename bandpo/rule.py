"""What a rule is: a function of what is known of the tokens, that says how much of their gradient counts.

    def my_rule(view: View, *, width: float = 0.3) -> Result:                  # view: tokens of a micro-batch
        return 1 / (1 + width * view.entropy), 1 + width * view.entropy        # an interval of the ratio, or
        return view.ratio * torch.exp(-width * view.log_ratio.square())        # a weight w

    rule = load_rule("my_rule.py:my_rule", {"width": 0.2})                     # or a name of bandpo/rules.py
    check_rule(rule)                                                           # clear errors before training
    result = clipped_loss(rule, view, surrogate="ppo", dual_clip=10.0)            # losses, weights, what was cut

An interval (lower, upper) goes through the clipped surrogate (bandpo/objective.py). A weight is the gradient itself,
w A grad log pi, with w a constant: every published rule can be written so. A rule's parameters are keyword-only
arguments with the published values as defaults, and stand nowhere else.

A rule that needs more than single tokens (a quantile, a balance of sums) has functions of sums, `Rule.sums`: see
`totals`. They are sums over tokens, so that nothing depends on how an update is cut into micro-batches and ranks.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from bandpo.objective import MAX_LOG_RATIO, ClipStatistics, policy_loss, sequence_logprobs, token_statistics


@dataclass(frozen=True)
class View:
    """What a rule may see of the tokens of a micro-batch: flat (T,) float32, one sequence after another.

    logprobs      now; the only tensor with a gradient, and only `WithPenalty` may use it
    old_logprobs  of the anchor of the ratio: the old policy, or the sampler
    advantages    A
    entropy       of the old policy, nats
    lengths       (n,) int64, tokens of each sequence
    numbers       (n,) int64, which sequence of the update each is, however the update is cut
    update        updates of the run before this one: what is drawn by chance differs from update to update
    totals        what the rule's own sums add up to over the whole update
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    lengths: Tensor
    numbers: Tensor
    update: int = 0
    totals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def log_ratio(self) -> Tensor:
        """(T,) ln r = ln (now / old), within +-20, without gradient."""
        return (self.logprobs.detach() - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    @property
    def ratio(self) -> Tensor:
        """(T,) r = now / old, without gradient."""
        return self.log_ratio.exp()

    @property
    def p(self) -> Tensor:
        """(T,) old probability."""
        return self.old_logprobs.exp()

    @property
    def sequence(self) -> Tensor:
        """(T,) int64, which of `lengths` a token belongs to."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.logprobs))

    @property
    def position(self) -> Tensor:
        """(T,) int64, the token's place in its response, from 0."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(len(self.logprobs), device=self.logprobs.device) - starts[self.sequence]


class WithPenalty(NamedTuple):
    """A weight and, for a rule that has one, a term of the loss of its own: (T,), a function of `view.logprobs`."""

    weights: Tensor
    penalty: Tensor


Result = Tensor | tuple[Tensor, Tensor] | WithPenalty  # a weight | an interval | a weight and a penalty
Sums = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """A rule by its name, with its parameters.

    function: (view, *, parameters) -> Result. sums: functions (view, *, some of these parameters) -> dict of tensors,
    each a sum over the view's tokens; they run in this order, each seeing in `view.totals` what those before it add up
    to. Raises ValueError for sums with a parameter that the rule has not.
    """

    name: str
    function: Callable[..., Result]
    sums: tuple[Sums, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for sums in self.sums:
            strange = set(_keywords(sums)) - self.defaults.keys()
            if strange:
                raise ValueError(f"rule {self.name}: its sums ask for {', '.join(strange)}, no parameter of the rule")

    def __call__(self, view: View, **now: object) -> Result:
        """The rule's result; `now` overrides parameters, as a radius per token does."""
        return self.function(view, **{**self.arguments, **now})

    @property
    def defaults(self) -> dict[str, object]:
        """The parameters and their published values; `...` for one that has none and must be given."""
        published = self.function.__kwdefaults__ or {}
        return {name: published.get(name, ...) for name in _keywords(self.function)}

    @property
    def arguments(self) -> dict[str, object]:
        """What the rule is called with: the published values, and those given instead."""
        return {**self.defaults, **self.parameters}

    def with_parameters(self, given: Mapping[str, object]) -> "Rule":
        """The rule with these parameters. Raises ValueError for unknown and missing ones and wrong types."""
        known = self.defaults
        listed = ", ".join(f"{k}" if v is ... else f"{k} ({v})" for k, v in known.items()) or "none"
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"rule {self.name}: {name!r} is no parameter of it; its parameters: {listed}")
            text = isinstance(known[name], str)
            if value is None:
                right = known[name] is None or type(None) in get_args(self.function.__annotations__.get(name))
            else:
                right = isinstance(value, str if text else int | float | Tensor) and not isinstance(value, bool)
            if not right:
                kind = "a word" if text else "a number"
                raise ValueError(f"rule {self.name}: {name} is {value!r}; use {kind} (published: {known[name]})")
        missing = [name for name, value in known.items() if value is ... and name not in given]
        if missing:
            raise ValueError(f"rule {self.name}: {', '.join(missing)} has no published value; give one")
        return replace(self, parameters={**self.parameters, **given})


def _keywords(function: Callable[..., object]) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]


# ---- from a rule to losses ----


class ClippedLoss(NamedTuple):
    """The tokens' losses and what became of their gradients; all (T,), only `losses` has a gradient.

    losses        to be weighted and summed; their gradient is -w A grad log pi (and that of a penalty)
    weights       w; r for a token that no rule touches
    ratio         r, of the sequence with surrogate gspo
    cut           by the rule: an interval is left on the clipped side (A > 0 above, A < 0 below), or w = 0 for A != 0
    no_gradient   cut, or above the dual clip
    lower, upper  the interval; None for a rule that gives weights
    """

    losses: Tensor
    weights: Tensor
    ratio: Tensor
    cut: Tensor
    no_gradient: Tensor
    lower: Tensor | None
    upper: Tensor | None

    def bounds(self) -> dict[str, Tensor]:
        """The weight, and the interval of a rule that gives one, by name."""
        named = {"weight": self.weights, "lower": self.lower, "upper": self.upper}
        return {name: values for name, values in named.items() if values is not None}

    def statistics(self, view: View) -> ClipStatistics:
        """What the rule did to the tokens of `view`; nothing is read back from the device."""
        weights, bounds = self.weights, (self.lower, self.upper)
        return token_statistics(
            self.ratio, view.old_logprobs, view.advantages, self.cut, self.no_gradient, *bounds, weights=weights
        )


def clipped_loss(rule: Rule, view: View, *, surrogate: str, dual_clip: float | None, **now: object) -> ClippedLoss:
    """The losses that the rule makes of the tokens of `view`; `now` overrides parameters of the rule.

    surrogate: "ppo", "cispo" or "gspo", as for `policy_loss`. Weights are the gradient already, so "cispo" is for
    intervals alone; with "gspo" a rule of either kind sees the ratios of whole sequences.
    dual_clip: as for `policy_loss`; no rule gives a gradient to A < 0 above that ratio.

    Raises ValueError for cispo with a rule of weights, and as `policy_loss` and the rule do.
    """
    view = _by_sequence(view, surrogate)
    result, ratio, advantages = rule(view, **now), view.ratio, view.advantages
    above = torch.zeros_like(ratio, dtype=torch.bool) if dual_clip is None else (advantages < 0) & (ratio > dual_clip)
    if isinstance(result, tuple) and not isinstance(result, WithPenalty):
        lower, upper = result
        losses = policy_loss(
            view.logprobs, view.old_logprobs, advantages, lower, upper, dual_clip=dual_clip, surrogate=surrogate
        )
        cut = ((advantages > 0) & (ratio > upper)) | ((advantages < 0) & (ratio < lower))
        if surrogate == "cispo":
            weights = ratio.clamp(lower, upper)
            if dual_clip is not None:
                weights = torch.where(advantages < 0, weights.clamp(max=dual_clip), weights)
        else:
            weights = torch.where(cut | above, 0.0, ratio)
        return ClippedLoss(losses, weights, ratio, cut, cut | above, lower, upper)
    if surrogate == "cispo":
        raise ValueError(f"surrogate: cispo clips to an interval, and rule {rule.name} gives weights; use ppo or gspo")
    weights, penalty = result if isinstance(result, WithPenalty) else (result, None)
    cut = (weights == 0) & (advantages != 0)
    weights = torch.where(above, 0.0, weights).detach()
    losses = -weights * advantages * view.logprobs
    losses = losses if penalty is None else losses + penalty
    return ClippedLoss(losses, weights, ratio, cut, cut | above, None, None)


def totals(
    rule: Rule,
    views: Sequence[View],
    reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    surrogate: str,
) -> dict[str, Tensor]:
    """What the rule's sums add up to over the update, for `View.totals`; {} for a rule without sums.

    views: all micro-batches of this rank for one update, with `logprobs` under the policy as it is before that update.
    For the first update of a step these are known where the old policy has just been evaluated on its tokens, and of
    an update of one micro-batch in its own pass; every other one needs a forward pass without gradient first.
    (Statistics of the update before would be free, but are of other sequences and an older policy, and would have to
    be kept in checkpoints.)
    reduce: adds named tensors over ranks; called once for each of `rule.sums`. surrogate: as for `clipped_loss`.
    """
    found: dict[str, Tensor] = {}
    views = [_by_sequence(view, surrogate) for view in views]
    for sums in rule.sums:
        given = {name: rule.arguments[name] for name in _keywords(sums)}
        parts = [sums(replace(view, totals=found), **given) for view in views]
        found = found | reduce({name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]})
    return found


def _by_sequence(view: View, surrogate: str) -> View:
    """The view that the rule judges: with the ratios of whole sequences for gspo."""
    if surrogate != "gspo":
        return view
    return replace(view, logprobs=sequence_logprobs(view.logprobs, view.old_logprobs, view.lengths))


# ---- a rule that is not known yet ----


def check_rule(rule: Rule) -> str:
    """Try a rule on made-up tokens; "interval" or "weight", what it gives. A few milliseconds on the CPU.

    Raises ValueError saying what is wrong: shapes, dtypes, values that are not finite (an upper bound may be infinite),
    an interval without 1, a gradient where a constant must be, and whatever the function raises, with the line of it.
    """
    view = made_up_view()
    try:
        found = totals(rule, [view], lambda sums: sums, surrogate="ppo")
        result = rule(replace(view, totals=found))
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        where = told(error, rule.function.__code__.co_filename)
        raise ValueError(f"rule {rule.name}, tried on made-up tokens: {where}") from error
    tokens = len(view.logprobs)

    def examine(name: str, value: object, *, finite: bool = True, gradient: bool = False) -> Tensor:
        where = f"rule {rule.name}: {name}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} is a {type(value).__name__}; return a tensor (T,) w, or a tuple (lower, upper)")
        if value.shape != (tokens,) or value.dtype != view.logprobs.dtype:
            raise ValueError(
                f"{where} is {value.dtype} of shape {tuple(value.shape)} for {tokens} tokens of {view.logprobs.dtype}; "
                "one number for each token, of the same dtype"
            )
        if value.isnan().any() or (finite and value.isinf().any()):
            token = int((~value.isfinite()).float().argmax())
            at = f"r {view.ratio[token]:.4g}, p {view.p[token]:.4g}, A {view.advantages[token]:.4g}"
            raise ValueError(f"{where} is {value[token]:.4g} at {at}; it must be finite there")
        if value.requires_grad and not gradient:
            raise ValueError(f"{where} has a gradient; it must be a constant: use view.ratio, or .detach()")
        return value

    if isinstance(result, WithPenalty):
        examine("weights", result.weights)
        if not examine("penalty", result.penalty, gradient=True).requires_grad:
            raise ValueError(f"rule {rule.name}: penalty has no gradient and does nothing; make it of view.logprobs")
        return "weight"
    if not isinstance(result, tuple):
        examine("w", result)
        return "weight"
    if len(result) != 2:
        raise ValueError(f"rule {rule.name}: {len(result)} values; return a tensor (T,) w, or a tuple (lower, upper)")
    lower, upper = examine("lower", result[0]), examine("upper", result[1], finite=False)
    outside = (lower > 1) | (upper < 1) | (lower < 0)
    if outside.any():
        token = int(outside.float().argmax())
        raise ValueError(
            f"rule {rule.name}: the interval [{lower[token]:.4g}, {upper[token]:.4g}] does not hold 0 <= lower <= 1 <= "
            f"upper, at p {view.p[token]:.4g}, A {view.advantages[token]:.4g}"
        )
    return "interval"


def told(error: BaseException, path: str) -> str:
    """An error with the line of the file `path` that it came from, where there is one; a SyntaxError has its own."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = f":{frames[-1].lineno}" if frames else ""
    return f"{path}{line}: {type(error).__name__}: {error}"


def made_up_view(dtype: torch.dtype = torch.float32) -> View:
    """Tokens of all kinds, about 300: rare to sure, ratios from e^-3 to e^3, some exactly 1, A of both signs and 0."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 40, 100, 150])
    tokens = int(lengths.sum())
    old = -torch.logspace(-4, 1.2, tokens, dtype=torch.float64)[torch.randperm(tokens, generator=generator)]
    moved = old + torch.randn(tokens, generator=generator, dtype=torch.float64).clamp(-3, 3)
    moved[::5] = old[::5]
    advantages = torch.tensor([1.5, -0.5, 0.0, 1.0, -2.0], dtype=dtype).repeat_interleave(lengths)
    return View(
        logprobs=moved.clamp(max=-1e-6).to(dtype).requires_grad_(),
        old_logprobs=old.to(dtype),
        advantages=advantages,
        entropy=torch.linspace(0, 10, tokens, dtype=dtype),
        lengths=lengths,
        numbers=torch.arange(len(lengths)),
    )
