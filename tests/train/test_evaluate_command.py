"""`lathe evaluate`: its numbers against transformers', the run's own, and planted completions."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from references import EOS, reference_model, write_reference
from runs import Refused, rows_of, settings, train
from test_programs import HUMAN_EVAL, MBPP

from data.prompt import PromptFormat
from data.source import Row
from data.tokenizer import Tokenizer
from files.atomic import write_json
from lora import LoraConfig, inject, save_adapter
from models import load_model
from train.evaluate import main
from train.evaluation import tasks
from train.evaluation.code import code_of, edit_similarity, exact_match, parses
from train.evaluation.problems import problem_of, with_columns
from train.process import progress

ROWS = [
    {"prompt": f"def f{number}(x):\n", "completion": f"  return x*{'9' * number}\n"}
    for number in range(1, 6)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("base"))


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--json", "--dtype", "fp32", "--device", "cpu"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def test_a_file_that_names_no_splits_has_none_to_choose(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "rows.jsonl", ROWS)
    assert main([str(base), "--data", str(data), "--split", "valid"]) == 2
    assert "nothing says which of its rows are of that split" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_every_number_is_transformers_own(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = lines(tmp_path / "rows.jsonl", ROWS), tmp_path / "completions.jsonl"
    found = evaluated(
        *(capsys, base, "--data", data, "data.format=completion"),
        *("--max-new-tokens", 12, "--completions", out, "--batch-size", 2),
    )
    model, tokenizer = reference_model("Qwen2"), Tokenizer.load(base)
    total, right, targets, near, exact = 0.0, 0, 0, [], []
    written = [json.loads(line) for line in out.read_text().splitlines()]
    for row, given in zip(ROWS, written, strict=True):
        prompt, whole = (tokenizer.encode(text) for text in (row["prompt"], "".join(row.values())))
        ids = torch.tensor([[*whole, EOS]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            answer = model.generate(ids[:, : len(prompt)], do_sample=False, max_new_tokens=12)
        wanted = ids[0, len(prompt) :]
        total += F.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
        targets += len(wanted)
        text = tokenizer.decode([t for t in answer[0, len(prompt) :].tolist() if t != EOS])
        assert (given["prompt"], given["completion"]) == (row["prompt"], text)
        assert given["reference"] == row["completion"]
        two = text.strip(), row["completion"].strip()
        near.append(difflib.SequenceMatcher(None, *two, autojunk=False).ratio())
        exact.append(two[0] == two[1])
    metrics = {name: one["value"] for name, one in found["metrics"].items()}
    assert found["targets"] == targets
    assert metrics["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / targets), rel=1e-4)
    assert metrics["token_accuracy"] == right / targets
    assert metrics["edit_similarity"] == pytest.approx(sum(near) / len(near), rel=1e-12)
    assert metrics["exact_match"] == sum(exact) / len(exact)
    assert found["completions"]["rows"] == len(ROWS)


@pytest.mark.usefixtures("cache")
def test_of_a_run_it_is_the_run_s_own_test_loss_and_stands_in_its_report(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = rows_file / "test.jsonl"
    more = {"data.test": str(test), "train.max_steps": 2}
    run = train(settings(model_folder, rows_file, tmp_path / "run", **more)).folder
    recorded = [row for row in rows_of(run) if row.get("split") == "test"][-1]
    for place in (run, run / "final", run):
        found = evaluated(capsys, place, "--data", test)
        assert found["metrics"]["loss"]["value"] == pytest.approx(recorded["loss"], rel=1e-6)
        assert found["targets"] == recorded["targets"]
        assert found["metrics"]["loss"]["rows"] == 3
    report = (run / "report.md").read_text()
    section = report.split("## Evaluated afterwards")[1].split("\n## ")[0]
    assert section.count(str(test)) == 1  # the same again takes the place of the first
    assert f"{recorded['loss']:.4f} ± " in section
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 3
    checkpoint = next((run / "checkpoints").iterdir())
    evaluated(capsys, checkpoint, "--data", test)
    assert "step-00000002" in (run / "report.md").read_text()


@pytest.mark.usefixtures("cache")
def test_pass_at_k_of_planted_completions_is_exact(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five samples of each of two rows, two and four of them right."""
    right, wrong = "    return 2 * x\n", "    import os\n    os._exit(0)\n"
    planted = iter([right, wrong, right, wrong, wrong, *[right] * 4, "    return 3 * x\n"])

    def take(self: tasks.Task, asked: Any, tokenizer: Tokenizer) -> None:
        self.completions = [next(planted) for _ in asked]
        self.ended = [one.ended for one in asked]

    monkeypatch.setattr(tasks.Task, "take", take)
    data = lines(tmp_path / "rows.jsonl", [HUMAN_EVAL, {**HUMAN_EVAL, "task_id": "2"}])
    given = ("--run-code", "--samples", 5, "--k", "1,2,5", "--temperature", 0.8)
    found = evaluated(capsys, base, "--data", data, *given, "--max-new-tokens", 1)
    for k in (1, 2, 5):
        each = [1 - math.comb(5 - c, k) / math.comb(5, k) for c in (2, 4)]
        metric = found["metrics"][f"pass@{k}"]
        assert metric["value"] == pytest.approx(sum(each) / 2, rel=1e-12)
        # Two numbers' standard error is half their distance.
        assert metric["standard_error"] == pytest.approx(abs(each[0] - each[1]) / 2, abs=1e-15)
        assert metric["rows"] == 2
    assert found["metrics"]["exact_match"]["value"] == 6 / 10
    assert found["metrics"]["parse_rate"]["value"] == 1.0


