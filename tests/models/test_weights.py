"""Model folders in and out: transformers is the oracle both ways; every bad folder is named."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import python
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from files.errors import UserError
from files.tensors import read_header
from models import build, load_model
from models.config import parse_config, read_config
from models.families import FAMILIES
from models.weights import fill, initialise, save_model, weights_files

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# fp32, two layers: sums of at most 61 products per output differ by rounding order alone, so the
# logits agree within some tens of units in the last place (2^-24 relative to their size).
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def folder_from_transformers(
    folder: Path, family: str, *, tied: bool, shard: str = "5GB", **keys: Any
) -> torch.nn.Module:
    """Write a folder with transformers; every parameter is random, biases and norms too."""
    config = AutoConfig.for_model(
        family,
        **{**SIZES, "head_dim": 8, "tie_word_embeddings": tied, "sliding_window": None, **keys},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def token_ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(5))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def tied_llama(tmp_path: Path) -> Path:
    folder_from_transformers(tmp_path / "model", "llama", tied=True)
    return tmp_path / "model"


@pytest.fixture
def untied_shards(tmp_path: Path) -> Path:
    folder_from_transformers(tmp_path / "model", "llama", tied=False, shard="20KB")
    return tmp_path / "model"


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index names."""
    files = set(json.loads(index.read_text())["weight_map"].values())
    return [index.parent / name for name in sorted(files)]


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_gives_its_logits_here(
    family: str, tied: bool, shard: str, tmp_path: Path
) -> None:
    oracle = folder_from_transformers(tmp_path, family, tied=tied, shard=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    model = load_model(tmp_path)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in oracle.named_parameters()}
    assert ("lm_head.weight" in names) != tied
    with torch.no_grad():
        expected = oracle(token_ids()).logits
        torch.testing.assert_close(model(token_ids()), expected, **CLOSE)


@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_gives_our_logits_in_transformers(
    family: str, tied: bool, shard: int, tmp_path: Path
) -> None:
    folder_from_transformers(tmp_path / "theirs", family, tied=tied)
    ours = load_model(tmp_path / "theirs")
    saved = tmp_path / "deep" / "ours"
    hashes = save_model(ours, saved, config=ours.config, max_shard_bytes=shard)
    if shard == 10**9:
        assert hashes.keys() == {"model.safetensors"}
        assert ("lm_head.weight" in load_file(saved / "model.safetensors")) != tied
    else:
        _check_shards(saved, hashes, shard)
    loaded, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids()).logits, ours(token_ids()), **CLOSE)
        assert torch.equal(load_model(saved)(token_ids()), ours(token_ids()))


def _check_shards(folder: Path, hashes: dict[str, str], shard: int) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    count = len(hashes)
    assert count > 1
    assert sorted(hashes) == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    sizes = []
    for name in sorted(hashes):
        tensors = read_header(folder / name).tensors
        size = sum(info.num_bytes for info in tensors.values())
        assert size <= shard or len(tensors) == 1
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(
            tensors
        )
        sizes.append(size)
    assert index["metadata"]["total_size"] == sum(sizes)
    # Filled as far as they go: no two neighbours would have fitted into one file.
    assert all(one + other > shard for one, other in itertools.pairwise(sizes))


DIALECTS = [
    ("llama", {"rope_type": "linear", "factor": 2.0}),
    (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ("starcoder2", {"rope_type": "dynamic", "factor": 2.0}),
    ("starcoder2", None),
]


@pytest.mark.parametrize("dialect", ["old", "new"])
@pytest.mark.parametrize(("family", "scaling"), DIALECTS)
def test_config_json_written_from_either_dialect_is_read_alike_by_everybody(
    family: str, scaling: dict[str, Any] | None, dialect: str, tmp_path: Path
) -> None:
    raw = {**SIZES, "model_type": family, "torch_dtype": "float16", "auto_map": {"A": "b.C"}}
    if dialect == "old":
        raw["rope_scaling"] = scaling
    else:
        theta = raw.pop("rope_theta")
        raw["rope_parameters"] = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
        raw["dtype"] = raw.pop("torch_dtype")
    config = parse_config(raw, "x")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    oracle = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    save_model(dict(oracle.named_parameters()), tmp_path, config=config, dtype=torch.bfloat16)

    again = read_config(tmp_path)
    assert again.torch_dtype == "bfloat16"
    assert (again.rope_theta, again.rope) == (config.rope_theta, config.rope)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["torch_dtype"] == document["dtype"] == "bfloat16"
    assert document["rope_theta"] == 5000.0
    assert document["architectures"] == [type(oracle).__name__]
    assert "auto_map" not in document
    # transformers 4 knows this key alone.
    assert bool(document.get("rope_scaling")) == (scaling is not None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path)(token_ids()), loaded.float()(token_ids()).logits, **CLOSE
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_parameter_is_converted_and_owns_its_memory(
    dtype: torch.dtype, tied_llama: Path
) -> None:
    path = tied_llama / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}
    model = load_model(tied_llama, dtype=dtype)
    # Overwritten in place: a parameter that were a view of the mapped file would change with it.
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, stored[name].to(dtype)), name


