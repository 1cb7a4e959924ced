"""The processes of one run: which one this is, and how they agree.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts them; each
joins, does its share of every step, and all decide alike because they decide from the same sums.
What one process says to the others goes through the store that they met at, as text.

An error in one ends all with that one message: the first to fail leaves it at the store, and the
others, whose next collective then breaks, end with its exit code and say nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from files.errors import UserError
from files.strict_json import parse_json_object

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

Result = TypeVar("Result")

# How long a collective may take: a rank that is this late is taken for lost.
TIMEOUT_VARIABLE = "LATHE_RANK_TIMEOUT_SECONDS"
_TIMEOUT_SECONDS = 600.0
# What rank 0 alone does before training (a download, tokenisation) may take longer.
_PATIENCE_SECONDS = 24 * 3600.0
# Within this time every rank that lives has noticed that one is gone.
_ROLL_CALL_SECONDS = 3.0
# Of what gloo, NCCL and torch say of a broken connection.
_OF_CONNECTIONS = ("Connection", "connection", "gloo", "NCCL", "Timed out", "timeout")
# How many processes srun, Open MPI and other MPIs have started, which know nothing of ranks.
_OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_FAILED, _FOLDER = "failed", "folder"
_STORES: dict[tuple[str, int], Store] = {}


def counted_by(environment: Mapping[str, str]) -> str | None:
    """Return the variable by which a launcher says that it started several processes, if any."""
    names = ("WORLD_SIZE",) if "WORLD_SIZE" in environment else _OTHER_LAUNCHERS
    return next((name for name in names if environment.get(name, "1") not in ("", "0", "1")), None)


@dataclass(frozen=True)
class World:
    """The processes of one run: this one's `rank` among `size`; `ALONE` is the world of one.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_rank: Its number on this node.
        local_size: How many are on this node.
        agents: Whether the store outlives the processes (torchrun's), so that a restart sees it.
        shards: Whether the ranks share the model's weights (`train.inputs.sharding`).
        asked: What tells this run from others that the same ranks do one after another.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    agents: bool = False
    shards: bool = False
    asked: str = ""
    _store: Store | None = field(default=None, repr=False, compare=False)
    _meeting: str = ""  # what these ranks, of this start, say stands under it

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, asked: str = ""
    ) -> World:
        """Return the world that the environment describes, one process without a description.

        Raises:
            UserError: A variable is missing or is not what it must be, or something other than
                torchrun has started several processes.
        """
        if "WORLD_SIZE" not in environment:
            if name := counted_by(environment):
                raise UserError(
                    f"{name}={environment[name]} without WORLD_SIZE: each of these processes "
                    "would do the whole run; start one torchrun on each node, which starts the "
                    f"ranks, or unset {name} where each is meant to do a run of its own"
                )
            return cls()
        size = _number(environment, "WORLD_SIZE", None)
        if size <= 1:
            return cls()
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE={size} without {' and '.join(missing)}: start the ranks with torchrun"
            )
        rank = _number(environment, "RANK", None)
        if not 0 <= rank < size:
            raise UserError(f"RANK={rank} of WORLD_SIZE={size}: ranks are 0 to {size - 1}")
        return cls(
            rank=rank,
            size=size,
            local_rank=_number(environment, "LOCAL_RANK", rank),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", size),
            agents=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            asked=asked,
        )

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def joined(self) -> Iterator[World]:
        """Meet the other ranks, and yield the world in which they can be spoken to.

        What ranks other than the first print goes nowhere. What is raised inside ends every rank;
        only the first to fail raises it on.

        Raises:
            UserError: The ranks could not meet, or one is gone.
            SystemExit: Another rank has failed, and said so.
        """
        if self.size == 1 or self._store is not None:
            yield self
            return
        # What its own threads say of a broken connection is said again, in a sentence, here.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = datetime.timedelta(seconds=timeout_seconds())
        try:
            # Kept: a process that does a second run goes on with the port that is served.
            base = _STORES.get((address, port)) or TCPStore(
                address, port, self.size, is_master=self.first and not self.agents, timeout=timeout
            )
            _STORES[address, port] = base
            store = PrefixStore("lathe", base)
            meeting = _meet(store, self.rank, self.size, timeout.total_seconds())
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore(meeting, store),
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
            )
        except RuntimeError as error:
            remedy = f"see that all {self.size} were started and can reach it"
            if "EADDRINUSE" in str(error):
                remedy = "another process has that port: set another MASTER_PORT"
            raise UserError(
                f"rank {self.rank} of {self.size}: the ranks did not meet at {address}:{port} "
                f"({_first_line(error)}); {remedy}"
            ) from None
        world = replace(self, _store=store, _meeting=meeting)
        try:
            # FSDP2's collectives are not ours: what breaks in them is told here.
            with contextlib.ExitStack() as inside:
                inside.enter_context(world.together(of_others=True))
                if not self.first:
                    nowhere = inside.enter_context(open(os.devnull, "w", encoding="utf-8"))
                    inside.enter_context(contextlib.redirect_stdout(nowhere))
                yield world
            world.wait()
        except BaseException as error:
            world._end_all(error)
            raise
        dist.destroy_process_group()

    def sum_(self, x: Tensor) -> Tensor:
        """Add `x` up over the ranks, in place, and return it: the same bits on every rank."""
        if self.size > 1:
            import torch.distributed as dist

            with self.together():
                dist.all_reduce(x)
        return x

    def sums(self, *numbers: float) -> list[float]:
        """Return each number summed over the ranks, in fp64; whole ones up to 2^53 are exact."""
        if self.size == 1:
            return list(numbers)
        import torch

        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Return of each flag whether any rank has it set."""
        return [count > 0 for count in self.sums(*flags)]

    def gathered(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks' numbers one after another."""
        if self.size == 1:
            return numbers
        import torch

        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(numbers)
        self.sum_(counts)
        start = int(counts[: self.rank].sum())
        everything = torch.zeros(int(counts.sum()), dtype=torch.int64)
        everything[start : start + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return tuple(self.sum_(everything).tolist())

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.sums(0.0)

    def told(self, key: str, tell: Callable[[], str] = str) -> str:
        """Return what rank 0 says; the others wait for it as long as it takes.

        It may be called from any thread, as `met` may.

        Args:
            key: What it is about; said once.
            tell: Called on rank 0.
        """
        if self.size == 1:
            return tell()
        assert self._store is not None
        key = f"{self._meeting}/{key}"
        if self.first:
            text = tell()
            self._store.set(key, text)
            return text
        self._wait_for(key)
        return self._store.get(key).decode()

    def met(self, key: str, *, seconds: float = _PATIENCE_SECONDS) -> None:
        """Go on when every rank has come here; `key` says where, once.

        A rank that is not here within `seconds` is taken for lost.
        """
        if self.size > 1:
            assert self._store is not None
            key = f"{self._meeting}/{key}"
            if self._store.add(f"{key}/count", 1) == self.size:
                self._store.set(key, "")
            self._wait_for(key, seconds)

    def first_on_node(self, key: str, do: Callable[[], Result]) -> Result:
        """Do something on each rank, on the first of a node before the others of it.

        Args:
            key: What it is; done once.
            do: What leaves in a cache what the others then find.
        """
        if self.size == 1:
            return do()
        assert self._store is not None
        key = f"{self._meeting}/{key}/node-{self.rank - self.local_rank}"
        if self.local_rank > 0:
            self._wait_for(key)
            return do()
        result = do()
        self._store.set(key, "done")
        return result

    def shared_folder(self, choose: Callable[[], Path]) -> Path:
        """Return the folder that rank 0 chooses for the run; a restart finds it again."""
        folder = Path(self.told("folder", lambda: str(choose())))
        if self._store is not None and self.first:
            self._store.set(f"{_FOLDER}/{self.asked}", str(folder.absolute()))
        return folder

    def kept_folder(self) -> str | None:
        """Return the folder of the run that these ranks had begun before they were started again.

        None at the first start, where no store outlived them, and where nothing was begun.
        """
        store = self._store
        if store is None:
            return None

        def kept() -> str:
            key = f"{_FOLDER}/{self.asked}"
            folder = store.get(key).decode() if store.check([key]) else ""
            return folder if folder and Path(folder, "config.toml").is_file() else ""

        return self.told("kept", kept) or None

    def _wait_for(self, key: str, seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until a key is there, or another rank has failed."""
        assert self._store is not None
        end, pause = time.monotonic() + seconds, 0.01
        with self.together():
            while not self._store.check([key]):
                if self._store.check([f"{self._meeting}/{_FAILED}"]) or time.monotonic() > end:
                    raise RuntimeError("another rank has failed")
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)

    @contextlib.contextmanager
    def together(self, *, of_others: bool = False) -> Iterator[None]:
        """Turn an error of the connection into a sentence.

        Args:
            of_others: Whether other errors may pass here too, which stay what they are.

        Raises:
            UserError: A rank does not answer; the message names it.
        """
        try:
            yield
        except RuntimeError as error:
            if of_others and not any(word in str(error) for word in _OF_CONNECTIONS):
                raise
            lost = UserError(self._word() or f"{self._missing()} ({_first_line(error)})")
            # At once: a save in the background may wait for rows of the rank that is gone.
            with contextlib.suppress(RuntimeError):
                self._leave_word(lost)
            raise lost from None

    def _missing(self) -> str:
        """Call the roll after a collective broke; return who does not answer."""
        lost = "rank 0"
        with contextlib.suppress(RuntimeError):
            assert self._store is not None
            key = f"{self._meeting}/here"
            self._store.set(f"{key}/{self.rank}", "")
            time.sleep(_ROLL_CALL_SECONDS)
            absent = [n for n in range(self.size) if not self._store.check([f"{key}/{n}"])]
            lost = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
            lost = lost if absent else "one of the ranks"
        return (
            f"{lost} of {self.size}: no answer, it was killed, hangs or cannot be reached; "
            "--resume goes on from the newest checkpoint (torchrun --max-restarts N does so itself)"
        )

    def _word(self) -> str | None:
        """Return why another rank ended, where it left word."""
        key = f"{self._meeting}/{_FAILED}"
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check([key]):
                return parse_json_object(self._store.get(key), "the store")["error"]
        return None

    def _end_all(self, error: BaseException) -> None:
        """Leave word of why this rank ends, where it is the first.

        Raises:
            SystemExit: Another was first, and this one has no fault of its own to show; its code.
        """
        assert self._store is not None
        key = f"{self._meeting}/{_FAILED}"
        try:
            first, word = self._leave_word(error)
        except RuntimeError:
            return  # the store went with rank 0
        if first != word and isinstance(error, UserError | OSError | KeyboardInterrupt):
            with contextlib.suppress(RuntimeError):
                self._store.add(f"{key}/heard", 1)
            said = parse_json_object(first.encode(), "the store")
            raise SystemExit(int(said["code"])) from None
        if self.first and not self.agents:
            self._linger(f"{key}/heard")

    def _leave_word(self, error: BaseException) -> tuple[str, str]:
        """Say why this rank ends, where none has before; return the first word, and its own."""
        code = 2 if isinstance(error, UserError | OSError) else 1
        word = json.dumps({"rank": self.rank, "code": code, "error": str(error)})
        assert self._store is not None
        return self._store.compare_set(f"{self._meeting}/{_FAILED}", "", word).decode(), word

    def _linger(self, heard: str) -> None:
        """Serve the store until the others have heard why this rank ends."""
        import torch.distributed as dist

        assert self._store is not None
        dist.destroy_process_group()  # what they wait for breaks
        end = time.monotonic() + _ROLL_CALL_SECONDS
        while self._store.add(heard, 0) < self.size - 1 and time.monotonic() < end:
            time.sleep(0.01)


ALONE = World()


def timeout_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Return how long a collective may take.

    Raises:
        UserError: LATHE_RANK_TIMEOUT_SECONDS is no number of seconds.
    """
    text = environment.get(TIMEOUT_VARIABLE)
    try:
        seconds = _TIMEOUT_SECONDS if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise UserError(f"{TIMEOUT_VARIABLE}={text}: is no number of seconds; unset it")
    return seconds


def _meet(store: Store, rank: int, size: int, seconds: float) -> str:
    """Return the name of this start of the ranks, which each learns from the one rank 0 of it.

    What earlier starts left at the store stands under other names. torchrun's count of restarts is
    none: of several nodes each counts its own.

    Raises:
        RuntimeError: Not all came in time.
    """
    own, end, pause = uuid.uuid4().hex, time.monotonic() + seconds, 0.01
    store.set(f"here/{rank}", own)
    absent = list(range(1, size)) if rank == 0 else [0]
    while absent:
        if rank == 0:
            for other in absent:
                if store.check([f"here/{other}"]):
                    store.set(f"meeting/{store.get(f'here/{other}').decode()}", own)
            absent = [other for other in absent if not store.check([f"{own}/came/{other}"])]
        elif store.check([f"meeting/{own}"]):
            name = store.get(f"meeting/{own}").decode()
            store.set(f"{name}/came/{rank}", "")
            return name
        if time.monotonic() > end:
            raise RuntimeError(f"no word of rank {', '.join(map(str, absent))}")
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)
    return own


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text: Any = environment.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UserError(
            f"{name}={text}: is no whole number; torchrun sets it, or unset WORLD_SIZE to train in "
            "one process"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
