"""Checkpoints: complete and verified or not there; rotation keeps the newest and the best."""

import json
from pathlib import Path

import pytest
from recorded import disk_calls

from files.errors import UserError
from files.folders import damage
from train.saving.checkpoints import Checkpoints, read_state
from train.state import EarlyStopping, TrainState


def state_at(step: int, best_step: int | None = None) -> TrainState:
    return TrainState(stopping=EarlyStopping(2, 0.0, best_step, 1.5), step=step)


def fill(folder: Path) -> dict[str, str]:
    (folder / "optimizer.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return {}


def save(checkpoints: Checkpoints, step: int, best_step: int | None = None) -> Path:
    state = state_at(step, best_step).to_dict()
    return checkpoints.save(state, {"who": "test"}, fill, expected_bytes=1)


def test_a_saved_checkpoint_verifies_and_gives_the_state_back(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path, None), 120, best_step=100)
    assert folder.name == "step-00000120"
    assert damage(folder) is None
    state, identity = read_state(folder)
    assert state == state_at(120, 100)
    assert identity == {"who": "test"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_newest_verified_one_is_found_and_a_damaged_one_set_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    save(checkpoints, 10)
    newest = save(checkpoints, 20)
    (newest / "optimizer.safetensors").write_bytes(b"torn")
    said: list[str] = []
    assert checkpoints.newest_verified(said.append) == checkpoints.path(10)
    assert "step-00000020/optimizer.safetensors: sha256 mismatch" in said[0]
    assert (tmp_path / "corrupt-step-00000020").is_dir()
    assert checkpoints.steps() == [10]


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    folder = save(checkpoints, 10)
    (folder / "optimizer.safetensors").write_bytes(b"torn")
    assert save(checkpoints, 10) == folder
    assert damage(folder) is None


def test_a_half_written_checkpoint_is_swept_and_never_seen(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, None), 10)
    (tmp_path / ".tmp-step-00000020").mkdir()
    (tmp_path / ".tmp-step-00000020" / "optimizer.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, None)
    assert checkpoints.steps() == [10]
    assert not (tmp_path / ".tmp-step-00000020").exists()


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, 10, [10, 20, 30, 40]),
        (2, None, [30, 40]),
        (2, 10, [10, 40]),  # the best one counts towards the limit
        (1, 10, [10, 40]),  # newest and best are kept beside the limit
        (1, 40, [40]),
        (3, 10, [10, 30, 40]),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, best: int | None, kept: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, limit)
    for step in (10, 20, 30, 40):
        save(checkpoints, step, best_step=best if best is not None and step >= best else None)
    assert checkpoints.steps() == kept


def test_an_old_checkpoint_goes_when_the_new_one_is_on_the_disk(tmp_path: Path) -> None:
    """And loses its name before its first file: what is half deleted is never taken for whole."""
    checkpoints = Checkpoints(tmp_path, 1)
    save(checkpoints, 10)
    with disk_calls(tmp_path) as calls:
        save(checkpoints, 20)
    new = ".tmp-step-00000020"
    names = ("adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "state.json")
    written = [
        call for name in ("state.json", "manifest.json") for call in written_whole(new, name)
    ]
    assert calls[: len(written)] == written
    synced = calls[len(written) : len(written) + len(names)]
    assert sorted(synced) == [f"fsync {new}/{name}" for name in names]
    assert calls[len(written) + len(names) :] == [
        f"fsync {new}",
        f"rename {new} step-00000020",
        "fsync .",
        "rename step-00000010 .trash-step-00000010",
        "delete .trash-step-00000010",
    ]


def written_whole(folder: str, name: str) -> list[str]:
    """Return the calls that write one file."""
    return [
        f"fsync {folder}/.tmp-*",
        f"rename {folder}/.tmp-* {folder}/{name}",
        f"fsync {folder}",
    ]


def test_a_full_disk_ends_in_one_sentence_and_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    save(checkpoints, 10)

    def full(folder: Path) -> dict[str, str]:
        (folder / "optimizer.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot save step 20.*No space left.*step-00000010"):
        checkpoints.save(state_at(20).to_dict(), {}, full, expected_bytes=1)
    with pytest.raises(UserError, match=r"cannot save step 30: it needs .* [KMGT]iB"):
        checkpoints.save(state_at(30).to_dict(), {}, fill, expected_bytes=1 << 62)
    assert checkpoints.steps() == [10]
    assert damage(checkpoints.path(10)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_newer_checkpoints_can_be_set_aside_more_than_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    for _ in range(2):
        for step in (10, 20):
            save(checkpoints, step)
        checkpoints.set_newer_aside(10)
        assert checkpoints.steps() == [10]
    assert (tmp_path / "aside-step-00000020" / "state.json").is_file()


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path, None), 1)
    document = json.loads((folder / "state.json").read_text())
    document["state"]["from_the_future"] = 1
    (folder / "state.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="not a state that this version can continue from"):
        read_state(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "1"),
        ("step", True),
        ("step", None),
        ("tokens", 10**30),
        ("seconds", []),
        ("stopping", {"patience": "2"}),
        ("stopping", {"patience": 2, "best_loss": "low"}),
        ("resumed_from", [1.5]),
        ("scaler", 3),
    ],
)
def test_a_state_of_other_types_is_refused(name: str, value: object, tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path, None), 1)
    document = json.loads((folder / "state.json").read_text())
    document["state"][name] = value
    (folder / "state.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="not a state that this version can continue from"):
        read_state(folder)
