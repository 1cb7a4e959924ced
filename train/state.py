"""What a run works with, what its steps and evaluations give, and what a resume continues from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config.schema import LOWER_IS_BETTER

if TYPE_CHECKING:
    from data.batch import Batching
    from files.hub import ModelSource
    from models.layers import CausalLM
    from train.config.schema import RunConfig
    from train.inputs.dataset import Data
    from train.optim.buffers import Optimizer
    from train.plan.steps import RunPlan
    from train.precision import LossScaler, Precision
    from train.process.memory import MemoryUse
    from train.process.world import World

# Of loss spikes, see `observe_loss`.
WINDOW = 128
MIN_LOSSES = 32
DEVIATIONS = 6.0


@dataclass
class Sample:
    """A prompt, what the row says comes next, and what the model says before and after training.

    What comes next is the trained text behind the prompt, up to the next turn of a conversation.
    """

    prompt: str
    reference: str
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Run:
    """Everything that a run works with.

    It has no methods: what is done with it stands where it is done, in `train.loop`.
    """

    config: RunConfig  # what was asked, every `auto` decided
    plan: RunPlan  # when what happens
    data: Data
    evaluation_batching: Batching  # how evaluations are cut
    source: ModelSource  # where the base model's files are
    model: CausalLM  # the decoder, its trainable parameters marked
    optimizer: Optimizer  # their update rule
    precision: Precision  # what is computed in, and where
    scaler: LossScaler | None  # the loss scaler under fp16, else None
    state: TrainState  # what a resume continues from; mutable, as the model and the optimizer are
    samples: list[Sample]  # completions shown in the report
    memory: MemoryUse  # what the training takes
    folder: Path  # where all of it is kept
    world: World  # the ranks that share each step


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    # Token mean over the step's targets (nats), by the weights of their rows where they have such:
    # the number that was differentiated.
    loss: float
    learning_rate: float  # the rate of the update
    grad_norm: float  # global L2 norm of the gradient before clipping
    targets: int  # tokens with a label
    tokens: int  # real tokens, padding left out
    seconds: float  # wall time of the step
    # Why no weight was touched (`no targets`, `non-finite`, `out of memory`); None after an update.
    skipped: str | None = None
    # Index of each of the step's examples; where some micro-batches had a loss that is not finite,
    # those of these alone.
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class EvalResult:
    """The loss over a set."""

    loss: float  # token mean (nats per target)
    targets: int  # tokens with a label
    seconds: float  # wall time
    # Examples in a forward pass, where memory did not suffice for as many as were asked for.
    reduced_batch_size: int | None = None
    token_accuracy: float | None = None  # share of targets that were the likeliest token, if asked
    holes: int = 0  # holes that the model was asked to fill (`eval.holes`)
    completed: int = 0  # rows that it completed (`eval.complete`)
    rates: Mapping[str, float] = field(default_factory=dict)  # what came of these, by metric

    @property
    def perplexity(self) -> float:
        """Return e to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def distance(self, metric: str) -> float:
        """Return how far a metric is from the best it could be: lower is better of each."""
        value = self.value(metric) if math.isfinite(self.loss) else math.nan
        return value if metric in LOWER_IS_BETTER else 1 - value

    def value(self, metric: str) -> float:
        """Return one of the metrics that were asked for, or the loss."""
        return self.rates[metric] if metric in self.rates else getattr(self, metric)


@dataclass
class EarlyStopping:
    """Best evaluation so far, and the number of evaluations in a row that did not improve enough.

    The rule is that of the stack: the best moves on any strict improvement; the count of failures
    is reset only by an improvement of more than `threshold`. A loss that is not finite is a
    failure.

    Source: transformers 5.23 `EarlyStoppingCallback`.
    """

    patience: int | None  # failures in a row after which to stop; None never stops
    threshold: float = 0.0  # improvement in loss (nats per target) that a reset needs to exceed
    best_step: int | None = None  # step of the best evaluation, None before the first
    best_loss: float | None = None  # its loss, or its distance by another metric
    failures: int = 0  # evaluations in a row without a sufficient improvement

    def observe(self, step: int, loss: float) -> bool:
        """Take in the loss, or another distance, at `step`; return whether it is the lowest yet."""
        finite = math.isfinite(loss)
        gain = math.inf if self.best_loss is None else self.best_loss - loss
        self.failures = 0 if finite and gain > self.threshold else self.failures + 1
        improved = finite and gain > 0
        if improved:
            self.best_step, self.best_loss = step, loss
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.patience is not None and self.failures >= self.patience


