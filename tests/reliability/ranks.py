"""Runs over several ranks: forked processes that meet over gloo, each with its log."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed.fsdp  # as the line before: once, and not in every rank that is forked
from trials import MAX_SECONDS

from files.faults import listening
from train.config.load import load_config
from train.process.command import run_command
from train.process.world import TIMEOUT_VARIABLE, World
from train.report import page as report
from train.run import execute
from train.saving.resume import find_run

Listener = Callable[[str], None]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(
    size: int,
    work: Callable[[World], int],
    folder: Path,
    *,
    timeout: float = 60.0,
    environment: Mapping[str, str] = {},
    times: int = 1,
) -> list[int]:
    """Fork `size` ranks that do `work` as a command does, and return their process numbers.

    The words of rank n are added to `folder/rank-n.txt`; `environment` is what torchrun sets more.
    With `times` a rank does its work that often, and meets the others each time.
    """

    def answer() -> int:
        codes = []
        for _ in range(times):
            with World.from_environment().joined() as world:
                codes.append(work(world))
        return max(codes)

    return start_program(size, answer, folder, timeout=timeout, environment=environment)


def start_program(
    size: int,
    program: Callable[[], int],
    folder: Path,
    *,
    timeout: float = 60.0,
    environment: Mapping[str, str] = {},
) -> list[int]:
    """Fork `size` ranks of a program that joins the others by itself, as `start_ranks` does."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {"MASTER_PORT": str(free_port()), TIMEOUT_VARIABLE: str(timeout), **environment}
    log = str(folder / "rank-{}.txt")
    return [_fork(n, size, described, program, Path(log.format(n))) for n in range(size)]


def _fork(
    rank: int, size: int, described: Mapping[str, str], program: Callable[[], int], log: Path
) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.alarm(MAX_SECONDS)
        torch.set_num_threads(1)
        os.environ.update(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "GLOO_SOCKET_IFNAME": "lo",
                **described,
            }
        )
        with open(log, "a", encoding="utf-8") as sys.stdout:
            sys.stderr = sys.stdout
            report.draw_plots = lambda *_, **__: None
            try:
                code = run_command(program, over_ranks=True)
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(processes: list[int]) -> list[int]:
    """Return the ranks' exit codes, -9 where one was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def train_on_ranks(
    size: int,
    values: Mapping[str, Any],
    listeners: Mapping[int, Listener] = {},
    *,
    timeout: float = 60.0,
) -> list[int]:
    """Begin a run over `size` ranks, or go on with it; return the exit codes.

    Args:
        size: How many ranks.
        values: The run's settings, its folder among them; the logs lie beside that.
        listeners: What listens to the fault points of a rank.
        timeout: How long a collective may take, in seconds.
    """
    folder = Path(values["train.output_dir"])

    def work(world: World) -> int:
        with listening(listeners.get(world.rank, lambda _: None)):
            if not (folder / "config.toml").is_file():
                return execute(load_config(overrides=values), world=world).exit_code
            config, resume = find_run(folder, {}, world)
            return 0 if resume is None else execute(config, resume, world).exit_code

    return ended(start_ranks(size, work, folder.parent, timeout=timeout))


def said(folder: Path, rank: int) -> str:
    """Return what a rank has said."""
    return (folder / f"rank-{rank}.txt").read_text(encoding="utf-8")
