"""What `--resume FOLDER` continues: which checkpoint, and whether all still fits to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from files.atomic import RunLock
from files.errors import UserError, counted, no_such_folder, note
from files.folders import damage, sweep
from files.strict_json import read_json_object
from train.config.load import check_resume_overrides, load_config
from train.config.schema import RunConfig
from train.config.toml import flat
from train.plan.steps import RunPlan, effective_batch_size
from train.process.world import ALONE, World
from train.report.page import REPORT_FILE, write_report
from train.saving.checkpoints import STEP_FOLDER, Checkpoints, read_state
from train.state import TrainState


@dataclass(frozen=True)
class Resume:
    """A run to continue."""

    folder: Path  # the run's folder
    checkpoint: Path | None  # the verified checkpoint to go on from; None starts at the first step
    state: TrainState | None  # its state, None without one
    identity: dict[str, Any] | None  # what it was trained from, None without one

    def earlier_schedules(self, plan: RunPlan) -> list[dict[str, Any]]:
        """Return the schedules that steps so far followed, where `plan` has drawn another since.

        Each holds for the steps up to `until`, from the one before it on. A run whose length was
        changed has another schedule from the next step on: beside each stands the learning rate of
        that step, as it was drawn before and as it is now.
        """
        if self.state is None:
            return []
        try:
            before = read_json_object(self.folder / "plan.json")
            earlier = before.get("earlier_schedules", [])
            lengths = [
                (int(one["until"]), int(one["total_steps"]), int(one["warmup_steps"]))
                for one in [*earlier, {**before, "until": self.state.step}]
            ]
        except (UserError, KeyError, TypeError, ValueError, OverflowError):
            return []  # the plan is written anew; what it said of steps long done is lost
        followed: list[tuple[int, RunPlan]] = []
        for until, total, warmup in lengths:
            # From a checkpoint before it, the steps in between are done again.
            until = min(until, self.state.step)
            if until > (followed[-1][0] if followed else 0):
                followed.append((until, replace(plan, total_steps=total, warmup_steps=warmup)))
        while followed and followed[-1][1] == plan:
            followed.pop()
        drawn_next = [*(schedule for _, schedule in followed[1:]), plan]
        return [
            {
                "until": until,
                "total_steps": schedule.total_steps,
                "warmup_steps": schedule.warmup_steps,
                "learning_rate_before": schedule.learning_rate(until + 1),
                "learning_rate_after": after.learning_rate(until + 1),
            }
            for (until, schedule), after in zip(followed, drawn_next, strict=False)
        ]


def find_run(
    place: Path, overrides: Mapping[str, Any], world: World = ALONE
) -> tuple[RunConfig, Resume | None]:
    """Return the configuration of the run at `place` and what to continue, None where finished.

    Rank 0 chooses the checkpoint, and puts aside what is damaged; the others take the same.

    Args:
        place: A run's folder (its newest verified checkpoint is taken) or one checkpoint's (which
            must verify).
        overrides: Keys given on the command line; only those that change no result so far are
            allowed.
        world: The ranks that go on with it.

    Raises:
        UserError: No run is there, its checkpoint is damaged, or an override is not allowed.
    """
    whole = place.resolve()
    named = STEP_FOLDER.fullmatch(whole.name) is not None and whole.parent.name == "checkpoints"
    folder = whole.parent.parent if named else place
    if not place.is_dir():
        raise UserError(f"--resume {place}: {no_such_folder(place)}")
    if not (folder / "config.toml").is_file():
        raise UserError(
            f"--resume {place}: no run is there (its folder has a config.toml); give the folder "
            "that the run printed when it began, or one of its checkpoints"
        )
    before = load_config(file=folder / "config.toml")
    unchanged = {key: value for key, value in flat(before).items() if value is not None}
    config = load_config(file=folder / "config.toml", overrides=overrides)
    changed = {key for key, value in flat(config).items() if flat(before)[key] != value}
    check_resume_overrides({key: unchanged.get(key) for key in changed})
    config = _with_its_batch(config, folder, world)
    resume: Resume | None = None

    def choose() -> str:
        nonlocal config, resume
        # A live run's half-written checkpoint would be swept, and its whole ones renamed.
        with RunLock(folder):
            config, resume = _what_is_left(config, folder, whole if named else None, bool(changed))
        chosen = resume and (str(resume.checkpoint) if resume.checkpoint else "")
        return json.dumps(chosen)

    chosen = json.loads(world.told("checkpoint", choose))
    if not world.first and chosen is not None:
        state = read_state(Path(chosen)) if chosen else (None, None)
        resume = Resume(folder, Path(chosen) if chosen else None, *state)
    return config, resume


def _with_its_batch(config: RunConfig, folder: Path, world: World) -> RunConfig:
    """Return the configuration with as many examples a step as the run had on its ranks.

    Steps of tokens are the same on any number of them.

    Raises:
        UserError: `config.toml` was changed so that it asks for another number.
    """
    try:
        plan = read_json_object(folder / "plan.json")
        batch, tokens = int(plan["effective_batch_size"]), plan.get("effective_batch_tokens")
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return config  # the plan is written anew
    train = config.train
    if train.effective_batch_tokens != tokens:
        key, was, now = "effective_batch_tokens", tokens, train.effective_batch_tokens
    elif tokens is not None or effective_batch_size(config, world.size) == batch:
        return config
    else:
        key, was, now = "effective_batch_size", batch, train.effective_batch_size
    if now is not None or tokens is not None:
        raise UserError(
            f"--resume: train.{key} was {was} and is {now} in config.toml; a resumed run keeps its "
            "settings: put the old value back, or start a new run"
        )
    if world.first:
        note(
            f"a step keeps the {counted(batch, 'example')} that it had before, on "
            f"{counted(world.size, 'rank')} now (train.effective_batch_size={batch})"
        )
    return replace(config, train=replace(train, effective_batch_size=batch))


def _what_is_left(
    config: RunConfig, folder: Path, place: Path | None, changed: bool
) -> tuple[RunConfig, Resume | None]:
    """Return the rest of a run that no other process writes to; `place` is the checkpoint named."""
    if place is not None:
        problem = damage(place)
        if problem is not None:
            raise UserError(
                f"--resume {place}: {problem}; resume the run's folder to take an older one"
            )
        return config, Resume(folder, place, *read_state(place))
    checkpoint = Checkpoints(folder / "checkpoints", None).newest_verified(print)
    if checkpoint is None:
        damaged = any((folder / "checkpoints").glob("corrupt-*"))
        which = "no whole checkpoint is left" if damaged else "no checkpoint yet"
        print(f"{folder}: {which}; starting from the first step")
        return config, Resume(folder, None, None, None)
    state, identity = read_state(checkpoint)
    if not changed and _is_finished(folder, state.step):
        # A kill may have come after the status and before the report.
        sweep(folder)
        sweep(folder / "final")
        if not (folder / REPORT_FILE).is_file():
            write_report(folder)
        print(f"{folder}: finished; {checkpoint.name} verified, nothing is left to do")
        return config, None
    return config, Resume(folder, checkpoint, state, identity)


def ran_out_of_memory(folder: Path) -> bool:
    """Return whether the run in a folder ended because a rank that shares its model ran out."""
    with contextlib.suppress(UserError):
        return read_json_object(folder / "status.json").get("reason") == "out_of_memory"
    return False


def _is_finished(folder: Path, step: int) -> bool:
    """Return whether the run ended at `step`, that of its newest checkpoint.

    A resume from an older one may have been killed before it wrote a status of its own.
    """
    try:
        status = read_json_object(folder / "status.json")
    except UserError:
        return False
    return status.get("state") == "finished" and status.get("step") == step
