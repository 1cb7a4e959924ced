"""Generation: transformers' when greedy, true to the distribution when drawn; the command."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from references import EOS, FAMILIES, reference_model, write_reference
from runs import Refused

from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.atomic import write_json
from files.errors import UserError
from files.folders import replace_folder
from lora import LoraConfig, inject, load_adapter, save_adapter
from models import load_model
from models.config import RopeConfig
from train.config.load import load_config
from train.config.toml import to_toml
from train.generate import generate, main
from train.generation.decode import context_length
from train.generation.loaded import find_stop_ids
from train.generation.sampling import Sampling, next_tokens, token_probabilities


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("base"))


def greedy(folder: Path, text: str, **options: Any) -> str:
    tokenizer = Tokenizer.load(folder)
    ids = generate(load_model(folder), tokenizer.encode(text), **options)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    reference = reference_model(family)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    prompt = torch.randint(0, EOS, (1, 11), generator=torch.Generator().manual_seed(1))
    expected = reference.generate(prompt, do_sample=False, max_new_tokens=40)[0, 11:].tolist()
    ids = generate(model, prompt[0].tolist(), max_new_tokens=40, stop_ids=[EOS])
    assert ids == [token for token in expected if token != EOS]
    assert len(set(ids)) > 5  # a model that repeats one token would prove little

    # The same where some token of the middle is declared an end.
    end = next(token for token in ids[10:] if ids.index(token) >= 10)
    stopped = reference.generate(
        prompt, do_sample=False, max_new_tokens=40, eos_token_id=[EOS, end], pad_token_id=EOS
    )[0, 11:].tolist()
    ids = generate(model, prompt[0].tolist(), max_new_tokens=40, stop_ids=[EOS, end])
    assert [*ids, end] == stopped


def test_the_context_ends_the_text_and_refuses_a_prompt_that_fills_it(base: Path) -> None:
    model = load_model(base)
    prompt = list(range(60))
    assert len(generate(model, prompt, max_new_tokens=100)) == 4
    for wrong in ([], list(range(64))):
        with pytest.raises(UserError, match="prompt"):
            generate(model, wrong, max_new_tokens=1)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(), 64),
        (RopeConfig(rope_type="linear", factor=4.0), 64),
        (RopeConfig(rope_type="dynamic", factor=4.0), 256),
        (RopeConfig(rope_type="yarn", factor=4.0), 256),
        (RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 64),
    ],
)
def test_the_context_counts_what_rotary_scaling_adds(
    base: Path, rope: RopeConfig, expected: int
) -> None:
    from dataclasses import replace

    assert context_length(replace(load_model(base).config, rope=rope)) == expected


LOGITS = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()


@pytest.mark.parametrize(
    ("temperature", "top_p", "weights"),
    [
        (1.0, 1.0, [0.15, 0.5, 0.1, 0.25]),
        (1.0, 0.76, [0.15, 0.5, 0.0, 0.25]),  # 0.5 and 0.25 fall short of 0.76: one more
        (1.0, 0.74, [0.0, 0.5, 0.0, 0.25]),
        (1.0, 1e-9, [0.0, 1.0, 0.0, 0.0]),  # the likeliest always stays
        (2.0, 1.0, [math.sqrt(p) for p in (0.15, 0.5, 0.1, 0.25)]),
        (0.5, 1.0, [p * p for p in (0.15, 0.5, 0.1, 0.25)]),
    ],
)
def test_temperature_and_top_p_give_the_distribution(
    temperature: float, top_p: float, weights: list[float]
) -> None:
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    sampling = Sampling(1, temperature=temperature, top_p=top_p)
    probabilities = token_probabilities(LOGITS, sampling)
    # The logits are fp32: a relative rounding of 2**-24 of values up to 2.4, twice at temperature
    # 0.5, then exponentiated.
    torch.testing.assert_close(probabilities, expected, rtol=1e-6, atol=0)


def test_draws_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    count = 4000
    sampling = Sampling(1, temperature=1.0, top_p=0.76)
    draws = [next_tokens(LOGITS[None], sampling, [generator])[0] for _ in range(count)]
    for token, weight in enumerate((0.15, 0.5, 0.0, 0.25)):
        p = weight / 0.9
        # Five standard deviations of a binomial count; a token that top-p cut is never drawn.
        assert abs(draws.count(token) - count * p) <= 5 * math.sqrt(count * p * (1 - p))


def test_a_seed_fixes_the_draws_and_another_gives_others(base: Path) -> None:
    model = load_model(base)

    def draw(seed: int) -> list[int]:
        return generate(model, [1, 2, 3], max_new_tokens=20, temperature=1.5, seed=seed)

    assert draw(0) == draw(0) != draw(1)


def test_logits_that_are_not_finite_are_refused(base: Path) -> None:
    model = load_model(base)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="not finite"):
        generate(model, [1, 2, 3], max_new_tokens=1)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_settings_out_of_range_are_refused(base: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        generate(load_model(base), [1], **{"max_new_tokens": 1, **wrong})


def test_every_end_of_text_that_is_declared_stops(base: Path, tmp_path: Path) -> None:
    tokenizer, config = Tokenizer.load(base), load_model(base).config
    assert find_stop_ids(config, tokenizer, tmp_path) == {EOS}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [7, 9]})
    assert find_stop_ids(config, tokenizer, tmp_path) == {EOS, 7, 9}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": "</s>"})
    with pytest.raises(UserError, match="eos_token_id"):
        find_stop_ids(config, tokenizer, tmp_path)


# The command


def completed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    options = ["--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "12"]
    assert main([str(argument) for argument in arguments] + options) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the base says, with the format of its rows beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(base)
    inject(model, LoraConfig(r=2, lora_alpha=16))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    save_adapter(model, folder, base_model=str(base))
    form = PromptFormat(
        format="template", prompt_template="Q: {ask}\nA: ", completion_template="{answer}"
    )
    write_json(folder / "prompt_format.json", form.to_dict())
    return folder


def adapted(base: Path, adapter: Path, text: str) -> str:
    model, tokenizer = load_model(base), Tokenizer.load(base)
    load_adapter(model, adapter)
    ids = generate(model, tokenizer.encode(text), max_new_tokens=12, stop_ids=[EOS])
    return tokenizer.decode(ids)


def test_a_model_folder_completes_a_prompt_as_it_stands(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = greedy(base, "def f(", max_new_tokens=12, stop_ids=[EOS])
    assert completed(capsys, "--model", base, "--prompt", "def f(") == expected


def test_a_prompt_file_loses_its_last_line_end_unless_raw(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def f(\n")
    for options, prompt in (([], "def f("), (["--raw"], "def f(\n")):
        expected = greedy(base, prompt, max_new_tokens=12, stop_ids=[EOS])
        assert completed(capsys, "--model", base, "--prompt-file", file, *options) == expected


def test_an_adapter_applies_the_prompt_format_beside_it(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = adapted(base, adapter, "Q: why\nA: ")
    assert completed(capsys, "--adapter", adapter, "--prompt", "why") == expected
    assert completed(capsys, "--adapter", adapter, "--field", "ask=why") == expected
    raw = completed(capsys, "--adapter", adapter, "--prompt", "why", "--raw")
    assert raw == adapted(base, adapter, "why") != expected
    assert expected != greedy(base, "Q: why\nA: ", max_new_tokens=12, stop_ids=[EOS])


def test_with_and_without_the_adapter_stand_side_by_side(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    plain = greedy(base, "Q: why\nA: ", max_new_tokens=12, stop_ids=[EOS])
    changed = adapted(base, adapter, "Q: why\nA: ")
    for stream in ("--stream", "--no-stream"):
        said = completed(capsys, "--adapter", adapter, "--prompt", "why", "--compare", stream)
        assert said == f"--- without the adapter\n{plain}\n--- with the adapter\n{changed}"
    assert "--model has none" in refused(main, "--model", base, "--prompt", "x", "--compare")
    wrong = ("--adapter", adapter, "--chat", "--compare")
    assert "two completions of one prompt" in refused(main, *wrong)


@pytest.mark.parametrize("temperature", ["0", "2"])
def test_what_is_streamed_is_the_text(
    temperature: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of bytes that are no text in all places, too."""
    command = ("--model", base, "--prompt", "é", "--temperature", temperature)
    whole, streamed = (completed(capsys, *command, how) for how in ("--no-stream", "--stream"))
    assert streamed == whole != ""


