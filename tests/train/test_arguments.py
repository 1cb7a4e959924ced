"""The command line, and that looking around needs no torch."""

import tomllib
from pathlib import Path

import pytest
from children import python

from files.errors import UserError, did_you_mean
from train.config.command_line import Arguments, parse, show_text
from train.config.layers import preset_names
from train.config.load import load_config
from train.plan.text import list_presets_text


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("--preset demo", Arguments(preset="demo")),
        (
            "lora.r=4 --preset demo --plan max_steps=3 --json --ranks 2",
            Arguments(
                preset="demo",
                plan=True,
                json=True,
                ranks=2,
                overrides={"lora.r": "4", "max_steps": "3"},
            ),
        ),
        ("--config a.toml", Arguments(config_file="a.toml")),
        ("--resume runs/a log.steps=5", Arguments(resume="runs/a", overrides={"log.steps": "5"})),
        ("--prove-resume", Arguments(prove_resume=3)),
        ("--prove-resume 5 --preset demo", Arguments(preset="demo", prove_resume=5)),
        ("--prove-resume=2 --preset demo", Arguments(preset="demo", prove_resume=2)),
        (
            "lora.r=2 --prove-resume lora.r=4 seed=1",
            Arguments(prove_resume=3, overrides={"lora.r": "4", "seed": "1"}),
        ),
        ("--prove-resume --preset demo", Arguments(preset="demo", prove_resume=3)),
        ("--list-presets", Arguments(list_presets=True)),
        ("--show demo", Arguments(show="demo")),
        ("data.prompt_template=a=b", Arguments(overrides={"data.prompt_template": "a=b"})),
        ("run_name=", Arguments(overrides={"run_name": ""})),
        ("", Arguments(preset="demo")),
    ],
)
def test_what_was_asked(line: str, arguments: Arguments) -> None:
    assert parse(line.split()) == arguments


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24", 24 * 10**9),
        ("22.5GiB", 22.5 * 2**30),
        ("80 gb", 80 * 10**9),
        ("500M", 500 * 10**6),
        ("1TiB", 2**40),
    ],
)
def test_a_size_of_memory(text: str, count: float) -> None:
    assert parse(["--plan", "--memory", text]).memory == count


