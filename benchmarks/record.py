"""Benchmark records: what was measured, where and at which commit; appended, one object a line."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from train.saving.folder import device_name, package_versions

RESULTS = Path(__file__).resolve().parent / "results"
_CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "triton", "numpy")


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where there is no git, or no repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_bytes() -> int:
    """Return the most memory that this process has had resident (Linux).

    Not `ru_maxrss`, which begins at the size of the process that started this one.
    """
    return _status("VmHWM")


def resident_bytes() -> int:
    """Return the memory that this process has resident now (Linux)."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def read(name: str) -> list[dict[str, Any]]:
    """Return the records of `benchmarks/results/<name>.jsonl`, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def circumstances() -> dict[str, Any]:
    """Return device, threads, versions, commit, time and command: no figure is read without."""
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": _git(*_CHANGES) != "",  # where nobody can say, too
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]
        ),
    }


def append(name: str, row: dict[str, Any]) -> None:
    """Append `row` with its circumstances to `benchmarks/results/<name>.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **circumstances()}) + "\n")