def test_bad_options_are_refused_before_torch_is_imported() -> None:
    code = (
        "import sys, train.generate as g; "
        "assert g.main(['--model', 'x', '--prompt', 'x', '--top-k', '-1']) == 2; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_several_columns_are_asked_for_by_name(
    adapter: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    form = PromptFormat(
        format="template", prompt_template="{a} and {b}: ", completion_template="{answer}"
    )
    write_json(tmp_path / "prompt_format.json", form.to_dict())
    message = refused(main, "--adapter", tmp_path, "--prompt", "why")
    assert "--field a=… --field b=…" in message
    by_name = completed(capsys, "--adapter", tmp_path, "--field", "a=x", "--field", "b=y=z")
    assert by_name == completed(capsys, "--adapter", tmp_path, "--raw", "--prompt", "x and y=z: ")


def test_a_run_uses_what_it_trained_and_the_base_of_its_configuration(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"model.path": str(base), "train.method": "lora", "data.format": "text"}
    (tmp_path / "config.toml").write_text(to_toml(load_config(overrides=overrides)))
    assert "nothing is trained yet" in refused(main, "--run", tmp_path, "--prompt", "why")
    (tmp_path / "best").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "best" / file.name).write_bytes(file.read_bytes())
    expected = adapted(base, adapter, "Q: why\nA: ")
    assert completed(capsys, "--run", tmp_path, "--prompt", "why") == expected
    # Without a stored format, that of the configuration: plain text here.
    (tmp_path / "best" / "prompt_format.json").unlink()
    expected = adapted(base, adapter, "why")
    assert completed(capsys, "--run", tmp_path, "--prompt", "why") == expected
    # final/ is what a user takes away, as train.merge does.
    (tmp_path / "best").rename(tmp_path / "final")
    (tmp_path / "best").mkdir()
    assert completed(capsys, "--run", tmp_path, "--prompt", "why") == expected


