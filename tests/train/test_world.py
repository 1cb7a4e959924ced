"""What the environment says of a run's processes. How they work together: test_ranks.py."""

import socket

import pytest

from files.errors import UserError
from train.process.world import ALONE, World, timeout_seconds

TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_one_process_without_torchrun_and_with_one_rank() -> None:
    assert World.from_environment({}) == ALONE
    assert World.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    with ALONE.joined() as world:
        assert world is ALONE


def test_torchrun_describes_the_ranks() -> None:
    world = World.from_environment(TORCHRUN)
    assert world == World(2, 4, local_rank=0, local_size=2, agents=True)
    assert not world.first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "WORLD_SIZE=4 without MASTER_ADDR: start the ranks with torchrun"),
        ({"RANK": "two"}, "RANK=two: is no whole number"),
        ({"RANK": None}, "RANK=None: is no whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: is no whole number"),
        ({"RANK": "4"}, "RANK=4 of WORLD_SIZE=4: ranks are 0 to 3"),
    ],
)
def test_half_a_description_is_refused(changes: dict[str, str | None], message: str) -> None:
    described = {
        name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None
    }
    with pytest.raises(UserError, match=message):
        World.from_environment(described)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_another_launcher_started_are_no_runs(name: str) -> None:
    """`srun --ntasks 2 python -m train.run …` would train twice, on the same card."""
    with pytest.raises(UserError, match=f"{name}=2 without WORLD_SIZE: .* start one torchrun"):
        World.from_environment({name: "2"})
    assert World.from_environment({name: "1"}) == ALONE
    # A batch script's own process is one, whatever was asked for.
    assert World.from_environment({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == ALONE
    assert World.from_environment({**TORCHRUN, name: "2"}).size == 4


def test_a_port_that_another_run_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("LATHE_RANK_TIMEOUT_SECONDS", "5")
        with (
            pytest.raises(UserError, match="another process has that port: set another MASTER_PO"),
            World(0, 2).joined(),
        ):
            raise AssertionError("nobody was there to meet")


def test_alone_everything_is_what_it_is() -> None:
    assert ALONE.sums(1.5, 2) == [1.5, 2]
    assert ALONE.any(False, True) == [False, True]
    assert ALONE.gathered((3, 1)) == (3, 1)
    assert ALONE.told("it", lambda: "said") == "said"
    assert ALONE.first_on_node("it", lambda: 7) == 7
    assert ALONE.kept_folder() is None


def test_a_timeout_is_a_number_of_seconds() -> None:
    assert timeout_seconds({}) == 600
    assert timeout_seconds({"LATHE_RANK_TIMEOUT_SECONDS": "30"}) == 30
    for text in ("soon", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="is no number of seconds; unset it"):
            timeout_seconds({"LATHE_RANK_TIMEOUT_SECONDS": text})