@pytest.mark.usefixtures("cache")
def test_the_warning_is_said_and_the_table_is_printed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "rows.jsonl", [MBPP] * 2)
    asked = [str(base), "--data", str(data), "--max-new-tokens", "2", "--device", "cpu"]
    assert main([*asked, "--run-code"]) == 2
    assert "rows.jsonl, row 1: the prompt has 67 tokens and the" in capsys.readouterr().err
    short = {**MBPP, "text": "Double", "test_list": ["f(1)"]}
    lines(data, [short] * 2)
    assert main([*asked, "--run-code"]) == 0
    said = capsys.readouterr()
    assert "programs that a model wrote" in said.err and "can read your files" in said.err
    assert "pass@1" in said.out and "± standard error" in said.out
    assert main([*asked, "--complete", "0"]) == 0
    said = capsys.readouterr()
    assert "pass@1" not in said.out and "programs" not in said.err


def test_what_cannot_be_is_refused_in_one_sentence(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    tests = lines(tmp_path / "tests.jsonl", [HUMAN_EVAL])
    plain = lines(tmp_path / "plain.jsonl", ROWS)
    mixed = lines(tmp_path / "mixed.jsonl", [HUMAN_EVAL, ROWS[0]])
    for arguments, message in (
        ((base, "--data", tests), "tests.jsonl:1: rows with tests are measured by running what"),
        ((base, "--data", tests), "allow that with --run-code"),
        ((base, "--data", mixed, "--run-code"), "mixed.jsonl:2: has no tests"),
        ((base, "--data", plain, "--run-code"), "has no rows with tests"),
        ((base, "--data", tests, "--k", "x"), "--k x: must be whole numbers"),
        ((base, "--data", tests, "--k", "1,5", "--samples", "4"), "from 1 to --samples 4"),
        ((base, "--data", tests, "--k", "0"), "from 1 to --samples"),
        ((base, "--data", tests, "--samples", "2"), "give a --temperature above 0"),
        ((base, "--data", plain, "--batch-size", "0"), "--batch-size 0: must be at least 1"),
        ((base, "--data", plain, "lora.r=2"), "an evaluation takes settings of how rows are read"),
        ((base, "--data", plain, "data.train=x"), "data.train: an evaluation takes settings"),
        ((base, "--data", plain, "--base", "x"), "--base goes with an adapter's folder alone"),
        ((base, "--data", tmp_path / "none.jsonl"), "none.jsonl"),
        ((base,), "--data"),
    ):
        assert message in refused(main, *arguments)


@pytest.mark.usefixtures("cache")
def test_an_adapter_is_read_in_the_format_beside_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(base)
    inject(model, LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    form = PromptFormat(
        format="template", prompt_template="{ask}\n", completion_template="{answer}"
    )
    write_json(tmp_path / "adapter" / "prompt_format.json", form.to_dict())
    rows = [{"ask": row["prompt"].strip(), "answer": row["completion"]} for row in ROWS]
    data = lines(tmp_path / "rows.jsonl", rows)
    found = evaluated(capsys, tmp_path / "adapter", "--data", data, "--complete", 0)
    plain = lines(tmp_path / "plain.jsonl", ROWS)
    same = evaluated(capsys, base, "--data", plain, "--complete", 0, "data.format=completion")
    assert found["metrics"] == same["metrics"]  # B is zero


def test_rows_with_tests_take_the_model_s_own_format() -> None:
    row = Row(HUMAN_EVAL, "rows:1")
    problem = problem_of(row)
    assert problem is not None
    prompt, solution = HUMAN_EVAL["prompt"], HUMAN_EVAL["canonical_solution"]
    raw = {"prompt": prompt, "completion": solution}
    chat = PromptFormat(format="messages")
    made, form = with_columns(row, problem, chat)
    assert form is chat
    assert [turn["content"] for turn in made.values["messages"]] == [prompt, solution]
    for text in (None, PromptFormat(), PromptFormat(format="completion")):
        made, form = with_columns(row, problem, text)
        assert (made.values, form.format) == (raw, "completion")
    own = PromptFormat(
        format="template", prompt_template="# {task_id}\n{prompt}", completion_template="{test}"
    )
    made, form = with_columns(row, problem, own)
    assert form is own and form.generation_prompt(made.values) == f"# HumanEval/0\n{prompt}"
    other = PromptFormat(format="template", prompt_template="{q}", completion_template="{a}")
    made, form = with_columns(row, problem, other)
    assert (made.values, form.format) == (raw, "completion")


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        ("x = 1\n", "", True),
        ("    return x\n", "def f(x):\n", True),
        ("    return x\n", "", False),
        ("x = (\n", "", False),
        ("", "x = 1\n", False),
        ("  \n", "x = 1\n", False),
        ("# no statement\n", "", False),
        ("Sure:\n```python\nx = 1\n```\nas asked", "", True),
        ("```\nx = 1", "", True),
        ("a\0b", "", False),
        ("(" * 300, "", False),
        ("-" * 10**5 + "1", "", False),
        ("'\\d' is x", "", True),
    ],
)
def test_what_parses(completion: str, prompt: str, expected: bool) -> None:
    assert parses(completion, prompt) is expected