@pytest.mark.parametrize("part", ["checkpoints/step-00000002", "best", "final"])
def test_a_part_of_a_run_is_taken_as_it_is(
    part: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the base and the prompt format of the run's configuration; from inside it too."""
    overrides = {"model.path": str(base), "data.format": "text"}
    (tmp_path / "config.toml").write_text(to_toml(load_config(overrides=overrides)))

    def fill(folder: Path) -> dict[str, str]:
        for file in adapter.glob("adapter_*"):
            (folder / file.name).write_bytes(file.read_bytes())
        return {}

    replace_folder(tmp_path / part, fill)
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)  # newer, and not asked for
    expected = adapted(base, adapter, "why")
    assert completed(capsys, "--run", tmp_path / part, "--prompt", "why") == expected
    monkeypatch.chdir(tmp_path / part)
    assert completed(capsys, "--run", ".", "--prompt", "why") == expected


def test_a_damaged_checkpoint_and_what_is_no_run_s_are_refused(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "config.toml").write_text(to_toml(load_config(overrides={"model.path": str(base)})))
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    assert "there is no manifest.json; take another one" in refused(
        main, "--run", checkpoint, "--prompt", "x"
    )
    other = tmp_path / "elsewhere" / "final"
    other.mkdir(parents=True)
    for place in (other, tmp_path / "checkpoints"):
        assert "and none of a run's" in refused(main, "--run", place, "--prompt", "x")


def test_a_run_of_full_fine_tuning_needs_no_base(
    base: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"model.path": str(tmp_path / "gone"), "train.method": "full"}
    (tmp_path / "config.toml").write_text(to_toml(load_config(overrides=overrides)))
    (tmp_path / "final").mkdir()
    for file in base.iterdir():
        (tmp_path / "final" / file.name).write_bytes(file.read_bytes())
    expected = greedy(base, "def f(", max_new_tokens=12, stop_ids=[EOS])
    assert completed(capsys, "--run", tmp_path, "--prompt", "def f(") == expected
    said = refused(main, "--run", tmp_path, "--prompt", "x", "--compare")
    assert "was trained in full and has no adapter to leave out" in said


def test_a_checkpoint_of_full_fine_tuning_has_the_tokenizer_of_its_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"model.path": str(base), "train.method": "full"}
    (tmp_path / "config.toml").write_text(to_toml(load_config(overrides=overrides)))

    def fill(folder: Path) -> dict[str, str]:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((base / name).read_bytes())
        return {}

    replace_folder(tmp_path / "checkpoints" / "step-00000002", fill)
    expected = greedy(base, "def f(", max_new_tokens=12, stop_ids=[EOS])
    for place in (tmp_path, tmp_path / "checkpoints" / "step-00000002"):
        assert completed(capsys, "--run", place, "--prompt", "def f(") == expected


def test_bad_input_is_one_sentence(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    prompt = ("--prompt", "x")
    assert "config.toml" in refused(main, "--run", tmp_path, *prompt)
    assert "adapter_config.json" in refused(main, "--adapter", tmp_path, *prompt)
    assert "--base" in refused(main, "--model", base, "--base", base, *prompt)
    assert "prompt.txt" in refused(main, "--model", base, "--prompt-file", "no/prompt.txt")
    assert "NAME=VALUE" in refused(main, "--adapter", adapter, "--field", "ask")
    assert "--field" in refused(main, "--model", base, "--field", "ask=x")
    assert "top_p" in refused(main, "--model", base, *prompt, "--top-p", "2")
