"""What a process sets before it computes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from files.errors import UserError
from train import assemble
from train.config.load import load_config
from train.plan.decide import Machine
from train.process import memory
from train.process.world import World
from train.run import execute


@pytest.fixture(autouse=True)
def free_order() -> Iterator[None]:
    """A deterministic run asks it of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_deterministic_run_does_not_fill_what_it_is_about_to_write() -> None:
    config = load_config(overrides={"train.deterministic": True})
    assemble.set_up(config, Machine("cpu", None))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_blocks_of_memory_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    memory.prepare_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in names:
        set_by_user = {name: "max_split_size_mb:128"}
        monkeypatch.setattr(os, "environ", dict(set_by_user))
        memory.prepare_allocator()
        assert os.environ == set_by_user


def test_the_allocator_is_prepared_before_anything_asks_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import train.plan.decide as decide_module
    from train.run import execute

    order: list[str] = []

    def asked(*_: object) -> Machine:
        order.append("device")
        raise InterruptedError

    monkeypatch.setattr(memory, "prepare_allocator", lambda: order.append("allocator"))
    monkeypatch.setattr(decide_module, "this_machine", asked)
    with pytest.raises(InterruptedError):
        execute(load_config())
    assert order == ["allocator", "device"]


def test_a_rank_takes_its_own_card_before_it_asks_for_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes first makes a context, half a gigabyte, on the card that is current then."""
    asked: list[object] = []

    def mem_get_info() -> tuple[int, int]:
        asked.append("memory")
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    config = load_config(overrides={"model.path": "any", "train.device": "cuda"})
    with pytest.raises(InterruptedError):
        execute(config, world=World(3, 4, local_rank=1, local_size=2))
    assert asked == [1, "memory"]
    with pytest.raises(UserError, match=r"rank 2 of 4 is number 2 on its node .* sees 2 cards"):
        execute(config, world=World(2, 4, local_rank=2, local_size=4))
    assert asked == [1, "memory"]
