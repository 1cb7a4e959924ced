"""A run's folder: its documents, and what a user takes away from it.

`config.toml` (resolved), `plan.json`, `environment.json`, `status.json`; `best/` and `final/` with
the adapter or the model, the tokenizer's files and the prompt format.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from files.atomic import HOLDER_NAME, LOCK_NAME, TEMPORARY_PREFIX, write_json, write_text
from files.errors import UserError
from files.folders import make_free_folder
from files.tensors import Rows
from kernels.cpu.rounding import library
from lora import adapter_tensors, save_adapter
from models.weights import save_model
from train.config.schema import RunConfig
from train.config.toml import to_toml
from train.log.metrics import METRICS_FILE
from train.precision import COMPUTE_DTYPES
from train.saving.shares import Tensors, shared_parameters, writer_of
from train.state import Run

PACKAGES = ("lathe", "torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "triton")
# What lies in a run's folder before the run has a status.
_OF_A_START = (
    *("config.toml", "plan.json", "environment.json", "tensorboard", "checkpoints"),
    *(METRICS_FILE, HOLDER_NAME, LOCK_NAME),
)
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def utc_now() -> str:
    """Return the time of day in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_folder(config: RunConfig) -> Path | None:
    """Return the folder that `train.output_dir` names, vacant; None where a free one is chosen.

    Raises:
        UserError: Something is in it: an existing run is never overwritten.
    """
    if config.train.output_dir is None:
        return None
    folder = Path(os.path.expanduser(config.train.output_dir))
    if folder.is_file():
        raise UserError(f"train.output_dir={folder}: is a file; choose another folder")
    _require_vacant(folder)
    return folder


def new_run_folder(config: RunConfig) -> Path:
    """Make the folder of a new run, which holds nothing, or what an aborted start left.

    Raises:
        UserError: As `run_folder`, or it cannot be made.
    """
    folder = run_folder(config)
    if folder is None:
        return make_free_folder(Path("runs"), config.preset or "run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"train.output_dir={folder}: cannot be made ({error.strerror}); choose another folder"
        ) from None
    return folder


def _require_vacant(folder: Path) -> None:
    """Refuse a folder that holds more than an aborted start leaves: one killed before its status.

    It holds the lock, and no step was done in it, so that nothing is lost.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    left = {name for name in names if name.startswith(TEMPORARY_PREFIX)}
    metrics = folder / METRICS_FILE
    done = any(folder.glob("checkpoints/*")) or (metrics.is_file() and metrics.stat().st_size > 0)
    if LOCK_NAME in names and not done:
        left |= names & {*_OF_A_START}
    if names - left:
        raise UserError(
            f"train.output_dir={folder}: it is not empty, and a run is never overwritten; choose "
            "another folder, or continue the run there with --resume"
        )


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of the packages that a result depends on, those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(device: torch.device, **decided: Any) -> dict[str, Any]:
    """Return environment.json: where the run computes, with what, and what `auto` came to."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "commit": code_commit(),
        "started": utc_now(),
        **decided,
    }


def code_commit() -> str | None:
    """Return the commit of this code; None outside a checkout, or where there is no git."""
    # An installed copy may lie in the checkout of something else, whose commit is not ours.
    if not (REPOSITORY / ".git").exists():
        return None
    with contextlib.suppress(OSError):
        asked = ["git", "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


@contextlib.contextmanager
def beginning(folder: Path, *, new: bool) -> Iterator[None]:
    """Free a new run's folder again where this block ends in an error: nothing is trained yet.

    Raises:
        UserError: Another run has begun and ended in the folder since it was chosen.
    """
    if new:
        _require_vacant(folder)
    try:
        yield
    except BaseException:
        if new:
            for name in _OF_A_START:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
                shutil.rmtree(folder / name, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
        raise


def write_documents(
    folder: Path,
    config: RunConfig,
    plan: dict[str, Any],
    device: torch.device,
    checked: dict[str, Any] | None = None,
) -> None:
    """Write config.toml, plan.json and environment.json; `checked` is what `vouch` found."""
    write_text(folder / "config.toml", to_toml(config, comments=False))
    write_json(folder / "plan.json", plan)
    decided = {
        "precision": config.train.precision,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "kernels": plan["kernels"],
        "kernels_checked": checked,
        "attention": plan["attention"],
        "products": library(device, COMPUTE_DTYPES[config.train.precision]),
    }
    write_json(folder / "environment.json", environment(device, **decided))


def device_name(device: torch.device) -> str:
    """Return the real name of a device: the GPU's, or the processor's as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def trained_tensors(run: Run) -> Tensors:
    """Return what is trained under the names of its files: live, without gradient history."""
    if run.config.train.method == "lora":
        return adapter_tensors(run.model)
    return shared_parameters(run)


def write_trained(run: Run, tensors: Tensors, folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write what was trained as others read it: a PEFT adapter, or a whole model in `dtype`.

    `tensors` is what `trained_tensors` gave, or a copy of it; an adapter keeps its fp32.

    Returns:
        File name → sha256 (hex) of each weights file.
    """
    if run.config.train.method == "full":
        return save_model(
            tensors,
            folder,
            config=run.model.config,
            dtype=dtype,
            write=writer_of(run),
            leads=run.world.first,
        )
    return save_adapter(
        run.model,
        folder,
        base_model=run.source.repository or str(run.source.folder),
        revision=run.source.commit,
        tensors={name: x for name, x in tensors.items() if not isinstance(x, Rows)},
    )


def export(run: Run, folder: Path, tensors: Tensors | None = None) -> dict[str, str]:
    """Fill `folder` with what a user takes away: the trained, tokenizer and prompt format.

    `tensors` is a copy of what `trained_tensors` gave; without one the present weights are written.

    The base's generation_config.json goes with them, byte for byte: it says where a text ends.

    Returns:
        File name → sha256 (hex) of each weights file.
    """
    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = stored.get(run.model.config.torch_dtype or "", torch.float32)
    tensors = trained_tensors(run) if tensors is None else tensors
    hashes = write_trained(run, tensors, folder, dtype)
    if not run.world.first:
        return hashes
    run.data.tokenizer.save(folder)
    generation = run.source.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    write_json(folder / "prompt_format.json", run.data.prompt_format.to_dict())
    return hashes
