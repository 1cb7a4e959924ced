"""Fixtures that several folders of tests share: a model folder, rows, and a cache of their own."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreted  # noqa: F401  # before anything that may import triton
import numpy as np
import pytest
import torch
from runs import Refused
from small import DROPOUTS, small_model

# The networks here are small: a second thread gains nothing, and on a busy machine two threads that
# wait for each other cost a factor of ten.
torch.set_num_threads(1)

FIGURES = "matplotlib.figure"
loaded: list[object] = []  # that module, once a test has had it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


def pytest_collection_finish() -> None:
    """Take what imports made out of every later collection: each run of a test makes one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let all be taken apart at exit: Triton's bindings name what stays frozen as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _no_matplotlib() -> Iterator[None]:
    """Draw nothing, as where matplotlib is not installed: plots are most of a short run's time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, FIGURES, None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Wait for no disk: a killed process loses nothing that it wrote, only a machine would.

    A short run makes some thirty calls, which are a third of its time. That they are made, and
    when, is tested where somebody listens to them.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def matplotlib(_no_matplotlib: None) -> Iterator[None]:
    """Let the runs of a file draw their plots all the same."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if loaded:
            monkeypatch.setitem(sys.modules, FIGURES, loaded[0])
        else:
            monkeypatch.delitem(sys.modules, FIGURES)
        yield
        if FIGURES in sys.modules:  # a test alone need not draw
            loaded[:] = [sys.modules[FIGURES]]


@pytest.fixture(scope="session", autouse=True)
def common_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep everything out of the user's cache; a tokenizer is tried once for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "tokenizers").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LATHE_CACHE", str(folder))
        yield folder


@pytest.fixture
def cache(tmp_path: Path, common_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tokenised rows apart from those of other tests."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokenizers").symlink_to(common_cache / "tokenizers")
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the Hub away, and what this machine has of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return what gives a command arguments that it refuses, and returns its one sentence."""

    def refused(main: Callable[[list[str]], int], *arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1), said
        assert said.err.startswith("error: "), said.err
        return said.err

    return refused


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a StarCoder2-style folder: config.json with dropout 0.1, a byte tokenizer, weights."""
    from byte_tokenizer import write_byte_tokenizer

    from models.weights import save_model

    folder = tmp_path_factory.mktemp("model")
    model = small_model("starcoder2", vocab_size=257, **DROPOUTS)
    save_model(model, folder, config=model.config)
    end = "<|endoftext|>"
    write_byte_tokenizer(folder, end, bos_token=end, unk_token=end)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.jsonl (22 rows), valid.jsonl (5) and test.jsonl (3), ragged."""
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(1)
    for name, count in (("train", 22), ("valid", 5), ("test", 3)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(count):
                letters = random.integers(97, 110, random.integers(6, 40))
                file.write(json.dumps({"text": "".join(map(chr, letters))}) + "\n")
    return folder
