"""Labels, overflow, counts, the cache, and data that leaves nothing to train."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenised import tokenise
from transformers import PreTrainedTokenizerFast

import data.examples as module
from data import labels
from data.examples import (
    Examples,
    cache_root,
    check_vocabulary,
    load_examples,
)
from data.labels import common_prefix
from data.prompt import PromptFormat
from data.source import Row
from data.tokenizer import Tokenizer
from files.errors import UserError

COMPLETION = PromptFormat(format="completion")
EOS = 0


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder())


def make(
    values: list[dict],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat = PromptFormat(),  # noqa: B008 (frozen)
    *,
    max_length: int = 1000,
    on_overflow: str = "truncate",
) -> Examples:
    return tokenise(
        values, tokenizer, prompt_format, max_length=max_length, on_overflow=on_overflow
    )


def ids_and_labels(examples: Examples) -> list[tuple[list[int], list[int]]]:
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples]


# --- labels --------------------------------------------------------------------------------------


def test_text_is_trained_whole_with_eos(tokenizer):
    examples = make([{"text": "hello"}], tokenizer)
    ids = [*tokenizer.encode("hello"), EOS]
    assert ids_and_labels(examples) == [(ids, ids)]
    # Nothing predicts the first token.
    assert examples.num_targets.tolist() == [len(ids) - 1]
    assert examples[0].input_ids.dtype == examples[0].labels.dtype == np.int32


def test_prompt_is_masked_and_eos_trained(tokenizer):
    examples = make([{"prompt": "Problem:\n", "completion": "return a"}], tokenizer, COMPLETION)
    prompt, completion = tokenizer.encode("Problem:\n"), tokenizer.encode("return a")
    ids = [*prompt, *completion, EOS]
    assert tokenizer.encode("Problem:\nreturn a") == ids[:-1], "no merge across this boundary"
    assert ids_and_labels(examples) == [(ids, [-100] * len(prompt) + [*completion, EOS])]


def test_boundary_is_the_common_prefix_where_tokens_merge(tokenizer):
    """`ret` + `urn` become one token `return`, which holds the completion's beginning: trained."""
    prompt, whole = tokenizer.encode("x ret"), tokenizer.encode("x return a")
    kept = common_prefix(prompt, whole)
    assert kept < len(prompt), "the tokens must merge for this test to mean anything"
    examples = make([{"prompt": "x ret", "completion": "urn a"}], tokenizer, COMPLETION)
    assert ids_and_labels(examples) == [
        ([*whole, EOS], [-100] * kept + whole[kept:] + [EOS]),
    ]


def test_common_prefix():
    assert common_prefix([], [1]) == common_prefix([1], [2]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 9, 4], [1, 2, 3, 4]) == 2


def test_prompt_can_be_trained_too(tokenizer):
    both = PromptFormat(format="completion", completion_only=False)
    examples = make([{"prompt": "Problem:\n", "completion": "return"}], tokenizer, both)
    assert examples[0].labels.tolist() == examples[0].input_ids.tolist()


@pytest.mark.parametrize("append_eos", [True, False])
def test_eos_is_appended_once(tokenizer, append_eos):
    prompt_format = PromptFormat(append_eos=append_eos)
    plain, ended = ids_and_labels(
        make([{"text": "hello"}, {"text": "hello<|endoftext|>"}], tokenizer, prompt_format)
    )
    assert ended[0] == [*tokenizer.encode("hello"), EOS]
    assert plain[0] == (ended[0] if append_eos else ended[0][:-1])


def test_bos_stands_once_and_is_no_target(tokenizer_folder, bos_template):
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.load(tokenizer_folder(settings, bos_template, name="bos"))
    values = [{"prompt": p, "completion": "return"} for p in ("Problem:\n", "<s>Problem:\n")]
    first, second = ids_and_labels(make(values, tokenizer, COMPLETION))
    assert first == second
    ids, labels = first
    assert ids[0] == 1 and ids.count(1) == 1 and labels[0] == -100


