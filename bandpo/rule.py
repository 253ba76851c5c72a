"""Clipping-rule interface: map per-token statistics to clip bounds or to a gradient weight.

    def my_rule(ratio, entropy, *, width=0.3):                       # inputs by name, parameters by keyword
        return 1 / (1 + width * entropy), 1 + width * entropy        # clip bounds (lower, upper) of the ratio, or
        return ratio * torch.exp(-width * ratio.log().square())      # a gradient weight w

    rule = load_rule("my_rule.py:my_rule", {"width": 0.2})           # or the name of a rule in bandpo/rules.py
    check_rule(rule)                                                 # raises for an invalid rule, before training
    bounds = rule(logprobs=..., old_logprobs=..., advantages=..., entropy=..., sequence_ids=...)

Bounds enter the PPO clip: max(-r A, -clip(r, lower, upper) A). A weight w replaces the ratio in the gradient, which
becomes w A grad log pi. A rule is called with one micro-batch of whole sequences. Its parameters are keyword-only
arguments, whose defaults are the published values.

Inputs, all (T,) tensors without gradient, over the concatenated sequences:

    logprobs, old_logprobs    log-probs under the current and the old policy, nats
    log_ratio, ratio          ln r, clamped to +-20, and r = exp(logprobs - old_logprobs)
    old_probs                 p = exp(old_logprobs)
    advantages                A
    entropy                   exact entropy of the current policy, nats
    sequence_ids              int64, the sequence of each token, ascending from 0
    positions, lengths        int64, position of the token in its response, from 0; number of tokens of that response
"""

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats; tokens beyond it have no gradient, so that the loss stays finite
Result = Tensor | tuple[Tensor, Tensor]  # a gradient weight | (lower, upper) clip bounds


