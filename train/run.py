"""`python -m train.run`: one run, from its configuration to its report; the table of contents.

config → data → plan → model → lora → loop → checkpoints → report. Cheap failures come first: a bad
row or key is known before weights load. Nothing here imports torch until a run begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import UserError
from train.config.command_line import Arguments, completion_text, parse, show_text
from train.config.json_schema import json_schema_text
from train.config.load import load_config
from train.config.schema import RunConfig
from train.plan.text import list_presets_text
from train.process.command import run_command
from train.process.world import ALONE, World

if TYPE_CHECKING:
    from train.saving.resume import Resume

EXIT_CODES = {"non_finite": 3, "sigint": 130, "sigterm": 143}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, and the reason that `train.loop.train` returned."""

    folder: Path
    reason: str

    @property
    def exit_code(self) -> int:
        """0 when done, 3 after non-finite losses, 128 + signal when stopped (0 under torchrun)."""
        stopped = self.reason in ("sigint", "sigterm")
        return (
            0 if stopped and "TORCHELASTIC_RUN_ID" in os.environ else EXIT_CODES.get(self.reason, 0)
        )


def run(
    config: RunConfig,
    rows: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> Path:
    """Do the whole run that `config` describes, and return its folder.

    Args:
        config: The configuration.
        rows: Dictionaries to train on, instead of what `data.train` names; or split → dictionaries.

    Raises:
        UserError: Something in the configuration, the data or the model is not what it must be.
    """
    if not isinstance(config, RunConfig):
        raise UserError(
            f"a run is described by what train.config.load_config returns, not by a "
            f"{type(config).__name__}: load_config(overrides={{'model.path': …}})"
        )
    if rows is not None:
        from train.inputs.dataset import with_rows

        config = with_rows(config, rows)
    # A program may do several runs: each finds its own again.
    asked = hashlib.sha256(repr(config).encode()).hexdigest()
    with World.from_environment(asked=asked).joined() as world:
        place = world.kept_folder()
        return (_go_on(place, {}, world) if place else execute(config, world=world)).folder


def _go_on(place: str, overrides: Mapping[str, Any], world: World) -> Outcome:
    from train.saving.resume import find_run

    config, resume = find_run(Path(place), overrides, world)
    return execute(config, resume, world) if resume else Outcome(Path(place), "completed")


def execute(config: RunConfig, resume: Resume | None = None, world: World = ALONE) -> Outcome:
    """Do this rank's part of a run, or with `resume` of what is left, and return how it ended."""
    from files.atomic import RunLock
    from models.config import read_config
    from train.assemble import assemble, closing, set_up
    from train.config.paths import with_whole_paths
    from train.finish import before_training, finish, opening_panel
    from train.healing import try_longest
    from train.inputs.adapters import with_starting_adapter
    from train.inputs.agreement import agree_on_run
    from train.inputs.base_model import with_stored_quantization
    from train.inputs.model_files import find_model
    from train.kernel_check import vouch
    from train.loop import train
    from train.plan.decide import decide, decide_device, this_machine
    from train.plan.document import complete
    from train.plan.steps import plan_run
    from train.process.memory import prepare_allocator, take_card
    from train.process.signals import Signals
    from train.saving.folder import beginning, new_run_folder, write_documents
    from train.survey import data_of, print_plan, refuse_early, refuse_model

    new = resume is None
    prepare_allocator()
    take_card(decide_device(config.train.device), world)
    machine = this_machine(config, world)
    refuse_early(config, machine, new=new and world.first)
    asked, config = config, with_whole_paths(decide(config, machine))
    device = set_up(config, machine)
    checked = vouch(config, device, resume.folder if resume else None)

    try:
        source = find_model(config, weights=False)
        decoder = read_config(source.folder)
        refuse_model(config, decoder)
        config = with_stored_quantization(with_starting_adapter(config, decoder), decoder)
        data = world.first_on_node("data", lambda: data_of(config, source.folder, decoder))
    except UserError:
        # What is on the hub may be out of reach: the plan says what is known all the same. Anything
        # else that is wrong stops the plan with the same error.
        if config.preset is not None and new and world.first:
            print_plan(asked, ranks=world.size)
        raise
    plan = plan_run(config, len(data.train), world.size, num_valid=data.num_valid, rows=data)

    agree_on_run(config, data, decoder, world)
    folder = resume.folder if resume else world.shared_folder(lambda: new_run_folder(config))
    with RunLock(folder) if world.first else contextlib.nullcontext(), Signals() as signals:
        with beginning(folder, new=new and world.first):
            earlier = resume.earlier_schedules(plan) if resume else []
            config, document = complete(config, data, decoder, machine, earlier, world)
            world = replace(world, shards=document["sharding"] == "shard")
            if new and world.first:
                # At once: a kill while weights load leaves what --resume needs.
                write_documents(folder, config, document, device, checked)
            run, records, saver = assemble(
                config, plan, data, device, folder, resume, world, paging=bool(document["paging"])
            )
            if not new and world.first:
                # Not before: a resume that is refused changes nothing.
                write_documents(folder, config, document, device, checked)
        with closing(records, saver):
            if world.first:
                opening_panel(run, records)
            try_longest(run, records)
            before_training(run, records, saver)
            reason = train(run, records, saver, signals)
            reason = finish(run, records, saver, reason, signals)
    return Outcome(folder, reason)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line and return its exit code."""

    def answer() -> int:
        with World.from_environment().joined() as world:
            return _answer(parse(sys.argv[1:] if argv is None else list(argv)), world)

    return run_command(answer, over_ranks=True)


def _answer(arguments: Arguments, world: World) -> int:
    if arguments.list_presets or arguments.show:
        print(show_text(arguments.show) if arguments.show else list_presets_text())
        return 0
    if arguments.schema or arguments.completion:
        print(completion_text(arguments.completion) if arguments.completion else json_schema_text())
        return 0
    # Ranks that were started again go on with the run that they had begun.
    place = arguments.resume or world.kept_folder()
    if place:
        overrides = arguments.overrides if arguments.resume else {}
        return _go_on(place, overrides, world).exit_code
    config = load_config(arguments.preset, arguments.config_file, arguments.overrides)
    if arguments.plan:
        from train.survey import answer_plan

        return answer_plan(config, arguments, world.size) if world.first else 0
    if arguments.prove_resume is not None:
        from train.saving.prove import prove_resume

        if world.size > 1:
            raise UserError(
                "--prove-resume starts and kills processes of its own, each a whole run: give it "
                "without torchrun"
            )
        return prove_resume(config, arguments.prove_resume)
    return execute(config, world=world).exit_code


if __name__ == "__main__":
    sys.exit(main())
