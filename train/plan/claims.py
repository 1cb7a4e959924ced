"""The seeds' claims against the formulas: every number that a seed states, confirmed or refuted."""

from __future__ import annotations

from typing import Any

from train.config.presets import Claim, Preset
from train.config.schema import RunConfig
from train.inputs.known import Unknown
from train.plan.ledger import find_decoder_config, memory_ledger
from train.plan.sizes import model_sizes
from train.plan.steps import effective_batch_size, plan_run, rank_shares


def check_claims(preset: Preset | None) -> list[tuple[Claim, float | None]]:
    """Return each claim of a preset's seed with what the formulas give for it.

    The preset's own settings are measured, whatever a run overrides; None is not computable.
    """
    if preset is None:
        return []
    return [
        (claim, None if claim.quantity is None else measure(claim.quantity, preset))
        for claim in preset.claims
    ]


def agrees(claim: Claim, value: float) -> bool:
    """Return whether the formulas give what a claim says, within its tolerance."""
    return claim.value is not None and abs(value - claim.value) <= claim.tolerance


def measure(quantity: str, preset: Preset) -> float | None:
    """Compute one named quantity (`name` or `name@number`) of a preset's plan.

    None where the seed does not state what it depends on.
    """
    name, _, at = quantity.partition("@")
    config, batch = preset.config, effective_batch_size(preset.config)
    if name == "effective_batch_size":
        return batch
    if name in ("largest_rank_share", "rank_share_spread"):
        shares = rank_shares(batch, int(at))
        return max(shares) - (min(shares) if name == "rank_share_spread" else 0)
    if name in _SIZE_QUANTITIES:
        return _measure_size(name, config, at)
    if preset.num_examples is None:
        return None
    plan = plan_run(config, preset.num_examples, num_valid=preset.num_valid)
    patience = config.eval.early_stopping_patience or 0
    quantities = {
        "steps_per_epoch": lambda: plan.steps_per_epoch,
        "total_steps": lambda: plan.total_steps,
        "warmup_steps": lambda: plan.warmup_steps,
        "evaluations": lambda: len(plan.eval_steps),
        "eval_interval": lambda: plan.eval_steps[0],
        "save_interval": lambda: plan.save_steps[0],
        "log_interval": lambda: plan.log_steps[0],
        "epoch_checkpoints": lambda: len(plan.save_steps),
        "evaluations_before_first_log": lambda: sum(
            step < plan.log_steps[0] for step in plan.eval_steps
        ),
        # The rate that the schedule has come to after so many updates.
        "learning_rate_after": lambda: plan.learning_rate(int(at) + 1),
        "stopped_after_best": lambda: int(at) + patience * plan.eval_steps[0],
    }
    if name not in quantities:
        raise ValueError(f"claims cannot name the quantity {quantity!r}")
    return quantities[name]()


_SIZE_QUANTITIES = (
    *("base_parameters", "trainable_parameters", "trainable_percent"),
    *("optimizer_gigabytes", "weights_gigabytes", "gigabytes_with_activations"),
)
_LASTING = ("weights", "adapters", "gradients", "optimizer")


def _measure_size(name: str, config: RunConfig, at: str) -> float | None:
    decoder = find_decoder_config(config)
    if isinstance(decoder, Unknown):
        return None
    sizes = model_sizes(decoder, config.train.method, config.lora)
    if "gigabytes" in name:
        precision = "bf16" if config.train.precision == "auto" else config.train.precision
        ledger = memory_ledger(config, decoder, sizes, precision=precision)
        if name == "gigabytes_with_activations":
            return sum(ledger[part] for part in _LASTING) / 1e9 + float(at)
        return ledger[name.removesuffix("_gigabytes")] / 1e9
    return getattr(sizes, name.removesuffix("_parameters"))


def claim_row(claim: Claim, value: float | None) -> dict[str, Any]:
    """Return a checked claim for the plan document."""
    return {
        "statement": claim.statement,
        "where": claim.where,
        "claimed": claim.value,
        "planned": value,
        "holds": claim.holds if value is None else agrees(claim, value),
        "right": claim.right,
        "note": claim.note,
    }
