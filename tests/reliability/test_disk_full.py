"""A disk that fills up while a run saves: one sentence, nothing half-written, and it goes on."""

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from trials import Point, Reference, attempt, reference, settings, side_by_side

from files.folders import damage

# Where a save writes or makes something; after these only names change.
WRITES = (
    "folder.made",
    "file.created",
    "tensors.part",
    "file.written",
    "file.synced",
    "folder.filled",
    "folder.manifested",
)
GOOD, FAILED = "step-00000002", "step-00000004"


@pytest.fixture(scope="module")
def untouched(
    one_layer: Path, few_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    values = settings(one_layer, few_rows, **{"train.method": "full"})
    return reference(values, tmp_path_factory.mktemp("untouched"))


def when(point: Point, act: Callable[[], None]) -> Callable[[str], None]:
    """Return a listener that acts at one point."""
    passed: list[str] = []

    def listen(name: str) -> None:
        passed.append(name)
        if (name, passed.count(name)) == point:
            act()

    return listen


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken_off(untouched: Reference, folder: Path, what: str) -> str:
    """Return what is wrong with a run that a full disk has ended in the save of step 4."""
    run = folder / "run"
    errors = [
        line
        for line in folder.joinpath("log.txt").read_text().splitlines()
        if line.startswith(("error: ", "Traceback"))
    ]
    begin = f"error: cannot save {what}"
    if len(errors) != 1 or not errors[0].startswith(begin) or "--resume" not in errors[0]:
        return f"{folder}: {errors}"
    if hidden := [*run.rglob(".*")]:
        return f"{folder}: left over {hidden}"
    if problem := damage(run / "checkpoints" / GOOD):
        return problem
    status = json.loads((run / "status.json").read_text())
    if status["state"] != "failed" or what not in status["error"]:
        return f"{folder}: {status}"
    if (code := attempt(untouched.at(folder))) != 0:
        return f"{folder}: the resumed run ends with {code}"
    return untouched.differences(folder)


def without_space_at(case: tuple[Reference, Path, Point, str]) -> str:
    """Refuse one write of a run, take it up again, and return what is wrong."""
    untouched, place, point, what = case
    folder = place / f"{point[0]}-{point[1]}"
    code = attempt(untouched.at(folder), when(point, no_space))
    if code != 2:
        return f"{folder}: exit code {code}"
    problem = broken_off(untouched, folder, what)
    return f"{folder}: {problem}" if problem else ""


def in_the_save_of_step_4(points: tuple[Point, ...]) -> list[tuple[Point, str]]:
    """Return the first write of each kind in `best/`, and in the checkpoint, and what is saved."""
    saves = [index for index, point in enumerate(points) if point[0] == "save.begun"]
    chosen: dict[tuple[str, str], Point] = {}
    what = "best/ of step 4"
    for name, occurrence in points[saves[1] : saves[2]]:
        if name in WRITES:
            chosen.setdefault((name, what), (name, occurrence))
        if name == "folder.renamed":
            what = "step 4" if what.startswith("best/") else "none"
    return [(point, what) for (_, what), point in chosen.items() if what != "none"]


def test_a_write_refused_ends_the_run_in_one_sentence_and_loses_nothing(
    untouched: Reference, tmp_path: Path
) -> None:
    cases = in_the_save_of_step_4(untouched.points)
    assert len(cases) == 2 * len(WRITES)
    said = side_by_side(
        without_space_at, [(untouched, tmp_path, point, what) for point, what in cases]
    )
    assert [problem for problem in said if problem] == []


def test_a_file_beyond_the_size_limit_ends_the_run_in_one_sentence_and_loses_nothing(
    untouched: Reference, one_layer: Path, tmp_path: Path
) -> None:
    """AdamW's file is twice the model's: the system itself refuses to write the end of it."""
    most = one_layer.joinpath("model.safetensors").stat().st_size * 3 // 2

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    assert attempt(untouched.at(tmp_path), when(("save.begun", 2), limit)) == 2
    assert broken_off(untouched, tmp_path, "step 4") == ""
    assert "File too large" in (tmp_path / "log.txt").read_text()


def test_a_small_disk_ends_the_run_in_one_sentence_and_loses_nothing(
    untouched: Reference, tmp_path: Path
) -> None:
    """A file system of its own, which is full for a while after the first save."""
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(run)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"only root may mount a small disk ({mounted.stderr.strip()})")
    try:
        filler = run / "checkpoints" / "filler"

        def fill_up() -> None:
            """Leave room for the status alone."""
            filler.write_bytes(bytes(shutil.disk_usage(run).free - 5 * 4096))

        assert attempt(untouched.at(tmp_path), when(("folder.made", 3), fill_up)) == 2
        filler.unlink()
        assert broken_off(untouched, tmp_path, "best/ of step 4") == ""
        assert "No space left on device" in (tmp_path / "log.txt").read_text()
    finally:
        subprocess.run(["umount", str(run)], check=True)
