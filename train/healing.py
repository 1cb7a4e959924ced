"""What a run does where memory does not suffice: a look ahead, and less at once.

First micro-batches are halved; of single examples layers keep less, by the next policy of
`models.recompute`. Neither changes loss or gradient. Both stay for the rest of the run, in its
state, so that a resume goes on with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.batch import MicroBatch
from files.errors import UserError
from models.recompute import POLICIES
from train.batches import StepBatches
from train.inputs.sharding import NOTHING
from train.log.records import Records
from train.loss import loss_sum
from train.plan.decide import possible_policies
from train.plan.ledger import micro_batch_tokens
from train.process.memory import OF_A_RANK, does_not_fit, is_out_of_memory, within_memory
from train.saving.saver import Saver
from train.state import Run, TrainState

# Where the longest micro-batch is tried out before the first step: on a CPU it takes as long as a
# step, and the system ends a process that takes too much rather than refusing it memory.
PROBED = ("cuda",)


def kept_policy(configured: str, state: TrainState) -> str:
    """Return the policy that a run goes on with: the one that keeps less."""
    return max(configured, state.gradient_checkpointing or "none", key=POLICIES.index)


def do_less(run: Run, *, single: bool) -> str | None:
    """Let the run do less at once, and say how; None where nothing is left to be done.

    Args:
        run: The run; its state and model are changed.
        single: Whether each micro-batch is a single example.
    """
    state, model = run.state, run.model
    if not single:
        state.micro_batch_divisor *= 2
        size = f"1/{state.micro_batch_divisor} of their configured size"
        return f"micro-batches {size}; the gradient is the same"
    possible = possible_policies(run.config, run.precision.device.type)
    present = POLICIES.index(model.gradient_checkpointing)
    stronger = next((policy for policy in possible if POLICIES.index(policy) > present), None)
    if stronger is None:
        return None
    state.gradient_checkpointing = model.gradient_checkpointing = stronger
    return f"model.gradient_checkpointing={stronger}; the gradient is the same"


def is_single(run: Run) -> bool:
    """Return whether micro-batches, cut as they are now, hold a single one of the longest rows."""
    train, divisor = run.config.train, run.state.micro_batch_divisor
    tokens = train.micro_batch_tokens
    if isinstance(tokens, int):
        return tokens // divisor <= run.data.train.counts.longest
    return train.per_device_train_batch_size // divisor <= 1


def step_does_not_fit(saver: Saver, step: int, batch: Sequence[MicroBatch]) -> UserError:
    """Save the state before a step that cannot be done, and return the error that says so."""
    saved = ""
    done = saver.run.state.step
    if done > 0:
        saver.save(best=False, checkpoint=True)
        saver.writer.wait()
        saved = f" (the state after step {done} is saved)"
    saver.run.world.wait()  # the first rank to end may end all
    longest = max((micro_batch.num_tokens for micro_batch in batch), default=0)
    return _does_not_fit(saver.run, f"step {step}", longest, saved)


def _does_not_fit(run: Run, what: str, tokens: int, saved: str = "") -> UserError:
    policy = run.model.gradient_checkpointing
    return does_not_fit(what, tokens, f" and model.gradient_checkpointing={policy}{saved}")


def cannot_be_undone(saver: Saver, step: int) -> UserError:
    """Return the error of an update of the weights that ran out of memory half-way."""
    saver.writer.wait()
    checkpoints = saver.checkpoints
    steps = checkpoints.steps()
    last = f"from {checkpoints.path(steps[-1])}" if steps else "at the first step"
    return UserError(
        f"step {step}: out of memory in the update of the weights, which cannot be undone; "
        f"--resume {saver.run.folder} goes on {last} where more memory is free"
    )


def ran_out_on_a_rank(run: Run, what: str) -> UserError:
    """Return the error of ranks that share a model, one of which has too little memory."""
    return UserError(
        f"{what}: {OF_A_RANK} {run.world.rank} of {run.world.size}, and ranks that share a model "
        "cannot do a step again; --resume goes on from the newest checkpoint with micro-batches "
        "half as large"
    )


def try_longest(run: Run, records: Records) -> None:
    """Compute the gradient of the longest micro-batch to come, and forget it: no bit changes.

    What does not fit is known before the first step: less is done at once from there on.

    Raises:
        UserError: Memory does not suffice, however little is done at once.
    """
    if run.precision.device.type not in PROBED or run.state.step >= run.plan.total_steps:
        return
    batches = StepBatches.of(run.config, run.plan, run.data, run.world)
    step = longest_step(run, batches)
    what = f"before step {run.state.step + 1}, with the longest micro-batch, that of step {step}"
    while True:
        cut = batches.cut(*run.plan.batch(step), run.state.micro_batch_divisor)
        largest = max(cut, key=lambda part: len(part.input_ids), default=NOTHING)
        fits = _fits(run, largest, step, what)
        run.optimizer.clear_gradients()
        if not run.world.any(not fits)[0]:
            return
        how = do_less(run, single=not run.world.any(len(largest.examples) > 1)[0])
        if how is None:
            raise _does_not_fit(run, what, largest.num_tokens)
        records.say(f"{what}: out of memory; all goes on with {how}")


def longest_step(run: Run, batches: StepBatches) -> int:
    """Return the step to come that has the most rows in a micro-batch."""

    def most(step: int) -> tuple[int, int]:
        epoch, start, stop = run.plan.batch(step)
        lengths = run.data.train.lengths[batches.order(epoch)[start:stop]].tolist()
        return micro_batch_tokens(run.config, lengths, run.world.size)

    return max(range(run.state.step + 1, run.plan.total_steps + 1), key=most)


def _fits(run: Run, micro_batch: MicroBatch, step: int, what: str) -> bool:
    device, draw = run.precision.device, (run.config.train.seed, step)

    def gradient() -> bool:
        with run.precision.autocast():
            loss = loss_sum(run.model, micro_batch, device, draw)
        loss.backward()
        return True

    if not run.world.shards:
        return within_memory(gradient, device) is not None
    try:  # a collective: where one rank fails, none can do it again
        return gradient()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ran_out_on_a_rank(run, what) from None
