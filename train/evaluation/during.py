"""An evaluation of a run by its own settings, between steps and at its end."""

from __future__ import annotations

from data.examples import Examples
from train.evaluate import evaluate
from train.evaluation.holes import with_holes
from train.evaluation.rated import with_rates
from train.state import EvalResult, Run


def evaluate_run(run: Run, examples: Examples) -> EvalResult:
    """Return what a run's model, as it is now, gives the examples, by the run's `eval.*`."""
    accuracy = "token_accuracy" in (run.config.eval.metrics or ())
    how = run.evaluation_batching, run.precision, run.world
    result = evaluate(run.model, examples, *how, accuracy=accuracy)
    return with_rates(run, examples, with_holes(run, examples, result))