# Marks what it trains; ours needs no marks.
MARKED = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- generation %}{{- message.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONVERSATIONS = [
    [("user", "add two numbers"), ("assistant", "return a + b")],
    [("system", "be brief"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")],
    [("user", "Q"), ("assistant", "first"), ("assistant", "second"), ("user", "last")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_messages_train_what_transformers_marks(tokenizer_folder, turns):
    folder = tokenizer_folder(
        {"eos_token": "<|im_end|>"}, name="chat", files={"chat_template.jinja": MARKED}
    )
    messages = [{"role": role, "content": content} for role, content in turns]
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs = oracle.apply_chat_template(
        messages,
        chat_template=MARKED,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    mask = np.array(theirs["assistant_masks"], dtype=bool)
    assert mask.any() and not mask.all()
    prompt_format = PromptFormat(format="messages")
    (example,) = make([{"messages": messages}], Tokenizer.load(folder), prompt_format)
    # <|im_end|> is EOS and ends each turn: none is added.
    assert example.input_ids.tolist() == theirs["input_ids"]
    assert ((example.labels != -100) == mask).all()
    assert (example.labels[mask] == example.input_ids[mask]).all()


@pytest.mark.parametrize("written", [0, 1])
def test_a_chat_has_the_bos_that_its_template_writes(tokenizer_folder, bos_template, written):
    """As in transformers and in inference servers: the post-processor adds nothing to a chat."""
    template = "{{ bos_token }}" * written + MARKED
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template}
    tokenizer = Tokenizer.load(tokenizer_folder(settings, bos_template, name="chat"))
    messages = [{"role": role, "content": content} for role, content in CONVERSATIONS[0]]
    (example,) = make([{"messages": messages}], tokenizer, PromptFormat(format="messages"))
    assert example.input_ids.tolist().count(1) == written
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == (
        tokenizer.render_chat(messages)
    )


def test_eos_ends_a_chat_whose_template_writes_none(tokenizer_folder):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = Tokenizer.load(
        tokenizer_folder({"eos_token": "</s>", "chat_template": template}, name="plain")
    )
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    prompt_format = PromptFormat(format="messages")
    (answered,) = make([{"messages": [user, assistant]}], tokenizer, prompt_format)
    assert answered.labels[-1] == answered.input_ids[-1] == tokenizer.eos_id
    (open_ended,) = make([{"messages": [user, assistant, user]}], tokenizer, prompt_format)
    assert open_ended.input_ids[-1] != tokenizer.eos_id and open_ended.labels[-1] == -100


def test_more_rows_than_are_tokenised_at_once(tokenizer):
    numbers = range(2 * labels._ROWS_AT_ONCE + 7)
    examples = make([{"text": f"number {number}"} for number in numbers], tokenizer)
    assert len(examples) == len(numbers)
    for number in (0, 999, 1000, 2006):
        assert examples[number].input_ids.tolist() == [*tokenizer.encode(f"number {number}"), EOS]
        assert examples[number].index == examples.rows[number] == number
    assert examples.lengths.tolist() == [len(example.input_ids) for example in examples]
    assert examples.num_targets.tolist() == (examples.lengths - 1).tolist()


# --- overflow and counts -------------------------------------------------------------------------

LONG = "a b c d e f g h"
SHORT = "a"


def length_of(text: str, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(text)) + 1


def test_truncate_keeps_the_start_and_gives_no_eos(tokenizer):
    examples = make([{"text": LONG}, {"text": SHORT}], tokenizer, max_length=5)
    ids = tokenizer.encode(LONG)[:5]
    assert ids_and_labels(examples)[0] == (ids, ids)
    assert EOS not in ids and examples[1].input_ids[-1] == EOS
    counts = examples.counts
    assert (counts.rows, counts.examples, counts.truncated, counts.eos_lost) == (2, 2, 1, 1)
    assert (counts.dropped, counts.longest) == (0, 5)
    assert counts.longest_row == length_of(LONG, tokenizer)
    assert counts.tokens == examples.lengths.sum() == 5 + length_of(SHORT, tokenizer)
    assert counts.targets == examples.num_targets.sum()


def test_a_row_that_fits_exactly_keeps_its_eos(tokenizer):
    exact = length_of(LONG, tokenizer)
    (whole,) = make([{"text": LONG}], tokenizer, max_length=exact)
    assert whole.input_ids[-1] == EOS
    examples = make([{"text": LONG}], tokenizer, max_length=exact - 1)
    assert examples[0].input_ids.tolist() == tokenizer.encode(LONG)
    assert (examples.counts.truncated, examples.counts.eos_lost) == (1, 1)


def test_no_eos_is_lost_where_none_is_due(tokenizer):
    counts = make([{"text": LONG}], tokenizer, PromptFormat(append_eos=False), max_length=5).counts
    assert (counts.truncated, counts.eos_lost) == (1, 0)


def test_drop(tokenizer):
    examples = make([{"text": LONG}, {"text": SHORT}], tokenizer, max_length=5, on_overflow="drop")
    assert examples.rows.tolist() == [1] and examples[0].index == 0
    assert (examples.counts.rows, examples.counts.dropped, examples.counts.truncated) == (2, 1, 0)


def test_error_names_the_row(tokenizer):
    length = length_of(LONG, tokenizer)
    message = rf"/rows\.jsonl:2: {length} tokens, more than data\.max_length=5; raise it"
    with pytest.raises(UserError, match=message):
        make([{"text": SHORT}, {"text": LONG}], tokenizer, max_length=5, on_overflow="error")


def test_of_two_faults_the_first_row_s_is_told_though_rows_are_read_ahead(tokenizer, tmp_path):
    lines = [json.dumps({"text": SHORT})] * (3 * labels._ROWS_AT_ONCE)
    lines[2 * labels._ROWS_AT_ONCE + 5] = "{"

    def refused(on_overflow: str) -> str:
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        with pytest.raises(UserError) as caught:
            load_examples(
                str(tmp_path / "rows.jsonl"),
                split_column=None,
                split=None,
                tokenizer=tokenizer,
                prompt_format=PromptFormat(),
                max_length=5,
                on_overflow=on_overflow,
                cache_root=None,
            )
        return str(caught.value)

    assert f"rows.jsonl:{2 * labels._ROWS_AT_ONCE + 6}: not JSON" in refused("error")
    lines[labels._ROWS_AT_ONCE + 7] = json.dumps({"text": LONG})
    assert f"rows.jsonl:{labels._ROWS_AT_ONCE + 8}: {length_of(LONG, tokenizer)} tokens" in (
        refused("error")
    )


@pytest.mark.parametrize("max_length", range(3, 20))
def test_split_loses_no_token(tokenizer, max_length):
    examples = make(
        [{"text": LONG}, {"text": SHORT}], tokenizer, max_length=max_length, on_overflow="split"
    )
    for row, text in enumerate((LONG, SHORT)):
        pieces = [example for example in examples if examples.rows[example.index] == row]
        ids = [int(i) for piece in pieces for i in piece.input_ids]
        assert ids == [*tokenizer.encode(text), EOS]
        assert pieces[-1].input_ids[-1] == pieces[-1].labels[-1] == EOS
        assert all(2 <= len(piece.input_ids) <= max_length for piece in pieces)
        assert all((piece.labels == piece.input_ids).all() for piece in pieces)
    counts = examples.counts
    assert (counts.truncated, counts.dropped, counts.eos_lost) == (0, 0, 0)


def test_split_keeps_labels_and_leaves_out_pieces_without_targets(tokenizer):
    row = {"prompt": LONG, "completion": "xyz"}
    (whole,) = make([row], tokenizer, COMPLETION)
    boundary = int(np.flatnonzero(whole.labels != -100)[0])
    max_length = boundary // 2
    examples = make([row], tokenizer, COMPLETION, max_length=max_length, on_overflow="split")
    labels = [int(label) for example in examples for label in example.labels]
    assert labels == whole.labels[-len(labels) :].tolist()
    assert 0 < len(examples) < -(-len(whole.input_ids) // max_length)
    assert (examples.num_targets > 0).all()
    assert examples.counts.dropped == 0


def test_rows_without_a_target_are_dropped_and_counted(tokenizer):
    values = [
        {"prompt": LONG, "completion": "cut away"},
        {"prompt": "a", "completion": "b"},
    ]
    examples = make(values, tokenizer, COMPLETION, max_length=5)
    assert examples.rows.tolist() == [1]
    assert (examples.counts.dropped, examples.counts.truncated) == (1, 0)
    # A text that is empty is EOS alone, which nothing predicts.
    assert make([{"text": ""}, {"text": "a"}], tokenizer).counts.dropped == 1


@pytest.mark.parametrize(
    ("values", "settings", "on_overflow", "message"),
    [
        ([], {}, "truncate", "rows.jsonl: no rows"),
        ([{"text": LONG}], {}, "drop", r"no target .* 1 rows: 1 are longer than data.max_length=5"),
        (
            [{"prompt": LONG, "completion": "c"}],
            {"format": "completion"},
            "truncate",
            r"1 are cut at data\.max_length=5 before their trained part begins \(raise it\)",
        ),
        (
            [{"text": ""}, {"text": ""}],
            {},
            "truncate",
            "2 have nothing to train .*empty text or completion.*without an assistant turn",
        ),
        (
            [{"prompt": LONG, "completion": "c"}, {"prompt": "", "completion": ""}],
            {"format": "completion"},
            "drop",
            "1 are longer .*; 1 have nothing",
        ),
    ],
)
def test_data_that_leaves_nothing_says_why(tokenizer, values, settings, on_overflow, message):
    with pytest.raises(UserError, match=message):
        make(values, tokenizer, PromptFormat(**settings), max_length=5, on_overflow=on_overflow)


def test_settings_that_are_refused(tokenizer, tokenizer_folder):
    with pytest.raises(UserError, match=r"data\.on_overflow: 'truncat' .*did you mean 'truncate'"):
        make([{"text": "a"}], tokenizer, on_overflow="truncat")
    with pytest.raises(UserError, match=r"data\.max_length: 1 is too small"):
        make([{"text": "a"}], tokenizer, max_length=1)
    without = Tokenizer.load(tokenizer_folder({}, name="without"))
    with pytest.raises(UserError, match=r"needs an EOS token.*data\.append_eos=false"):
        make([{"text": "a"}], without)
    assert len(make([{"text": "a b"}], without, PromptFormat(append_eos=False))) == 1


def test_vocabulary_check_names_the_token(tokenizer):
    examples = make([{"text": "hello"}], tokenizer)
    largest = examples.max_id
    assert largest == max(tokenizer.encode("hello"))
    check_vocabulary(examples, largest + 1, tokenizer)
    text = tokenizer.token(largest)
    with pytest.raises(UserError, match=rf"token id {largest} \('{text}'\) is beyond .* {largest}"):
        check_vocabulary(examples, largest, tokenizer)


def test_a_pad_beyond_the_vocabulary_matters_where_it_is_used(tokenizer_folder):
    """Llama folders often name an added pad token for which the model has no embedding."""
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    tokenizer = Tokenizer.load(tokenizer_folder(settings, name="pad"))
    examples = make([{"text": "<s></s>"}], tokenizer)
    assert (examples.max_id, tokenizer.pad_id) == (2, 4)
    check_vocabulary(examples, 3, tokenizer, padded=False)
    with pytest.raises(UserError, match=r"pad token '<\|im_end\|>' \(id 4\) .*batching=unpadded"):
        check_vocabulary(examples, 3, tokenizer)


def test_a_row_that_cannot_be_encoded_is_named(tokenizer):
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: .*the tokenizer failed on a text"):
        labels.label_rows(
            [Row({"text": text}, f"rows.jsonl:{n}") for n, text in ((1, "a"), (2, "\ud800"))],
            tokenizer,
            PromptFormat(),
        )


# --- subsets and fingerprints --------------------------------------------------------------------


def test_subset(tokenizer):
    values = [{"text": "a" * n} for n in range(1, 9)]
    examples = make(values, tokenizer, max_length=6)
    subset = examples.subset([7, 2, 5])
    assert [example.index for example in subset] == [7, 2, 5]
    assert subset[0].input_ids.tolist() == examples[7].input_ids.tolist()
    assert subset.lengths.tolist() == examples.lengths[[7, 2, 5]].tolist()
    assert subset.num_targets.tolist() == examples.num_targets[[7, 2, 5]].tolist()
    assert subset.rows.tolist() == [7, 2, 5]
    assert (subset.counts.rows, subset.counts.examples, subset.counts.dropped) == (3, 3, 0)
    assert subset.counts.tokens == subset.lengths.sum()
    assert subset.counts.targets == subset.num_targets.sum()
    nested = subset.subset([1])
    assert nested[0].index == 2
    assert len({examples.fingerprint, subset.fingerprint, nested.fingerprint}) == 3
    assert examples.subset([7, 2, 5]).fingerprint == subset.fingerprint
    assert examples.subset([2, 7, 5]).fingerprint != subset.fingerprint


def test_subset_counts_what_was_cut(tokenizer):
    examples = make([{"text": LONG}, {"text": SHORT}, {"text": LONG}], tokenizer, max_length=5)
    assert examples.counts.truncated == 2
    counts = examples.subset([0, 1]).counts
    assert (counts.truncated, counts.eos_lost, counts.longest) == (1, 1, 5)


def test_position_out_of_range(tokenizer):
    examples = make([{"text": "a"}], tokenizer)
    with pytest.raises(IndexError):
        examples[1]
    assert [example.index for example in examples] == [0]


def test_fingerprint_is_of_what_training_sees(tokenizer):
    values = [{"prompt": "a b", "completion": "c d"}, {"prompt": "e", "completion": "f"}]
    first = make(values, tokenizer, COMPLETION)
    assert make(values, tokenizer, COMPLETION).fingerprint == first.fingerprint
    assert make(values, tokenizer, COMPLETION, max_length=999).fingerprint == first.fingerprint
    others = [
        make(values[::-1], tokenizer, COMPLETION),
        make(values[:1], tokenizer, COMPLETION),
        make(values, tokenizer, PromptFormat(format="completion", completion_only=False)),
        make(values, tokenizer, PromptFormat(format="completion", append_eos=False)),
        make(values, tokenizer, COMPLETION, max_length=4),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6


# --- the cache -----------------------------------------------------------------------------------

VALUES = [{"text": f"row {number} of the file"} for number in range(20)]


def write(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def load(spec: Path, tokenizer: Tokenizer, root: Path | None, **changes) -> Examples:
    settings = {
        "split_column": None,
        "split": None,
        "prompt_format": PromptFormat(),
        "max_length": 100,
        "on_overflow": "truncate",
        "cache_root": root,
    }
    return load_examples(str(spec), **(settings | {"tokenizer": tokenizer} | changes))


def never(*arguments: object, **settings: object) -> None:
    raise AssertionError("the rows are read though they are cached")


def test_a_second_start_reads_no_row(tokenizer, tmp_path, monkeypatch):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    first = load(spec, tokenizer, tmp_path / "cache")
    expected = tokenise(VALUES, tokenizer, PromptFormat(), max_length=100)
    assert ids_and_labels(first) == ids_and_labels(expected)
    assert first.fingerprint == expected.fingerprint
    monkeypatch.setattr(module, "read_rows", never)
    moved = tmp_path / "elsewhere" / "same.jsonl"
    moved.parent.mkdir()
    shutil.copy(spec, moved)
    for again in (
        load(spec, tokenizer, tmp_path / "cache"),
        load(moved, tokenizer, tmp_path / "cache"),
    ):
        assert ids_and_labels(again) == ids_and_labels(first)
        assert (again.counts, again.fingerprint) == (first.counts, first.fingerprint)
        assert isinstance(again[0].input_ids.base.base, np.memmap)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name[0] == "."] == []


def test_whatever_decides_the_examples_is_in_the_key(tokenizer, tokenizer_folder, tmp_path):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    other_tokenizer = Tokenizer.load(tokenizer_folder({"eos_token": "</s>"}, name="other"))
    changes = [
        {},
        {"max_length": 3},
        {"on_overflow": "drop"},
        {"prompt_format": PromptFormat(append_eos=False)},
        {"prompt_format": PromptFormat(system_prompt="S")},
        {"tokenizer": other_tokenizer},
    ]
    root = tmp_path / "cache"
    for number, change in enumerate(changes, start=1):
        load(spec, change.pop("tokenizer", tokenizer), root, **change)
        assert len(list(root.iterdir())) == number, change
    write(spec, [*VALUES, {"text": "one more"}])
    assert len(load(spec, tokenizer, root)) == len(VALUES) + 1


def test_splits_of_one_file_do_not_share_a_cache(tokenizer, tmp_path):
    values = [{"text": f"row {n}", "split": "train" if n % 2 else "test"} for n in range(10)]
    spec = write(tmp_path / "rows.jsonl", values)
    for split in ("train", "test"):
        for _ in range(2):
            examples = load(spec, tokenizer, tmp_path / "cache", split_column="split", split=split)
            expected = [value["text"] for value in values if value["split"] == split]
            assert [tokenizer.decode(example.input_ids) for example in examples] == expected


def test_a_tree_of_source_files(tokenizer, tmp_path):
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "one.py").write_text("import one\n")
    (tree / "below" / "two.py").write_text("import two\n")
    examples = load(tree, tokenizer, tmp_path / "cache")
    texts = {tokenizer.decode(example.input_ids) for example in examples}
    assert texts == {"import one\n", "import two\n"}
    (tree / "one.py").write_text("import changed\n")
    texts = {tokenizer.decode(e.input_ids) for e in load(tree, tokenizer, tmp_path / "cache")}
    assert texts == {"import changed\n", "import two\n"}


@pytest.mark.parametrize(
    "name", ["input_ids", "labels", "offsets", "targets", "rows", "prompts", "flags"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_cache_is_made_anew(tokenizer, tmp_path, name, damage):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    first = ids_and_labels(load(spec, tokenizer, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    path = folder / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    match damage:
        case "flip":
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case _:
            path.unlink()
    assert ids_and_labels(load(spec, tokenizer, tmp_path / "cache")) == first
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_changed_count_is_noticed(tokenizer, tmp_path):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    first = load(spec, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    for name in meta["counts"]:
        changed = {**meta, "counts": {**meta["counts"], name: meta["counts"][name] + 1}}
        (folder / "meta.json").write_text(json.dumps(changed))
        assert load(spec, tokenizer, tmp_path / "cache").counts == first.counts


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"fingerprint": 3, "counts": {}}'])
def test_a_damaged_description_is_made_anew(tokenizer, tmp_path, meta):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    load(spec, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "meta.json").write_text(meta)
    assert len(load(spec, tokenizer, tmp_path / "cache")) == len(VALUES)
    assert json.loads((folder / "meta.json").read_text())["counts"]["rows"] == len(VALUES)


def test_processes_may_build_at_once(tokenizer, tmp_path):
    spec = write(tmp_path / "rows.jsonl", VALUES * 20)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: load(spec, tokenizer, tmp_path / "cache"), range(8)))
    assert len({examples.fingerprint for examples in results}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_interrupted_build_leaves_nothing(tokenizer, tmp_path):
    spec = write(tmp_path / "rows.jsonl", [*VALUES, {"no text": 1}])
    with pytest.raises(UserError, match=r"rows\.jsonl:21"):
        load(spec, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_what_to_do(tokenizer, tmp_path):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"tokenised data cannot be kept there .*LATHE_CACHE"):
        load(spec, tokenizer, tmp_path / "file" / "cache")


def test_without_a_cache_nothing_is_written(tokenizer, tmp_path):
    spec = write(tmp_path / "rows.jsonl", VALUES)
    before = sorted(tmp_path.rglob("*"))
    assert len(load(spec, tokenizer, None)) == len(VALUES)
    assert sorted(tmp_path.rglob("*")) == before


def test_cache_root(monkeypatch):
    monkeypatch.setenv("LATHE_CACHE", "/a")
    assert cache_root() == Path("/a/examples")
    monkeypatch.delenv("LATHE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/b/lathe/examples")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_root() == Path("/c/.cache/lathe/examples")


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_prompt_s_length_is_known_trained_or_not(tokenizer, completion_only):
    form = replace(COMPLETION, completion_only=completion_only)
    (example,) = make([{"prompt": "ab ", "completion": "cd"}], tokenizer, form)
    prompt = tokenizer.encode("ab ")
    assert example.prompt_length == len(common_prefix_of(prompt, example.input_ids.tolist()))
    assert example.prompt_length > 0
    assert (example.labels[1] == -100) == completion_only


def common_prefix_of(first: list[int], second: list[int]) -> list[int]:
    return [a for a, b in zip(first, second, strict=False) if a == b]


def test_a_text_has_no_prompt(tokenizer):
    (example,) = make([{"text": "abcd"}], tokenizer, PromptFormat())
    assert example.prompt_length == 0