def test_of_two_settings_of_a_key_the_later_rules() -> None:
    overrides = parse(["lora.r=4", "r=8", "lora.r=16"]).overrides
    assert load_config(overrides=overrides).lora.r == 16


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--presett demo", ["--presett", "did you mean '--preset'"]),
        ("--lora_r 8", ["no dashes", "lora.r=VALUE"]),
        ("--learning-rate=1", ["no dashes", "optimizer.learning_rate=VALUE"]),
        ("--bf16", ["no dashes", "train.precision=VALUE"]),
        ("--batch-size=4", ["per_device_train_batch_size=VALUE or train.effective_batch_size="]),
        ("--load_in_4bit", ["no dashes", "model.quantization=VALUE"]),
        ("demo", ["'demo' is not a setting", "--preset demo"]),
        ("not-here.jsonl", ["is not a setting", "(or data.train=not-here.jsonl?)"]),
        ("=3", ["section.key=value"]),
        ("--json", ["--json goes with --plan"]),
        ("--ranks 2", ["--ranks goes with --plan"]),
        ("--plan --ranks 0", ["at least 1"]),
        ("--plan --ranks two", ["--ranks", "two"]),
        ("--memory 24GB", ["--memory goes with --plan"]),
        ("--gpu a100", ["--gpu goes with --plan"]),
        ("--gpu=", ["--gpu : names no card"]),
        ("--plan --gpu=,", ["--gpu ,: names no card"]),
        ("--plan --gpu a100 --price=", ["--price : must be numbers"]),
        ("--memory 0.0001K", ["--memory 0.0001K", "24GB"]),
        ("--plan --memory 1e3GB", ["--memory 1e3GB", "24GB"]),
        ("--plan --memory lots", ["--memory lots", "24GB"]),
        ("--plan --memory 0", ["--memory 0", "24GB"]),
        ("--resume a --preset demo", ["--resume", "--preset"]),
        ("--resume a --plan", ["plan.json"]),
        ("--prove-resume 0", ["--prove-resume 0", "at least 1"]),
        ("--prove-resume -1", ["--prove-resume -1", "at least 1"]),
        ("--prove-resume three", ["--prove-resume", "three"]),
        ("--prove-resume --resume a", ["--prove-resume", "--resume cannot"]),
        ("--prove-resume --plan", ["--prove-resume", "--plan cannot"]),
        ("--preset", ["--preset", "expected one argument"]),
    ],
)
def test_bad_command_lines(line: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(line.split())
    for word in words:
        assert word in str(caught.value)


def test_list_of_presets() -> None:
    lines = list_presets_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == preset_names()
    (line,) = (line for line in lines if line.startswith("qwen2.5-coder-1.5b "))
    assert line.split()[:5] == ["qwen2.5-coder-1.5b", "lora", "16", "852", "001"]


@pytest.mark.parametrize("name", preset_names())
def test_what_is_shown_is_the_whole_preset(name: str, tmp_path: Path) -> None:
    text = show_text(name)
    assert tomllib.loads(text)["preset"] == name
    (tmp_path / "shown.toml").write_text(text, encoding="utf-8")
    assert load_config(file=tmp_path / "shown.toml") == load_config(name)


def test_show_tells_claims_and_departures() -> None:
    text = show_text("llama2-7b")
    assert "# From seed 004_" in text
    assert "✓ 8 epochs: 512 steps" in text
    assert "Llama-2 is gated" in text


@pytest.mark.parametrize(
    ("line", "code", "out"),
    [
        (["--list-presets"], 0, "starcoder2-15b-lora"),
        (["--show", "codellama-7b"], 0, "max_grad_norm = 0.3"),
        (["--help"], 0, "exit codes:"),
        (["--help"], 0, "--prove-resume K"),
        (["--show", "codelama-7b"], 2, "did you mean 'codellama-7b'"),
        (["train.lora_r=8"], 2, "lora_r is spelled lora.r here"),
        (["use_qalora=true"], 2, "'use_qalora' is not supported"),
        (["--plan", "--preset", "nothing"], 2, "--list-presets"),
    ],
)
def test_looking_around_never_imports_torch(
    line: list[str], code: int, out: str, tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from train.run import main\n"
        "try:\n    code = main()\n"
        "except SystemExit as end:\n    code = end.code or 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    done = python("-c", script, *line, code=code, cwd=tmp_path)  # from any folder
    assert out in (done.stdout if code == 0 else done.stderr)
    assert "Traceback" not in done.stderr


def test_a_file_alone_is_answered_with_the_setting_and_nothing_with_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match=r"or data\.train=rows\.jsonl\?"):
        parse(["rows.jsonl"])
    assert parse([]).preset == "demo"
    assert "running the preset demo" in capsys.readouterr().err


def test_a_setting_that_is_given_again_is_noted_and_the_last_one_rules(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = parse(["data.train=a.jsonl", "seed=1", "data.train=b.jsonl", "seed=1"])
    assert list(asked.overrides.items()) == [("data.train", "b.jsonl"), ("seed", "1")]
    said = "note: data.train is given more than once: the last one rules, data.train=b.jsonl\n"
    assert capsys.readouterr().err == said


def test_a_neighbour_is_one_that_begins_so_or_is_nearly_the_same() -> None:
    keys = ["optimizer.learning_rate", "lora.r", "lora.lora_alpha", "data.train"]
    assert did_you_mean("optimizer.l", keys) == "; did you mean 'optimizer.learning_rate'?"
    assert did_you_mean("lora.lora_alfa", keys) == "; did you mean 'lora.lora_alpha'?"
    assert did_you_mean("my-model", ["runs", "demo-base", "my-rows.jsonl"]) == ""
