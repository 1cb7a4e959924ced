"""`lathe`: one command for everything, from a folder that holds files named like our folders."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from children import ROOT, python

# What the installed script does (pip writes it so), but for this checkout, wherever it lies.
SCRIPT = f"""\
#!{sys.executable}
import sys
sys.path.append({str(ROOT)!r})  # where pip's own finder of an editable install stands
from lathe import main
if __name__ == "__main__":
    sys.exit(main())
"""
# Several commands in one interpreter, each as if it were typed: torch is imported once.
SEVERAL = (
    SCRIPT.partition("if __name__")[0]
    + """\
import contextlib, io, json, shlex
settings = sys.argv[1:]
def lathe(*arguments):
    sys.argv = [__file__.replace("several", "lathe"), *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main() == 0, arguments
    return out.getvalue()
shown = lathe("show-data", *settings, "--json").splitlines()
assert json.loads(shown[0])["source"] == "rows.jsonl:1"
assert "nothing found" in lathe("lint", *settings)
assert json.loads(lathe(*settings, "--plan", "--json"))["total_steps"] == 2
printed = lathe("run", *settings, "train.output_dir=runs/it's a")
following = {words[0]: words[1:] for words in map(shlex.split, printed.splitlines()[-4:])}
assert following["try"][:2] == ["lathe", "generate"]
assert following["merge"] == ["lathe", "merge", "runs/it's a", "MERGED_MODEL"]
with contextlib.redirect_stderr(io.StringIO()) as err:
    lathe(*following["try"][1:], "--max-new-tokens", "2")
assert err.getvalue().count("\\n") == 1, err.getvalue()
lathe(*following["merge"][1:])
assert lathe("report", "runs/it's a") == "runs/it's a/report.md\\n"
assert "nothing is left to do" in lathe("--resume", "runs/it's a")
"""
)
OURS = ("files", "kernels", "lora", "models", "data", "train")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project's folder: what it holds bears our names, and none of it may be imported."""
    folder = tmp_path_factory.mktemp("a project")
    decoy = "raise SystemExit(f'{__file__} is the project's own')"
    for name in ("collections", "json", "torch", "tokenizers", *OURS):
        (folder / f"{name}.py").write_text(decoy)
    for name in OURS:  # what PYTHONPATH=src makes importable
        (folder / "src" / name).mkdir(parents=True)
        (folder / "src" / name / "__init__.py").write_text(decoy)
    shutil.copytree(folder / "src" / "models", folder / "models")
    rows = [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bin").mkdir()
    for name, text in (("lathe", SCRIPT), ("several", SEVERAL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def lathe(
    project: Path, *arguments: str, code: int = 0, program: str = "lathe", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Type `lathe ARGUMENTS` in the project's folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    cache = str(project / "cache")
    done = subprocess.run(
        [program, *arguments],
        executable=project / "bin" / program,
        cwd=project,
        env={**kept, "PATH": path, "LATHE_CACHE": cache, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


SMALL = ("data.train=rows.jsonl", "train.max_steps=2", "effective_batch_size=4", "lora.r=2")


def test_every_command_works_where_nearly_everything_bears_our_names(project: Path) -> None:
    """And what a run prints to be typed next is typed next, as it stands."""
    base = ROOT / "data" / "demo" / "base"
    settings = (f"model.path={base}", *SMALL, "data.valid_fraction=0.2", "run_name=it's one")
    lathe(project, *settings, program="several")
    assert (project / "MERGED_MODEL" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONPATH": "src"}, {"PYTHONSAFEPATH": ""}, {"PYTHONSAFEPATH": "1"}],
    ids=str,
)
def test_our_folders_are_ours_whatever_python_s_path_is(
    project: Path, environment: dict[str, str]
) -> None:
    assert lathe(project, "--list-presets", **environment).stdout.startswith("preset ")
    (project / "print_files.py").write_text(
        "import lathe\nfrom importlib.util import find_spec\n"
        f"for name in {OURS!r}: print(find_spec(name).origin)"
    )
    path = os.pathsep.join([str(project / "src"), str(ROOT)])
    found = python("-P", "print_files.py", cwd=project, **{**environment, "PYTHONPATH": path})
    assert found.stdout.splitlines() == [str(ROOT / name / "__init__.py") for name in OURS]


@pytest.mark.parametrize("path", ["src", pytest.param("", marks=pytest.mark.slow)])
def test_the_child_that_renders_chat_templates_is_immune_too(project: Path, path: str) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    base = project / "chat base"
    shutil.copytree(ROOT / "data" / "demo" / "base", base, dirs_exist_ok=True)
    (base / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (project / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    settings = ("model.path=chat base", "data.train=chat.jsonl", "data.format=messages")
    shown = lathe(project, "show-data", *settings, "--json", PYTHONPATH=path).stdout
    assert json.loads(shown)["text"].startswith("user: a")


@pytest.mark.slow
def test_the_runs_of_a_proof_are_immune_too(project: Path) -> None:
    """Its three runs are started like the child that renders chat templates."""
    base = f"model.path={ROOT / 'data' / 'demo' / 'base'}"
    proof = lathe(project, base, *SMALL, "--prove-resume", "1", PYTHONPATH="src")
    assert "resume is exact on this machine" in proof.stdout


@pytest.mark.parametrize(
    "name",
    ["run", *(pytest.param(n, marks=pytest.mark.slow) for n in ("show-data", "generate", "merge"))],
)
def test_help_says_what_was_typed(project: Path, name: str) -> None:
    typed = "lathe" if name == "run" else f"lathe {name}"
    assert lathe(project, name, "--help").stdout.startswith(f"usage: {typed} ")


def test_help_of_a_module_says_how_it_was_started() -> None:
    done = python("-m", "train.run", "--help")
    assert done.stdout.startswith(f"usage: {sys.executable} -m train.run ")
    assert f"\n  {sys.executable} -m train.show_data  " in done.stdout


@pytest.mark.parametrize(
    ("typed", "meant"), [("generat", "generate"), ("show_data", "show-data"), ("raport", "report")]
)
def test_a_command_that_is_not_there_is_named(project: Path, typed: str, meant: str) -> None:
    done = lathe(project, typed, "x", code=2)
    assert done.stderr.startswith(f"error: '{typed}' is not a setting")
    assert f"(or `lathe {meant} …`?)" in done.stderr and done.stderr.count("\n") == 1


def test_the_file_itself_is_the_command_too(project: Path) -> None:
    """For torchrun, and where nothing is installed."""
    file = str(ROOT / "lathe.py")
    done = python("-P", file, "merge", "--help", cwd=project, PYTHONPATH="")
    assert done.stdout.startswith(f"usage: {sys.executable} {file} merge")


def test_what_is_installed_is_this_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"lathe": "lathe:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["lathe"]
    assert set(OURS) <= set(project["tool"]["setuptools"]["packages"])
    try:
        installed = distribution("lathe")
    except PackageNotFoundError:
        return
    place = json.loads(installed.read_text("direct_url.json") or "{}").get("url")
    if place == ROOT.as_uri():  # another checkout's may be older; this one's is not
        (command,) = installed.entry_points.select(group="console_scripts")
        assert command.value == "lathe:main"


def test_without_git_or_any_other_program_a_run_goes_on(project: Path, tmp_path: Path) -> None:
    """The path holds nothing: what training needs is Python and the declared dependencies."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc"}\n' * 4)
    base = ROOT / "data" / "demo" / "base"
    settings = (*SMALL[1:], f"model.path={base}", f"data.train={rows}")
    lathe(project, *settings, f"output_dir={tmp_path / 'run'}", PATH="")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["commit"] is None
    assert (tmp_path / "run" / "plots" / "train-loss.png").is_file()
