"""The floors of the house: which folder may import which, read from the source itself."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "files": set(),
    "kernels": {"files"},
    "lora": {"files", "kernels"},
    "models": {"files", "kernels"},
    "data": {"files"},
    "train": {"files", "kernels", "lora", "models", "data"},
    "benchmarks": {"files", "kernels", "lora", "models", "data", "train"},
}
# The floors inside train/, from the ground up. Rooms of one floor do not ask each other; what is
# not listed stands on the loop's floor, and train.run on top of it.
FLOORS_OF_TRAIN = (
    ("process", "loss", "precision", "text", "presets"),
    ("config", "optim"),
    ("inputs",),
    ("plan",),
    ("state",),
    ("log",),
    ("report",),
    ("saving",),
)
# A package of others that one place alone may import: prefix of the import → paths that may.
KEEPERS = {
    "triton": ("kernels/triton/", "benchmarks/absent_card.py"),
    "tensorboard": ("train/log/metrics.py",),
    "torch.utils.tensorboard": ("train/log/metrics.py",),
    "torch.distributed": ("train/process/world.py", "train/inputs/sharding.py"),
}
NEVER_IN_PRODUCT = (
    "pickle",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "bitsandbytes",
    "datasets",
)
PICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
PICKLING_CALLS = {"torch.load", "torch.save"}
# The benchmarks that set the stack beside us, and nothing else, import it.
MAY_IMPORT_THE_STACK = ("benchmarks/",)


def product_files() -> list[Path]:
    return sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole path"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_on_their_floor(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    floor = relative.split("/")[0]
    for name in imports(path):
        top = name.split(".")[0]
        if top in FLOORS and top != floor:
            assert top in FLOORS[floor], f"{relative} imports {name}: {floor} may not use {top}"
        assert top != "tests", f"{relative} imports the tests"
        for package, keepers in KEEPERS.items():
            if under(name, package):
                assert relative.startswith(keepers), (
                    f"{relative} imports {name}: only {keepers} may"
                )
        if top in NEVER_IN_PRODUCT:
            assert relative.startswith(MAY_IMPORT_THE_STACK), f"{relative} imports {name}"


def floor_in_train(name: str) -> int:
    """Return the floor of a module of train/: 0 at the ground, the run's on top."""
    room = name.split(".")[1]
    if room == "run":
        return len(FLOORS_OF_TRAIN) + 1
    floors = [floor for floor, rooms in enumerate(FLOORS_OF_TRAIN) if room in rooms]
    return floors[0] if floors else len(FLOORS_OF_TRAIN)


def test_inside_train_too_nothing_asks_what_stands_above_or_beside_it() -> None:
    upward = set()
    for path in (ROOT / "train").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] == "__init__":
            continue
        floor = floor_in_train(".".join(parts))
        for name in imports(path):
            if not under(name, "train") or name == "train":
                continue
            room, other = name.split(".")[1], floor_in_train(name)
            beside = other == floor and 0 < floor < len(FLOORS_OF_TRAIN) and room != parts[1]
            if other > floor or beside:
                upward.add((path.relative_to(ROOT).as_posix(), f"train.{room}"))
    assert not upward


def uses_of_pickle(source: str) -> list[str]:
    """Return what in a file reads or writes pickle: its modules, and calls that come down to it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{name.name}" for name in node.names}
            found += [node.module] if node.module.split(".")[0] in PICKLERS else []
            found += sorted(names & PICKLING_CALLS)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLING_CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] * (ast.unparse(node.value) != "False")
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import cloudpickle.fast", ["cloudpickle.fast"]),
        ("from pickle import loads", ["pickle"]),
        ("from torch import load", ["torch.load"]),
        ("x = torch.load(path)", ["torch.load"]),
        ("numpy.load(path, allow_pickle=True)", ["allow_pickle"]),
        ("numpy.load(path, allow_pickle=False)", []),
    ],
)
def test_a_use_of_pickle_is_found(source: str, found: list[str]) -> None:
    assert uses_of_pickle(source) == found


def test_no_pickle_is_ever_read_or_written(
    record_property: Callable[[str, object], None],
) -> None:
    found = [
        f"{path}: {use}"
        for path in product_files()
        for use in uses_of_pickle(path.read_text(encoding="utf-8"))
    ]
    record_property("uses of pickle", len(found))
    assert not found


def test_no_module_is_named_like_a_function_its_package_exports() -> None:
    for folder in FLOORS:
        package = ROOT / folder / "__init__.py"
        exported = {name.rsplit(".", 1)[-1] for name in imports(package) if name.count(".") >= 2}
        modules = {path.stem for path in (ROOT / folder).glob("*.py")}
        assert not exported & modules, f"{folder}: {exported & modules}"


def test_no_two_modules_import_each_other() -> None:
    """Nor do longer circles exist: taking away what imports nothing that is left takes all away."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in product_files()
    }
    left = {name: (imports(path) & modules.keys()) - {name} for name, path in modules.items()}
    # A package's __init__ offers what its modules hold; they do not ask it for anything.
    while free := [name for name, asked in left.items() if not asked & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"modules import each other: {sorted(left)}"


def test_what_is_imported_is_declared() -> None:
    """Nothing outside the declared dependencies may be needed to train."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["report"], *extras["parquet"], *extras["triton"]]
    declared = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in listed}
    for path in [*product_files(), ROOT / "lathe.py"]:
        if not path.is_relative_to(ROOT / "benchmarks"):
            foreign = {name.split(".")[0] for name in imports(path)} - {*FLOORS, "lathe"}
            assert foreign <= declared | set(sys.stdlib_module_names), path


# What a reader opens, in this order, from the command to the written report.
WALK = (
    *("run", "assemble", "loop", "batches", "step", "loss", "evaluate", "plan/steps"),
    *("plan/schedule", "optim/adamw", "saving/checkpoints", "report/page"),
)


def lines_of(*paths: Path) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def test_the_walk_is_one_of_twenty_minutes() -> None:
    assert lines_of(*(ROOT / "train" / f"{name}.py" for name in WALK)) <= 1700


def test_no_file_is_longer_than_a_reader_s_patience() -> None:
    rows = ROOT / "data" / "demo"
    long = [path for path in product_files() if lines_of(path) > 450 and rows not in path.parents]
    assert not long


def test_the_house_does_not_grow_unasked() -> None:
    """Lines of the product and of the benchmarks; a budget is raised with a reason in LOG.md."""
    files = product_files()
    benchmarks = [path for path in files if path.is_relative_to(ROOT / "benchmarks")]
    assert lines_of(*benchmarks) <= 5400
    assert lines_of(*files) - lines_of(*benchmarks) <= 40000