def test_filling_a_model_that_has_memory_keeps_its_tensors(tied_llama: Path) -> None:
    model = load_model(tied_llama)
    parameters = dict(model.named_parameters())
    expected = {name: value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    fill(model, tied_llama)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, expected[name])


def test_saving_only_fits_the_whole_model_and_an_empty_folder(
    tied_llama: Path, tmp_path: Path
) -> None:
    model = load_model(tied_llama)
    state = dict(model.named_parameters())
    state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        save_model(state, tmp_path / "out", config=model.config)
    state["model.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \[3\], not \[32\]"):
        save_model(state, tmp_path / "out", config=model.config)
    with pytest.raises(UserError, match=r"already holds other weights \(model\.safetensors\)"):
        save_model(model, tied_llama, config=model.config, max_shard_bytes=20_000)
    save_model(model, tied_llama, config=model.config)


# --- random starting weights --------------------------------------------------------------------


def test_starting_weights_depend_on_seed_and_name_alone(tied_llama: Path) -> None:
    one, other, third = (load_model(tied_llama) for _ in range(3))
    initialise(one, 42, initializer_range=0.02)
    initialise(other, 42, initializer_range=0.02)
    initialise(third, 43, initializer_range=0.02)
    values = dict(one.named_parameters())
    for name, value in other.named_parameters():
        assert torch.equal(value, values[name])
    different = dict(third.named_parameters())
    matrices = [name for name, value in values.items() if value.ndim == 2]
    assert all(not torch.equal(values[name], different[name]) for name in matrices)
    assert not torch.equal(
        values["model.layers.0.self_attn.q_proj.weight"],
        values["model.layers.1.self_attn.q_proj.weight"],
    )


def test_starting_weights_follow_the_law_and_the_dtype(tmp_path: Path) -> None:
    folder_from_transformers(tmp_path, "starcoder2", tied=True)
    model = load_model(tmp_path, dtype=torch.float64)
    initialise(model, 1, initializer_range=0.03)
    drawn = torch.cat([p.flatten() for p in model.parameters() if p.ndim == 2])
    # Standard error of a standard deviation over n draws is sigma / sqrt(2 n); five of them.
    assert abs(drawn.std().item() - 0.03) < 5 * 0.03 / (2 * drawn.numel()) ** 0.5
    assert abs(drawn.mean().item()) < 5 * 0.03 / drawn.numel() ** 0.5
    for name, value in model.named_parameters():
        if value.ndim == 1:
            expected = 0.0 if name.endswith(".bias") else 1.0
            assert torch.equal(value, torch.full_like(value, expected)), name


