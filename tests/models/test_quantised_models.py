"""Decoders with quantised weights against transformers with bitsandbytes, and what they keep."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_model

from files.errors import UserError
from files.tensors import TensorFile, write_tensors
from kernels import quantised as format_
from kernels.quantised import KINDS, QuantisedWeight
from kernels.segments import Segments
from lora import LoraConfig, inject
from models import load_model
from models.layers import CausalLM
from models.quantised import dequantise, quantisable
from models.recompute import POLICIES
from models.weights import save_model

# Rows of a multiple of 64 numbers: elsewhere bitsandbytes' kernel for AVX-512 takes wrong absmax.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
ORACLES = ("llama", "qwen2", "starcoder2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in ORACLES:
        made[family] = tmp_path_factory.mktemp(family)
        model = small_model(family, **SIZES)
        save_model(model, made[family], config=model.config)
    return made


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("transformers")


def told_by_transformers(transformers: Any, folder: Path, **options: Any) -> Any:
    """Return transformers' model with bitsandbytes' weights."""
    given: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if options:
        given["quantization_config"] = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **given)


NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


def some_ids() -> torch.Tensor:
    return torch.randint(1, 96, (3, 17), generator=torch.Generator().manual_seed(2))


def quantised_weights(model: torch.nn.Module) -> dict[str, QuantisedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedWeight)}


@pytest.mark.parametrize("family", ORACLES)
def test_logits_are_those_of_transformers_with_bitsandbytes(
    folders: dict[str, Path], transformers: Any, family: str
) -> None:
    theirs = told_by_transformers(transformers, folders[family], **NF4)
    ours = load_model(folders[family], quantization="nf4")
    found = quantised_weights(ours)
    assert len(found) == 2 * (6 if family == "starcoder2" else 7)
    for name, weight in found.items():
        packed = theirs.get_parameter(name)
        assert torch.equal(weight.packed, packed.data.view(-1)), name
        assert torch.equal(weight.absmax, packed.quant_state.absmax), name
    theirs.train()  # in evaluation its kernels for CPUs round to bf16
    with torch.no_grad():
        expected = theirs(some_ids()).logits
        difference = (ours(some_ids()) - expected).abs().max().item()
        plain = (load_model(folders[family])(some_ids()) - expected).abs().max().item()
    assert difference <= 1e-5
    assert plain > 1e-2  # what the quantisation changes


@pytest.mark.parametrize("family", ORACLES)
def test_gradients_of_adapters_are_those_of_peft_with_bitsandbytes(
    folders: dict[str, Path], transformers: Any, family: str
) -> None:
    peft = pytest.importorskip("peft")
    base = told_by_transformers(transformers, folders[family], **NF4)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    theirs.train()
    ours = load_model(folders[family], quantization="nf4")
    inject(ours, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in ours.named_parameters():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            layer, _, factor = name.rpartition(".")
            parameter.data.copy_(value)
            theirs.get_parameter(f"base_model.model.{layer}.{factor}.default.weight").data.copy_(
                value
            )
    weigh = torch.randn(3, 17, 96, generator=generator)
    (ours(some_ids()) * weigh).sum().backward()
    (theirs(some_ids()).logits * weigh).sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            layer, _, factor = name.rpartition(".")
            other = theirs.get_parameter(f"base_model.model.{layer}.{factor}.default.weight").grad
            assert parameter.grad is not None
            away = (parameter.grad - other).abs().max() / other.abs().max()
            assert away < 2e-5, name  # sums of some hundred terms in fp32


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_computes_what_its_dequantised_weights_do(
    folders: dict[str, Path], kind: str
) -> None:
    quantised = load_model(folders["qwen2"], quantization=kind)
    plain = load_model(folders["qwen2"], quantization=kind)
    assert dequantise(plain) == kind
    assert not quantised_weights(plain)
    assert torch.equal(quantised(some_ids()), plain(some_ids()))
    names = {name for name, _ in load_model(folders["qwen2"]).named_parameters()}
    assert {name for name, _ in plain.named_parameters()} == names
    kept = {name for name, _ in quantised.named_parameters()}
    assert kept | set(quantised_weights(quantised)) == names


def test_head_embedding_norms_and_biases_stay(folders: dict[str, Path]) -> None:
    model = load_model(folders["llama"], quantization="nf4", dtype=torch.bfloat16)
    plain = dict(load_model(folders["llama"], dtype=torch.bfloat16).named_parameters())
    assert "lm_head.weight" in dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name])
    weight = next(iter(quantised_weights(model).values()))
    assert weight.dtype == torch.bfloat16


def test_the_model_is_never_whole_in_memory_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tensors there is no more than what they were packed into, and what stays."""
    from train.process.memory import allocated_bytes

    if allocated_bytes() is None:
        pytest.skip("this libc does not tell memory")
    big = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    model = small_model("llama", **big)
    save_model(model, tmp_path, config=model.config)
    whole = sum(p.nbytes for p in model.parameters())
    stays = sum(p.nbytes for n, p in model.named_parameters() if not quantisable(model, n))
    del model
    gc.collect()
    before, told = allocated_bytes(), []

    def noted(value: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        parts = format_.quantised(value, kind)
        told.append(allocated_bytes())
        return parts

    monkeypatch.setattr("models.quantised.quantised", noted)
    quantised = load_model(tmp_path, quantization="nf4")
    packed = sum(weight.nbytes() for weight in quantised_weights(quantised).values())
    assert len(told) == 6 * 7
    most = max(told) - before
    assert packed + stays < whole / 6
    assert most < packed + stays + 2**20


def losses_and_kept(model: CausalLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        segments = Segments.build([17], device="cpu")
        loss = model.hidden_states(some_ids()[0], segments).square().sum()
    return loss, kept


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_what_is_kept_for_the_backward_pass_is_never_a_dequantised_weight(
    folders: dict[str, Path], targets: Any
) -> None:
    model = load_model(folders["llama"], quantization="nf4")
    inject(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    shapes = {tuple(weight.shape) for weight in quantised_weights(model).values()}
    loss, kept = losses_and_kept(model)
    assert not [tensor.shape for tensor in kept if tuple(tensor.shape) in shapes]
    loss.backward()
    quantised = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # The same gradients as of the plain weights that they stand for, which are kept.
    plain = load_model(folders["llama"], quantization="nf4")
    dequantise(plain)
    inject(plain, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    loss, kept = losses_and_kept(plain)
    assert [tensor.shape for tensor in kept if tuple(tensor.shape) in shapes]
    loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.equal(quantised[name], parameter.grad), name


def test_a_model_that_computes_again_has_the_same_gradients(folders: dict[str, Path]) -> None:
    grads = []
    for policy in POLICIES:
        model = load_model(folders["starcoder2"], quantization="nf4")
        model.gradient_checkpointing = policy
        inject(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0))
        losses_and_kept(model)[0].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        assert all(map(torch.equal, grads[0], other))


def test_an_unknown_kind_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"model.quantization: 'nf5' is not one of nf4, int8, or none"
    ):
        load_model(folders["llama"], quantization="nf5")


def test_numbers_that_fp16_has_not_are_no_int8(tmp_path: Path) -> None:
    model = small_model("llama", **SIZES)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = 1e5
    save_model(model, tmp_path, config=model.config)
    load_model(tmp_path, quantization="nf4")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight: holds numbers beyond 65504"):
        load_model(tmp_path, quantization="int8")


# -- folders that bitsandbytes wrote ---------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(
    folders: dict[str, Path], transformers: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return folders of a Llama that transformers and bitsandbytes quantised, by kind."""
    kinds = {
        "nf4": NF4,
        "nf4, absmax as they are": {**NF4, "bnb_4bit_use_double_quant": False},
        "nf4, stored as bf16": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
        "int8": {"load_in_8bit": True},
        "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"},
    }
    made = {}
    for name, options in kinds.items():
        made[name] = tmp_path_factory.mktemp("stored")
        told_by_transformers(transformers, folders["llama"], **options).save_pretrained(made[name])
    return made


def test_a_folder_that_bitsandbytes_quantised_is_the_model_that_it_was_made_of(
    folders: dict[str, Path], stored: dict[str, Path]
) -> None:
    for name in ("nf4", "nf4, stored as bf16", "int8"):
        kind = name.partition(",")[0]
        ours, again = load_model(folders["llama"], quantization=kind), load_model(stored[name])
        for one, other in zip(
            quantised_weights(ours).values(), quantised_weights(again).values(), strict=True
        ):
            parts, others = dict(one.named_buffers()), dict(other.named_buffers())
            assert parts.keys() == others.keys()
            assert all(torch.equal(parts[part], others[part]) for part in parts)
        assert torch.equal(ours(some_ids()), again(some_ids()))
        assert again.config.quantization == kind
        load_model(stored[name], quantization=kind)


def test_absmax_that_were_not_quantised_again_are_read_too(
    transformers: Any, stored: dict[str, Path]
) -> None:
    folder = stored["nf4, absmax as they are"]
    theirs = told_by_transformers(transformers, folder)
    theirs.train()
    ours = load_model(folder)
    with torch.no_grad():
        assert (ours(some_ids()) - theirs(some_ids()).logits).abs().max() <= 1e-5


def test_what_is_quantised_otherwise_is_refused(stored: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="quantised as fp4, which is not supported; use the model's"
    ):
        load_model(stored["fp4"])
    with pytest.raises(UserError, match=r"are nf4 already; use model.quantization=nf4"):
        load_model(stored["nf4"], quantization="int8")
    for settings, told in (
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ("nf4", "must be an object or null"),
    ):
        shutil.copytree(stored["nf4"], tmp_path, dirs_exist_ok=True)
        document = json.loads((tmp_path / "config.json").read_text())
        document["quantization_config"] = settings
        (tmp_path / "config.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match=told):
            load_model(tmp_path)


LAYER = "model.layers.1.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def changed_state(tensors: dict[str, torch.Tensor], **values: Any) -> None:
    state = json.loads(bytes(tensors[STATE].tolist()))
    tensors[STATE] = torch.tensor(list(json.dumps(state | values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("nf4", lambda t: t.pop(f"{LAYER}.weight.nested_absmax"), "its nested_absmax is not"),
        ("nf4", lambda t: t.pop(f"{LAYER}.weight.absmax"), "its absmax is not there"),
        ("nf4", lambda t: t[f"{LAYER}.weight.quant_map"].zero_(), "its quant_map is not that of"),
        ("nf4", lambda t: changed_state(t, blocksize=128), "its blocksize is 128, and must be 64"),
        ("nf4", lambda t: changed_state(t, shape=[64, 192]), "its shape is"),
        ("nf4", lambda t: changed_state(t, nested_offset="NaN"), "its nested_offset is NaN"),
        ("nf4", lambda t: changed_state(t, nested_offset=True), "its nested_offset is True"),
        ("nf4", lambda t: changed_state(t, nested_offset=10**400), "its nested_offset is 1000"),
        ("nf4", lambda t: changed_state(t, nested_offset=1e39), "its nested_offset is 1e.39"),
        ("nf4", lambda t: t.update({STATE: t[STATE][None]}), "its quant_state is no row of bytes"),
        ("nf4", lambda t: t.update({STATE: t[STATE].float()}), "its quant_state is no row of byte"),
        (
            "nf4",
            lambda t: t.update({STATE: t[STATE][:9]}),
            r"model.safetensors: .*not JSON at line",
        ),
        ("nf4", lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][1:]}), "bytes, of 192"),
        ("nf4", lambda t: t.pop(f"{LAYER}.weight"), "it has 0 bytes, of 192"),
        ("int8", lambda t: t.update({f"{LAYER}.weight_format": torch.ones(2)}), "is one of old"),
        ("int8", lambda t: t.update({f"{LAYER}.SCB": t[f"{LAYER}.SCB"][None]}), "SCB is not one"),
        ("int8", lambda t: t[f"{LAYER}.weight_format"].fill_(2), "its weight_format is one of old"),
        ("int8", lambda t: t.update({f"{LAYER}.SCB": torch.ones(7)}), "its SCB is not one fp32"),
        ("int8", lambda t: t.pop(f"{LAYER}.weight"), "it is not there, or not 192 × 64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    stored: dict[str, Path], tmp_path: Path, kind: str, change: Any, told: str
) -> None:
    shutil.copytree(stored[kind], tmp_path, dirs_exist_ok=True)
    with TensorFile(tmp_path / "model.safetensors") as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    change(tensors)
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match=told):
        load_model(tmp_path)


def test_a_map_of_the_absmax_of_its_own_is_kept(stored: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stored["nf4"], tmp_path, dirs_exist_ok=True)
    with TensorFile(tmp_path / "model.safetensors") as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    tensors[f"{LAYER}.weight.nested_quant_map"] *= 0.5
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tmp_path / "model.safetensors", tensors)
    weight = quantised_weights(load_model(tmp_path))[f"{LAYER}.weight"]
    usual = quantised_weights(load_model(stored["nf4"]))[f"{LAYER}.weight"]
    assert weight.nested_map is not None and usual.nested_map is None
    offset = usual.nested_offset
    half = format_.scales(weight) - offset
    torch.testing.assert_close(2 * half, format_.scales(usual) - offset, rtol=1e-5, atol=1e-6)
