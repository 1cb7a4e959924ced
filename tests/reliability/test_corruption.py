"""Nothing damaged is trusted: each flipped bit and cut file is noticed, an older state taken."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from trials import Reference, reference, settings

from files.folders import damage
from train.run import execute, main
from train.saving.checkpoints import Checkpoints
from train.saving.resume import find_run

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"train.method": "full", "optimizer.name": "adafactor"},
}
FLIPS, CUTS = 200, 50
NEWEST, OLDER = "step-00000005", "step-00000004"
Record = Callable[[str, object], None]


@pytest.fixture(scope="module", params=METHODS)
def whole(
    request: pytest.FixtureRequest,
    one_layer: Path,
    few_rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Reference, Path]:
    """Return a run of which every checkpoint is kept, and its folder."""
    place = tmp_path_factory.mktemp("whole")
    changes = {**METHODS[request.param], "checkpoint.total_limit": None}
    return reference(settings(one_layer, few_rows, **changes), place), place / "untouched" / "run"


@pytest.fixture
def run(whole: tuple[Reference, Path], tmp_path: Path) -> Path:
    """Return a copy of that run which has not heard of its end."""
    copy = Path(shutil.copytree(whole[1].parent, tmp_path / "copy")) / "run"
    (copy / "status.json").unlink()
    return copy


def corruptions(checkpoint: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield a file of the checkpoint and what becomes of it: flips and cuts go round the files."""
    draw, files = Random(0), sorted(checkpoint.iterdir())
    for number in range(FLIPS + CUTS):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        position = draw.randrange(len(data))
        if number < FLIPS:
            data[position] ^= 1 << draw.randrange(8)
            yield path, bytes(data)
        else:
            yield path, bytes(data[:position])


def notices(path: Path) -> bool:
    """Return whether the safetensors library refuses a file."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                file.get_tensor(name)
    except SafetensorError:
        return True
    return False


def test_every_corruption_is_noticed_and_an_older_checkpoint_taken(
    run: Path, record_property: Record
) -> None:
    checkpoints = Checkpoints(run / "checkpoints", None)
    newest, older = checkpoints.folder / NEWEST, checkpoints.folder / OLDER
    noticed, by_library, flipped = 0, 0, 0
    for number, (path, data) in enumerate(corruptions(newest)):
        good = path.read_bytes()
        path.write_bytes(data)
        if number < FLIPS and path.suffix == ".safetensors":
            flipped += 1
            by_library += notices(path)
        said: list[str] = []
        noticed += checkpoints.newest_verified(said.append) == older and len(said) == 1
        assert str(newest) in said[0]
        (checkpoints.folder / f"corrupt-{NEWEST}").rename(newest)
        path.write_bytes(good)
        assert damage(newest) is None
    record_property("corruptions of a checkpoint", FLIPS + CUTS)
    record_property("corruptions noticed", noticed)
    record_property("bits flipped in safetensors files", flipped)
    record_property("of them noticed by the safetensors library", by_library)
    assert noticed == FLIPS + CUTS


@pytest.mark.parametrize("number", range(5))
def test_a_checkpoint_with_a_damaged_file_is_refused_by_name_and_passed_over_else(
    run: Path, whole: tuple[Reference, Path], number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / NEWEST
    files = sorted(newest.iterdir())
    path = files[number % len(files)]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["--resume", str(newest)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(newest) in error
    assert main(["--resume", str(run)]) == 0
    assert f"set aside as corrupt-{NEWEST}" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints" / f"corrupt-{NEWEST}")
    assert whole[0].differences(run.parent) == ""


def test_files_of_two_checkpoints_exchanged_are_noticed_in_both(run: Path) -> None:
    first, second = run / "checkpoints" / OLDER, run / "checkpoints" / NEWEST
    (first / "optimizer.safetensors").rename(run / "kept")
    (second / "optimizer.safetensors").rename(first / "optimizer.safetensors")
    (run / "kept").rename(second / "optimizer.safetensors")
    for place in (first, second):
        assert "optimizer.safetensors: sha256 mismatch" in str(damage(place))


def test_a_damaged_best_is_made_again_from_its_checkpoint(
    run: Path, whole: tuple[Reference, Path]
) -> None:
    weights = next((run / "best").glob("*model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert damage(run / "best") is not None
    execute(*find_run(run, {}))
    assert whole[0].differences(run.parent) == ""


@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_without_that_checkpoint_a_damaged_best_becomes_no_final(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best step is the last but one."""
    shutil.rmtree(run / "checkpoints" / OLDER)
    shutil.rmtree(run / "final")
    (run / "best" / "config.json").write_text("{}")
    assert main(["--resume", str(run)]) == 2
    assert "load_best_at_end=true promises it" in capsys.readouterr().err
    assert not (run / "final").exists()
