"""`--prove-resume`: resume shown to be exact on a user's own configuration and machine.

One run of 2K steps goes through. The other is killed by SIGKILL as soon as its checkpoint of step K
is whole, and resumed. Then everything that time does not enter must have the same bits. Each start
is a process of its own: the start belongs to the proof, and its memory is free when it ends. This
process never imports torch.

Both runs are the user's, but for these keys:

- `train.max_steps` is 2K. The schedule follows it, in both runs alike.
- `checkpoint.steps` is K, and nothing else saves. Saving reads the weights, it changes none.
- `eval.samples`, `log.tensorboard` and `log.progress` are off. They only show.
- `train.output_dir` is a folder of the proof.

Evaluations stay as configured, since they decide what is best and when to stop early.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from files.atomic import sha256_file, write_text
from files.child import python
from files.errors import UserError
from files.faults import listening
from files.folders import make_free_folder
from train.config.schema import RunConfig
from train.config.toml import to_toml
from train.inputs.adapters import with_starting_adapter
from train.log.metrics import METRICS_FILE, read_metrics
from train.plan.ledger import find_decoder_config
from train.saving.checkpoints import read_state
from train.text import aligned

# What a resumed run need not share with an uninterrupted one.
_STATE_OF_THE_PROCESS = ("seconds", "resumed_from", "peak_memory_bytes")
_RUN = "from train.run import main; sys.exit(main())"
_UNTIL_SAVED = """
from train.saving.prove import killed_when_saved
from train.run import main
with killed_when_saved(sys.argv.pop(1)): sys.exit(main())
"""


def prove_resume(config: RunConfig, kill_step: int) -> int:
    """Make both runs, print what was compared, and return the exit code.

    The runs are deleted again, unless they differ.

    `kill_step` is K, the step with whose checkpoint the second run is killed.

    Returns:
        0 where all is bit-equal, 1 where something differs.

    Raises:
        UserError: A run failed (with that run's own error), or there was no kill or no resume.
    """
    # The runs read what is written below: all of it, as if a user had written it.
    config = with_starting_adapter(config, find_decoder_config(config))
    directory = config.train.output_dir
    parent = Path("runs") if directory is None else Path(os.path.expanduser(directory)).parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    folder = make_free_folder(parent, "prove-resume")
    differing: list[str] = []
    try:
        text = to_toml(_cut(config, kill_step), comments=False)
        write_text(folder / "config.toml", text)
        whole, resumed = folder / "uninterrupted", folder / "resumed"
        _make_runs(whole, resumed, kill_step)
        sides = results(whole), results(resumed)
        differing = print_comparison(*sides)
        print("\n" + _verdict(differing, len(sides[0]), kill_step, folder))
    finally:
        if not differing:
            shutil.rmtree(folder, ignore_errors=True)
            for path in made:
                with contextlib.suppress(OSError):  # another run has begun in it
                    path.rmdir()
    return 1 if differing else 0


def results(run: Path) -> dict[str, str]:
    """Return the sha256 (hex) of what a run leaves, times and processes left out.

    Returns:
        Name → hash: each tensors file (checkpoints, `best/`, `final/`), each checkpoint's state,
        and the rows of metrics.jsonl.
    """
    found = {
        str(path.relative_to(run)): sha256_file(path) for path in sorted(run.rglob("*.safetensors"))
    }
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        state = read_state(checkpoint)[0].to_dict()
        kept = {key: value for key, value in state.items() if key not in _STATE_OF_THE_PROCESS}
        found[f"{checkpoint.relative_to(run)}/state.json"] = _sha256(kept)
    rows = [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(run)
    ]
    found[METRICS_FILE] = _sha256(rows)
    return found


def print_comparison(whole: Mapping[str, str], resumed: Mapping[str, str]) -> list[str]:
    """Print a line for each result of two runs, and return the names of those that differ."""
    lines, differing = [("sha256, without times", "uninterrupted", "resumed", "")], []
    for name in sorted({*whole, *resumed}):
        left, right = whole.get(name, "missing"), resumed.get(name, "missing")
        differing += [name] if left != right else []
        lines.append((name, left[:16], right[:16], "DIFFERS" if left != right else "equal"))
    print("\n" + "\n".join(line.rstrip() for line in aligned(lines)))
    return differing


def _cut(config: RunConfig, kill_step: int) -> RunConfig:
    """Return the configuration of both runs."""
    return replace(
        config,
        train=replace(config.train, max_steps=2 * kill_step, output_dir=None),
        checkpoint=replace(config.checkpoint, steps=kill_step, per_epoch=None, minutes=None),
        eval=replace(config.eval, samples=0),
        log=replace(config.log, tensorboard=False, progress=False),
    )


def _make_runs(whole: Path, resumed: Path, kill_step: int) -> None:
    """Make the uninterrupted run, and the other one: killed, then resumed."""
    total = 2 * kill_step
    settings = ["--config", str(whole.parent / "config.toml")]
    print(f"1 of 3: {total} steps, uninterrupted, in {whole}", flush=True)
    _succeed([*settings, f"train.output_dir={whole}"], whole.parent)

    print(f"2 of 3: the same, SIGKILL when step {kill_step} is saved, in {resumed}", flush=True)
    checkpoint = resumed / "checkpoints" / f"step-{kill_step:08d}"
    arguments = [str(checkpoint), *settings, f"train.output_dir={resumed}"]
    code = _start(arguments, _UNTIL_SAVED, whole.parent)
    if code != -signal.SIGKILL or not checkpoint.is_dir():
        ended = _status(resumed)
        raise UserError(
            f"no proof without a kill: the run to be killed at step {kill_step} ended by itself "
            f"(exit code {code}, {ended.get('reason')}) at step {ended.get('step')}; "
            "--prove-resume takes the number of steps before the kill, give fewer"
        )

    print(f"3 of 3: resumed at step {kill_step}, to the end", flush=True)
    _succeed(["--resume", str(resumed)], whole.parent)
    if _status(resumed)["resumed_from"] != [kill_step]:
        raise UserError(
            f"no proof without a resume: the checkpoint of step {kill_step} was whole when the run "
            f"was killed, but the run went on from {_status(resumed)['resumed_from'] or 'step 0'}"
        )


def _succeed(arguments: Sequence[str], folder: Path) -> None:
    code = _start(arguments, _RUN, folder)
    if code != 0:
        raise UserError(
            f"a run of the proof ended with exit code {code}; make it without --prove-resume, at "
            "that train.max_steps, to see why"
        )


def _start(arguments: Sequence[str], program: str, folder: Path) -> int:
    """Run a program of ours in a fresh process and return its exit code, -9 after SIGKILL.

    What it prints goes to output.txt in `folder`.
    """
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        done = subprocess.run(
            python(program, *arguments),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    if done.returncode == 2:
        raise UserError(done.stderr.rpartition("error: ")[2].strip())
    sys.stderr.write(done.stderr)
    return done.returncode


def _status(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "status.json").read_bytes())
    except FileNotFoundError:
        return {}


def _verdict(differing: Sequence[str], compared: int, kill_step: int, folder: Path) -> str:
    """Return the sentence that stands last."""
    if not differing:
        return (
            f"resume is exact on this machine: killed with step {kill_step} of {2 * kill_step} "
            f"saved, resumed in a new process, and all {compared} results are bit-equal"
        )
    before = any(f"step-{kill_step:08d}" in name for name in differing)
    when = (
        f"step {kill_step} differs already, before the kill, so that the same steps do not give "
        "the same bits here, resumed or not"
        if before
        else "what differs came after the resume"
    )
    return (
        f"resume is not exact here: {len(differing)} of {compared} results differ; {when}. The "
        "commonest reasons are GPU kernels that add in no fixed order (train.deterministic=true "
        "forbids them) and another number of threads (OMP_NUM_THREADS). Both runs are kept in "
        f"{folder}"
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def killed_when_saved(checkpoint: str) -> Iterator[None]:
    """Kill this process, by SIGKILL, as soon as the folder `checkpoint` is whole."""

    def kill(point: str) -> None:
        if point == "folder.renamed" and os.path.isdir(checkpoint):
            os.kill(os.getpid(), signal.SIGKILL)

    with listening(kill):
        yield