@dataclass
class TrainState:
    """All that a run is, beside its weights and its optimizer: what a resume continues from."""

    stopping: EarlyStopping  # best evaluation and patience
    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens trained on, padding left out
    targets: int = 0  # tokens with a label trained on
    seconds: float = 0.0  # wall time in steps, evaluation and saving left out
    loss_since_eval: float = 0.0  # sum of token losses since the last evaluation (nats)
    targets_since_eval: int = 0  # targets that sum belongs to
    scaler: dict[str, Any] | None = None  # state of the fp16 loss scaler, None without one
    skipped: int = 0  # steps without an update, over the whole run
    non_finite_in_a_row: int = 0  # latest steps in a row whose loss or gradient was not finite
    # Steps at which the run was taken up again.
    resumed_from: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0  # highest memory use seen, over all of the run's processes
    # What the configured size of micro-batches is divided by, a power of two: more than 1 since
    # memory once did not suffice.
    micro_batch_divisor: int = 1
    # What layers keep of activations (`models.recompute`), where that is less than is configured:
    # since memory once did not suffice for a single example.
    gradient_checkpointing: str | None = None
    # Losses of the latest updates, what a spike is measured against (`observe_loss`).
    recent_losses: list[float] = field(default_factory=list)

    def take_loss_since_eval(self) -> float | None:
        """Return the mean loss of the steps since the last call (nats per target); None of none."""
        targets, total = self.targets_since_eval, self.loss_since_eval
        self.loss_since_eval, self.targets_since_eval = 0.0, 0
        return total / targets if targets else None

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Return the state that `to_dict` gave.

        Raises:
            TypeError: A field is missing, unknown, or of another type.
        """
        state = cls(**{**values, "stopping": EarlyStopping(**values["stopping"])})
        _check_types(state.stopping)
        _check_types(state)
        if state.micro_batch_divisor < 1:
            raise TypeError(f"micro_batch_divisor is {state.micro_batch_divisor}")
        if state.gradient_checkpointing not in (None, *_POLICIES):
            raise TypeError(f"gradient_checkpointing is {state.gradient_checkpointing!r:.60}")
        return state


# Those of `models.recompute`, which this module does not import: it would bring torch.
_POLICIES = ("none", "norms", "mlp", "layers", "offload")
# What a field of these annotations may hold in JSON.
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "list[int]": (list,),
    "list[float]": (list,),
    "dict[str, Any] | None": (dict, type(None)),
    "EarlyStopping": (EarlyStopping,),
}


def _check_types(state: TrainState | EarlyStopping) -> None:
    for one in fields(state):
        value = getattr(state, one.name)
        allowed = _JSON_TYPES[str(one.type)]
        items = value if isinstance(value, list) else []
        item_type = float if one.type == "list[float]" else int
        if not isinstance(value, allowed) or any(type(item) is not item_type for item in items):
            raise TypeError(f"{one.name} is {value!r:.60}")
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
            raise TypeError(f"{one.name} is {value!r:.60}")


def observe_loss(recent: list[float], loss: float) -> float | None:
    """Return how many standard deviations a spike lies above the losses before; enter the loss.

    A spike is a loss more than `DEVIATIONS` standard deviations above the mean of the last `WINDOW`
    losses, those before it. It enters the window like any other loss: the next few of a series are
    still found (after one at 20 deviations, one at 13 is), and a rise that lasts becomes what the
    steps to come are measured against.

    Nothing is said before `MIN_LOSSES` losses are there: a deviation of n values is uncertain by
    the share 1/√(2n), which is an eighth at 32, and normal losses exceed six of them once in a
    million steps; of two values it would say nothing. OLMo-core waits for 64, which is more steps
    than many a fine-tuning has.

    Args:
        recent: The losses so far, at most `WINDOW`, oldest first; changed in place. All are finite.
        loss: The finite loss of the step just done (nats per target).

    Returns:
        The number of standard deviations, or None where the loss is no spike.

    Source: OLMo-core, `SkipStepOptimizer`, which skips the update, and also by gradient norm.
    """
    spike = None
    if len(recent) >= MIN_LOSSES:
        mean = math.fsum(recent) / len(recent)
        squares = math.fsum((other - mean) ** 2 for other in recent)
        deviation = math.sqrt(squares / (len(recent) - 1))
        if deviation > 0 and loss - mean > DEVIATIONS * deviation:
            spike = (loss - mean) / deviation
    recent.append(loss)
    del recent[:-WINDOW]
    return spike