def sequence_sum(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return (T,): for each token, the sum of `values` over its sequence. Every sequence needs at least one token."""
    return torch.zeros_like(values).index_add(0, sequence_ids, values)[sequence_ids]


def _positions(sequence_ids: Tensor) -> Tensor:
    lengths = torch.zeros_like(sequence_ids).index_add(0, sequence_ids, torch.ones_like(sequence_ids))
    starts = lengths.cumsum(0) - lengths  # first index of each sequence
    return torch.arange(len(sequence_ids), device=sequence_ids.device) - starts[sequence_ids]


def _log_ratio(given: Mapping[str, Tensor]) -> Tensor:
    return (given["logprobs"] - given["old_logprobs"]).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


GIVEN: tuple[str, ...] = ("logprobs", "old_logprobs", "advantages", "entropy", "sequence_ids")
DERIVED: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "log_ratio": _log_ratio,
    "ratio": lambda given: _log_ratio(given).exp(),
    "old_probs": lambda given: given["old_logprobs"].exp(),
    "positions": lambda given: _positions(given["sequence_ids"]),
    "lengths": lambda given: sequence_sum(torch.ones_like(given["sequence_ids"]), given["sequence_ids"]),
}


@dataclass(frozen=True)
class Rule:
    """Clipping rule with its parameters.

    function: maps inputs of this module, by name, and keyword-only parameters to a `Result`.
    parameters: values that differ from the function's defaults.
    """

    name: str
    function: Callable[..., Result]
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __call__(
        self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, entropy: Tensor, sequence_ids: Tensor
    ) -> Result:
        """Return clip bounds or gradient weight, (T,). Inputs: (T,), floats of one dtype, without gradient."""
        given = dict(zip(GIVEN, (logprobs, old_logprobs, advantages, entropy, sequence_ids), strict=True))
        inputs = [given[name] if name in given else DERIVED[name](given) for name in self.inputs]
        return self.function(*inputs, **self.arguments)

    @property
    def inputs(self) -> list[str]:
        """Names of the function's input tensors."""
        return [p.name for p in _signature(self.function) if p.kind is not p.KEYWORD_ONLY]

    @property
    def defaults(self) -> dict[str, object]:
        """Parameters and their published values; `...` for a parameter without a default."""
        keywords = [p for p in _signature(self.function) if p.kind is p.KEYWORD_ONLY]
        return {p.name: ... if p.default is p.empty else p.default for p in keywords}

    @property
    def arguments(self) -> dict[str, object]:
        """Parameters of the call: defaults, overridden by `parameters`."""
        return {**self.defaults, **self.parameters}

    def with_parameters(self, given: Mapping[str, object]) -> "Rule":
        """Return a rule with these parameters. Raises ValueError for unknown or missing parameters and wrong types."""
        defaults = self.defaults
        listed = ", ".join(k if v is ... else f"{k} ({v})" for k, v in defaults.items()) or "none"
        for name, value in given.items():
            if name not in defaults:
                raise ValueError(
                    f"rule_args: {name!r} is not a parameter of rule {self.name}; its parameters: {listed}"
                )
            allowed = _allowed_types(self.function, name, defaults[name])
            if isinstance(value, bool) or not isinstance(value, (*allowed, int) if float in allowed else allowed):
                types = " or ".join(TYPE_NAMES[kind] for kind in allowed)
                raise ValueError(
                    f"rule_args: {name} of rule {self.name} is not {types} (got {value!r}); its parameters: {listed}"
                )
        parameters = {**self.parameters, **given}
        if missing := [name for name, value in defaults.items() if value is ... and name not in parameters]:
            raise ValueError(f"rule_args: rule {self.name} has no default for {', '.join(missing)}; set a value")
        return replace(self, parameters=parameters)


def _signature(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


TYPE_NAMES: dict[type, str] = {int: "an integer", float: "a number", str: "a string", type(None): "null"}


def _allowed_types(function: Callable[..., object], name: str, default: object) -> tuple[type, ...]:
    """Return the types of a parameter from its annotation and default; all types if neither is known."""
    try:
        annotation = inspect.get_annotations(function, eval_str=True).get(name)
    except NameError:  # a name imported for type checkers only
        annotation = None
    kinds = tuple(kind for kind in TYPE_NAMES if kind in (annotation, *get_args(annotation), type(default)))
    return tuple(TYPE_NAMES) if kinds in ((), (type(None),)) else kinds


# ---- loading a rule ----

RULES: dict[str, Rule] = {}  # filled by bandpo/rules.py


def register(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add a rule to RULES under its function's name."""
    assert function.__name__ not in RULES, f"two rules are called {function.__name__}"
    RULES[function.__name__] = Rule(function.__name__, function)
    return function


def load_rule(name: str, parameters: Mapping[str, object]) -> Rule:
    """Load a rule by name, or a user's "FILE.py:FUNCTION", with these parameters.

    Raises ValueError, with the allowed values, for an unknown rule, parameter or input. Also for a function with *args
    or **kwargs, and for a file that is missing, is not valid Python or raises.
    """
    import bandpo.rules  # noqa: F401  (fills RULES)

    if name in RULES:
        return RULES[name].with_parameters(parameters)
    path, colon, function_name = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(f"rule: {name!r} is not known; use FILE.py:FUNCTION, or one of {', '.join(sorted(RULES))}")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ValueError(f"rule: {path} cannot be read: {error.strerror}") from error
    names: dict[str, object] = {"__name__": path.removesuffix(".py"), "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ValueError(f"rule: {format_error(error, path)}") from error
    function = names.get(function_name)
    if not inspect.isfunction(function):
        functions = [key for key, value in names.items() if getattr(value, "__module__", None) == names["__name__"]]
        raise ValueError(f"rule: {path} has no function {function_name}; it has {', '.join(functions) or 'none'}")
    unknown = [name for name in Rule(name, function).inputs if name not in (*GIVEN, *DERIVED)]
    starred = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _signature(function))
    if unknown or starred:  # **kwargs would accept a misspelled parameter without effect
        wrong = f"{unknown[0]!r} is not an input" if unknown and not starred else "*args and **kwargs are not allowed"
        raise ValueError(
            f"rule: {name}: {wrong}; write `def {function_name}(ratio, advantages, *, parameter=value)` with inputs "
            f"from {', '.join((*GIVEN, *DERIVED))}"
        )
    return Rule(name, function).with_parameters(parameters)


# ---- checking a rule ----


def check_rule(rule: Rule) -> str:
    """Run a rule on a synthetic batch, which takes a few ms on a CPU; return its kind, "bounds" or "weight".

    Raises ValueError for:
    - results with wrong shape or dtype, with a gradient, or not finite (an upper bound may be infinite)
    - bounds that exclude the ratio 1
    - a write to an input
    - any exception of the function, with its line
    """
    batch = synthetic_batch()
    try:
        result = rule(**batch)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        where = format_error(error, inspect.unwrap(rule.function).__code__.co_filename)
        raise ValueError(f"rule: {rule.name} failed on a synthetic batch: {where}") from error
    for name, value in synthetic_batch().items():
        if not torch.equal(value, batch[name]):
            raise ValueError(f"rule: {rule.name} writes to its input {name}; compute a new tensor instead")
    if not isinstance(result, tuple):
        _examine(rule, "w", result, batch)
        return "weight"
    if len(result) != 2:
        raise ValueError(f"rule: {rule.name} returned {len(result)} values; return a weight (T,), or (lower, upper)")
    lower, upper = _examine(rule, "lower", result[0], batch), _examine(rule, "upper", result[1], batch)
    outside = (lower > 1) | (upper < 1) | (lower < 0)
    if outside.any():
        token = int(outside.float().argmax())
        raise ValueError(
            f"rule: {rule.name}: bounds [{lower[token]:.4g}, {upper[token]:.4g}] do not satisfy 0 <= lower <= 1 <= "
            f"upper, at p {batch['old_logprobs'][token].exp():.4g}, A {batch['advantages'][token]:.4g}"
        )
    return "bounds"


def _examine(rule: Rule, name: str, value: object, batch: Mapping[str, Tensor]) -> Tensor:
    """Check and return a result: one finite number per token, in the dtype of the inputs, without gradient."""
    where, logprobs = f"rule: {rule.name}: {name}", batch["logprobs"]
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}; return a weight (T,), or a tuple (lower, upper)")
    if value.shape != logprobs.shape or value.dtype != logprobs.dtype:
        raise ValueError(
            f"{where} is {value.dtype} of shape {tuple(value.shape)} for {len(logprobs)} tokens of {logprobs.dtype}; "
            "return one number per token, of the same dtype"
        )
    if value.isnan().any() or (name != "upper" and value.isinf().any()):
        token = int((~value.isfinite()).float().argmax())
        ratio = (logprobs[token] - batch["old_logprobs"][token]).exp()
        at = f"r {ratio:.4g}, p {batch['old_logprobs'][token].exp():.4g}, A {batch['advantages'][token]:.4g}"
        raise ValueError(f"{where} is {value[token]:.4g} at {at}; it must be finite")
    if value.requires_grad:
        raise ValueError(f"{where} has a gradient; call .detach()")
    return value


def format_error(error: BaseException, path: str) -> str:
    """Format an error with its line in the file `path`, if it is in the traceback. A SyntaxError has its own line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = f":{frames[-1].lineno}" if frames else ""
    return f"{path}{line}: {type(error).__name__}: {error}"


def synthetic_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return inputs of a rule for 293 tokens, the same for every call.

    Old probabilities are rare to certain, ratios are e^-3 to e^3 or exactly 1, advantages are positive, negative or 0.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 40, 100, 150])
    tokens = int(lengths.sum())
    old = -torch.logspace(-4, 1.2, tokens, dtype=torch.float64)[torch.randperm(tokens, generator=generator)]
    shift = 2 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    moved = -(old + shift.clamp(-3, 3)).abs()
    moved[::5] = old[::5]
    return {
        "logprobs": moved.to(dtype),
        "old_logprobs": old.to(dtype),
        "advantages": torch.tensor([1.5, -0.5, 0.0, 1.0, -2.0], dtype=dtype).repeat_interleave(lengths),
        "entropy": torch.linspace(0, 10, tokens, dtype=dtype),
        "sequence_ids": torch.repeat_interleave(lengths),
    }
