"""How a command ends: its answer, or one sentence and an exit code, never a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable

from files.errors import UserError


def run_command(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; 2 after bad input, 130 after Ctrl-C.

    What the terminal's encoding cannot show is shown as `?`. When the reader of a pipe has had
    enough (`--list-presets | head -1`), the rest goes nowhere.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A full disk, a folder that may not be written, a card that was taken out.
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
