"""The training loop: step, record, evaluate, save, stop. It reads top to bottom."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from signal import SIGINT, SIGTERM

from files.faults import faultpoint
from train.batches import StepBatches
from train.evaluate import evaluate
from train.evaluation.holes import with_holes
from train.healing import cannot_be_undone, do_less, ran_out_on_a_rank, step_does_not_fit
from train.log.records import Records
from train.process.memory import is_out_of_memory
from train.process.signals import Signals
from train.process.world import World
from train.saving.saver import Saver
from train.state import Run, StepResult, TrainState, observe_loss
from train.step import train_step

# A run whose loss is not finite this many steps in a row is stopped (exit code 3).
NON_FINITE_LIMIT = 3


def train(run: Run, records: Records, saver: Saver, signals: Signals) -> str:
    """Train from the state's step to the plan's end and return why it ended.

    Returns:
        `completed`, `early_stopping`, `non_finite`, or the name of a signal (`sigint`, `sigterm`).
        In every case the state was saved first, or is being saved in the background.

    Raises:
        UserError: Memory does not suffice, however small the micro-batches.
    """
    plan, state, world = run.plan, run.state, run.world
    batches = StepBatches.of(run.config, plan, run.data, world)
    while state.step < plan.total_steps and not state.stopping.should_stop:
        saver.writer.check()
        step = state.step + 1
        result = step_that_fits(run, records, saver, batches, step)
        spike = advance(state, result)
        if result.skipped is not None or spike is not None:
            result = replace(result, examples=world.gathered(result.examples))
        records.step(result, spike)
        faultpoint("step.recorded")

        new_best = False
        if plan.evaluates_at(step) and run.data.valid is not None:
            evaluation = evaluate(
                run.model, run.data.valid, run.evaluation_batching, run.precision, world
            )
            evaluation = with_holes(run, run.data.valid, evaluation)
            faultpoint("evaluation.done")
            new_best = state.stopping.observe(step, evaluation.loss)
            since = state.take_loss_since_eval()
            records.evaluation("valid", evaluation, best=new_best, train_loss=since)

        not_finite = state.non_finite_in_a_row >= NON_FINITE_LIMIT
        stop, asked = agreed(world, signals, overdue=saver.is_due())
        ends_here = stop is not None or not_finite or state.stopping.should_stop
        due = ends_here or plan.saves_at(step) or asked
        if due or new_best:
            saver.save(best=new_best, checkpoint=due)
        if due:
            signals.save = False
        if stop is not None:
            return stop
        if not_finite:
            return "non_finite"
    return "early_stopping" if state.stopping.should_stop else "completed"


def agreed(world: World, signals: Signals, *, overdue: bool) -> tuple[str | None, bool]:
    """Return the signal that stops every rank, if any of them had one, and whether all save now."""
    stop = signals.stop
    interrupted, terminated, save = world.any(
        stop is SIGINT, stop is SIGTERM, signals.save or overdue
    )
    return "sigint" if interrupted else "sigterm" if terminated else None, save


def step_that_fits(
    run: Run, records: Records, saver: Saver, batches: StepBatches, step: int
) -> StepResult:
    """Do one step; where memory does not suffice, redo it doing less at once (`do_less`).

    Raises:
        UserError: Memory does not suffice for a single example, whatever is computed again, and the
            state before the step is saved; or it ran out while weights were being updated: they are
            neither the old nor the new ones.
    """
    plan, state = run.plan, run.state
    while True:
        divisor, policy = state.micro_batch_divisor, run.model.gradient_checkpointing
        batch = batches.cut(*plan.batch(step), divisor)
        ahead = None
        if step < plan.total_steps:
            ahead = partial(batches.cut_ahead, *plan.batch(step + 1), divisor)
        try:
            result = train_step(
                run.model,
                run.optimizer,
                batch,
                learning_rate=plan.learning_rate(step),
                max_grad_norm=run.config.optimizer.max_grad_norm,
                precision=run.precision,
                scaler=run.scaler,
                draw=(run.config.train.seed, step),
                meanwhile=ahead,
                # Recomputing needs the most in the middle of a backward pass, where nobody looks.
                at_most=run.memory.observe if policy in ("none", "norms") else None,
                world=run.world,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if run.world.shards:
                raise ran_out_on_a_rank(run, f"step {step}") from None
            raise cannot_be_undone(saver, step) from None
        if result.skipped != "out of memory":
            return result
        several = any(len(micro_batch.examples) > 1 for micro_batch in batch)
        if (how := do_less(run, single=not run.world.any(several)[0])) is None:
            raise step_does_not_fit(saver, step, batch)
        records.say(f"out of memory at step {step}: it is done again, and all goes on, with {how}")


def advance(state: TrainState, result: StepResult) -> float | None:
    """Move the state past one step; return how far its loss is a spike (`observe_loss`), if so."""
    state.step += 1
    state.tokens += result.tokens
    state.seconds += result.seconds
    not_finite = result.skipped == "non-finite"
    state.non_finite_in_a_row = state.non_finite_in_a_row + 1 if not_finite else 0
    if result.skipped is not None:
        state.skipped += 1
        return None
    state.targets += result.targets
    state.loss_since_eval += result.loss * result.targets
    state.targets_since_eval += result.targets
    return observe_loss(state.recent_losses, result.loss)
