"""Python in a process of its own, as somebody types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def python(
    *arguments: str, code: int = 0, cwd: Path = ROOT, given: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python on one thread, our folders on its path; it must end with the exit code `code`.

    Its standard input is what is `given`.
    """
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **ours, **environment},
        input=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def asked_of_the_hub(code: str, calls: Any, home: Path, endpoint: str, **environment: str) -> Any:
    """Give calls to a child that speaks with a Hub of this machine alone; return its answers.

    huggingface_hub reads its environment when it is imported.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    clean |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        env=clean | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