def test_exact_match_and_similarity_are_what_they_say() -> None:
    assert exact_match("\n  a = 1\n", "a = 1") and not exact_match("a  = 1", "a = 1")
    assert edit_similarity("abcd", "abxd") == 2 * 3 / 8
    assert edit_similarity("", " ") == 1.0 and edit_similarity("a", "") == 0.0
    # Texts beyond 200 characters, of which difflib would take the commonest for junk by itself.
    assert edit_similarity("a" * 300 + "b", "a" * 300 + "c") == 2 * 300 / 602
    assert code_of("a\n```py\nx\n```\n```\ny\n```") == "x\n" and code_of("a ``` b") == "a ``` b"


@pytest.mark.usefixtures("cache")
def test_completed_rows_are_spread_evenly_and_cut_ones_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:2], {"prompt": "x", "completion": "y" * 70}, *ROWS[2:]]
    data, out = lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    asked = (capsys, base, "--data", data, "data.format=completion", "data.max_length=40")
    given = (*asked, "--completions", out, "--max-new-tokens", 1)
    found = evaluated(*given, "--complete", 3)
    assert found["cut_rows"] == 1
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [0, 3, 5]
    evaluated(*given)
    assert len(out.read_text().splitlines()) == 5
    assert evaluated(*asked, "--complete", 0)["completions"] is None


@pytest.mark.usefixtures("cache")
def test_in_a_log_a_line_now_and_then_says_how_far_it_is(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lines(tmp_path / "rows.jsonl", ROWS)
    given = ("--data", data, "data.format=completion", "--max-new-tokens", 1, "--batch-size", 2)
    assert main([str(one) for one in (base, *given)]) == 0
    assert "done" not in capsys.readouterr().err  # a short one needs none
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert main([str(one) for one in (base, *given)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("done")]
    of = [f"{done} of 5 {noun} done" for noun in ("rows", "completions") for done in (2, 4)]
    assert said == of