# --- bad folders --------------------------------------------------------------------------------


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_all_missing_and_unexpected_names_and_shapes_come_at_once(tied_llama: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.extra.weight"] = torch.ones(2)
        tensors["another"] = torch.ones(2)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(16, 31)

    edit_tensors(tied_llama, change)
    refused(
        tied_llama,
        "missing are model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "unexpected are another, model.extra.weight",
        "model.layers.0.self_attn.k_proj.weight is [16, 31] in model.safetensors, but config.json "
        "makes it [16, 32]",
    )


def test_a_vocabulary_that_differs_from_the_weights(tied_llama: Path) -> None:
    edit_json(tied_llama / "config.json", lambda document: document.update(vocab_size=50))
    refused(tied_llama, "model.embed_tokens.weight is [61, 32]", "config.json makes it [50, 32]")


def test_a_size_beyond_all_memory_is_refused_before_anything_is_allocated(tied_llama: Path) -> None:
    edit_json(
        tied_llama / "config.json",
        lambda document: document.update(vocab_size=2**24, hidden_size=2**20, head_dim=8),
    )
    refused(tied_llama, "config.json makes it [16777216, 1048576]")


def test_quantised_weights(tied_llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tied_llama, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(tied_llama, name, "torch.int8", "quantised")


def test_a_stray_head_is_accepted_where_it_is_the_embedding_once_more(tied_llama: Path) -> None:
    embedding = load_file(tied_llama / "model.safetensors")["model.embed_tokens.weight"]
    expected = load_model(tied_llama)(token_ids())
    edit_tensors(tied_llama, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_model(tied_llama)(token_ids()), expected)
    different = embedding.clone()
    different[60, 31] += 0.01
    edit_tensors(tied_llama, lambda tensors: tensors.update({"lm_head.weight": different}))
    refused(tied_llama, "lm_head.weight that differs", "tie_word_embeddings")
    edit_tensors(tied_llama, lambda tensors: tensors.update({"lm_head.weight": embedding[:60]}))
    refused(tied_llama, "lm_head.weight that differs")


def test_an_untied_model_without_a_head(tied_llama: Path) -> None:
    edit_json(
        tied_llama / "config.json", lambda document: document.update(tie_word_embeddings=False)
    )
    refused(tied_llama, "missing are lm_head.weight", "tie_word_embeddings true")


def test_the_index_decides_which_files_are_read_and_the_files_what_is_in_them(
    untied_shards: Path,
) -> None:
    index = untied_shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = list(weight_map.values())
    shared = next(name for name, file in weight_map.items() if files.count(file) > 1)
    edit_json(index, lambda document: document["weight_map"].pop(shared))
    load_model(untied_shards)
    edit_json(index, lambda document: document["weight_map"].update(ghost="x.safetensors"))
    refused(untied_shards, "x.safetensors is missing")


@pytest.mark.parametrize("stray", ["model.safetensors", "consolidated.safetensors", "a.bin"])
def test_the_files_of_an_index_may_have_any_name(stray: str, untied_shards: Path) -> None:
    expected = load_model(untied_shards)(token_ids())
    index = untied_shards / "model.safetensors.index.json"
    names = {path.name: f"pytorch_part-{i}.safetensors" for i, path in enumerate(shards_of(index))}
    for old, new in names.items():
        (untied_shards / old).rename(untied_shards / new)
    edit_json(
        index,
        lambda document: document.update(
            weight_map={name: names[file] for name, file in document["weight_map"].items()}
        ),
    )
    theirs = AutoModelForCausalLM.from_pretrained(untied_shards, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(theirs(token_ids()).logits, expected, **CLOSE)
    save_file({"model.norm.weight": torch.zeros(32)}, untied_shards / stray)
    assert torch.equal(load_model(untied_shards)(token_ids()), expected)
    assert {path.name for path in weights_files(untied_shards)} == set(names.values())


def test_one_file_needs_no_index_whatever_its_name(tied_llama: Path) -> None:
    expected = load_model(tied_llama)(token_ids())
    (tied_llama / "model.safetensors").rename(tied_llama / "weights.safetensors")
    assert torch.equal(load_model(tied_llama)(token_ids()), expected)
    save_file({"a": torch.ones(1)}, tied_llama / "other.safetensors")
    refused(tied_llama, "has other.safetensors, weights.safetensors but no model.safetensors.index")


def test_one_file_rules_over_an_index_whose_files_are_gone(untied_shards: Path) -> None:
    expected = load_model(untied_shards)(token_ids())
    shards = shards_of(untied_shards / "model.safetensors.index.json")
    joined = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    save_file(joined, untied_shards / "model.safetensors", {"format": "pt"})
    for path in shards:
        path.unlink()
    assert torch.equal(load_model(untied_shards)(token_ids()), expected)


def test_old_rotary_buffers_are_ignored(tied_llama: Path) -> None:
    edit_tensors(
        tied_llama,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    load_model(tied_llama)


@pytest.mark.parametrize(
    "file_name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "",
        "model.safetensors\n",
        5,
    ],
)
def test_an_index_may_name_plain_files_only(file_name: Any, untied_shards: Path) -> None:
    edit_json(
        untied_shards / "model.safetensors.index.json",
        lambda document: document["weight_map"].update({"model.norm.weight": file_name}),
    )
    refused(untied_shards, "model.safetensors.index.json", "plain *.safetensors file name")


def test_an_index_that_misplaces_or_lacks_its_map(untied_shards: Path) -> None:
    index = untied_shards / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    files = sorted(set(whole["weight_map"].values()))
    wrong = next(file for file in files if file != whole["weight_map"]["model.norm.weight"])
    edit_json(index, lambda document: document["weight_map"].update({"model.norm.weight": wrong}))
    refused(untied_shards, "not in the files it gives for them: model.norm.weight")
    index.write_text(json.dumps({"metadata": {}}))
    refused(untied_shards, "weight_map must map")
    index.write_text("{")
    refused(untied_shards, "index.json: not JSON")


def test_a_missing_shard_and_a_tensor_in_two(untied_shards: Path) -> None:
    shards = sorted(untied_shards.glob("model-*.safetensors"))
    content = shards[0].read_bytes()
    both = {**load_file(shards[0]), **load_file(shards[1])}
    save_file(both, shards[0], {"format": "pt"})
    refused(untied_shards, "stands in two files", shards[0].name, shards[1].name)
    shards[0].write_bytes(content)
    shards[1].unlink()
    refused(untied_shards, f"{shards[1].name} is missing")


def test_links_lead_nowhere_but_to_the_hub_caches_blobs(tied_llama: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    (tied_llama / "model.safetensors").rename(elsewhere)
    (tied_llama / "model.safetensors").symlink_to(elsewhere)
    refused(tied_llama, "is a link out of the model folder", str(elsewhere))

    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / ("f" * 64)
    blob.parent.mkdir()
    elsewhere.rename(blob)
    (snapshot / "config.json").write_bytes((tied_llama / "config.json").read_bytes())
    (snapshot / "model.safetensors").symlink_to(Path("..") / ".." / "blobs" / blob.name)
    load_model(snapshot)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "pytorch_model.bin",
            ("only pickle weights found", "pytorch_model.bin", "convert to safetensors"),
        ),
        ("consolidated.00.pth", ("consolidated.00.pth", "-hf")),
        ("adapter_model.safetensors", ("holds an adapter", "lora.init_from")),
        ("readme.txt", ("holds no weights", "model.random_init=true")),
    ],
)
def test_a_folder_without_safetensors_weights(
    name: str, parts: tuple[str, ...], tied_llama: Path
) -> None:
    model = load_model(tied_llama)
    (tied_llama / "model.safetensors").rename(tied_llama / name)
    with pytest.raises(UserError) as caught:
        fill(model, tied_llama)
    message = str(caught.value)
    assert str(tied_llama) in message
    assert all(part in message for part in parts), message
    with pytest.raises(UserError):
        load_model(tied_llama)


def test_a_damaged_file_is_named(tied_llama: Path) -> None:
    path = tied_llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tied_llama, "model.safetensors", "it is cut off", "fetch the file again")


# --- memory -------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import gc, sys, torch
from models import load_model

def peak():
    # Not getrusage, whose figure a child inherits from its parent.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

load_model(sys.argv[1])
gc.collect()
before = peak()
model = load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_never_holds_more_than_the_model_and_one_shard(
    tied_llama: Path, tmp_path: Path
) -> None:
    raw = {
        **SIZES,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
    }
    config = parse_config(raw, "x")
    model = build(config, device="cpu")
    folder = tmp_path / "large"
    shard = 12 * 2**20
    save_model(model, folder, config=config, max_shard_bytes=shard)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count * 4 > 7 * shard
    del model
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        output = python("-c", MEMORY_SCRIPT, str(tied_llama), str(folder), dtype).stdout
        # Measured against the peak of loading a tiny model, so that code and libraries cancel;
        # keeping every file mapped or read would add more than seven shards.
        growth = int(output)
        assert count * width * 0.9 < growth < count * width + shard, (dtype, growth)
