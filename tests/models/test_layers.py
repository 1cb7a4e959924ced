"""What the decoders promise beyond the right logits: layout, cache, recomputation, dropout.

fp64 tolerance 1e-11: layouts change only the order of sums of a few hundred terms, whose rounding
is 1.1e-16, and three layers magnify it a little. Where the arithmetic is the same, so are the bits.
"""

from typing import Any

import pytest
import torch

from files.errors import UserError
from kernels import linears
from kernels.dropout import keep_mask
from kernels.segments import Segments
from lora import LoraConfig, inject, lora_layers
from models import build
from models.cache import KeyValueCache
from models.config import DecoderConfig, parse_config
from models.layers import CausalLM, Dropout, set_dropout
from models.rotary import rotary_tables

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
LENGTHS = (9, 4, 13, 4)
EXAMPLES = (5, 17, 2, 300)

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_dropout": 0.2},
    "mistral": {"model_type": "mistral", "attention_dropout": 0.2, "sliding_window": 6},
    "qwen2": {
        "model_type": "qwen2",
        "attention_dropout": 0.2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "attention_dropout": 0.2,
        "head_dim": 10,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "starcoder2": {
        "model_type": "starcoder2",
        "attention_dropout": 0.2,
        "residual_dropout": 0.3,
        "embedding_dropout": 0.1,
        "sliding_window": 6,
    },
}


def config_of(family: str, **options: Any) -> DecoderConfig:
    return parse_config({**SIZES, **FAMILIES[family], **options}, "test")


def model_of(family: str, attention: str = "auto", **options: Any) -> CausalLM:
    model = build(config_of(family, **options), attention=attention, device="cpu").double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            wide = parameter.ndim == 2
            parameter.copy_(noise * parameter.shape[1] ** -0.5 if wide else 1 + 0.3 * noise)
    return model


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 53, (length,), generator=generator) for length in LENGTHS]


def flat() -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.cat(documents()), {"lengths": LENGTHS, "examples": EXAMPLES}


def padded(length: int) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """Return ids, layout, and which rows are real; pads are token 1."""
    ids = torch.ones(len(LENGTHS), length, dtype=torch.int64)
    real = torch.zeros(len(LENGTHS), length, dtype=torch.bool)
    for row, document in enumerate(documents()):
        ids[row, : len(document)] = document
        real[row, : len(document)] = True
    layout = {"lengths": LENGTHS, "examples": EXAMPLES, "padded_length": length}
    return ids.flatten(), layout, real.flatten()


def run(model: CausalLM, ids: torch.Tensor, draw: tuple[int, int] | None, **layout: Any):
    return model.hidden_states(ids, Segments.build(device="cpu", draw=draw, **layout))


# --- layout ---


@pytest.mark.parametrize("draw", [None, (42, 7)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flat_alone_and_padded_are_the_same(family, attention, draw):
    model = model_of(family, attention)
    ids, layout = flat()
    together = run(model, ids, draw, **layout)
    alone = [
        run(model, document, draw, lengths=[len(document)], examples=[example])
        for document, example in zip(documents(), EXAMPLES, strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), together, **EXACT)
    for length in (13, 20):
        padded_ids, padded_layout, real = padded(length)
        torch.testing.assert_close(
            run(model, padded_ids, draw, **padded_layout)[real], together, **EXACT
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_the_layout(family):
    model = model_of(family)
    weights = torch.randn(sum(LENGTHS), 24, generator=torch.Generator().manual_seed(3)).double()

    def gradients(hidden: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((hidden * weights).sum(), parameters))

    parameters = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    ids, layout = flat()
    padded_ids, padded_layout, real = padded(16)
    expected = gradients(run(model, ids, (42, 7), **layout))
    actual = gradients(run(model, padded_ids, (42, 7), **padded_layout)[real])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_dynamic_rope_follows_each_document_s_own_real_length():
    rope = {"rope_type": "dynamic", "factor": 2.0}
    model = model_of("llama", max_position_embeddings=8, rope_scaling=rope)
    ids, layout = flat()
    together = run(model, ids, None, **layout)
    alone = [run(model, document, None, lengths=[len(document)]) for document in documents()]
    torch.testing.assert_close(torch.cat(alone), together, **EXACT)
    padded_ids, padded_layout, real = padded(30)
    torch.testing.assert_close(
        run(model, padded_ids, None, **padded_layout)[real], together, **EXACT
    )


def test_forward_gives_logits_of_a_rectangle_of_tokens():
    model = model_of("qwen2")
    ids = torch.stack([documents()[1], documents()[3]])
    logits = model(ids)
    assert logits.shape == (2, 4, 53)
    hidden = run(model, ids[1], None, lengths=[4])
    torch.testing.assert_close(logits[1], hidden @ model.head_weight().T, **EXACT)


# --- cache and recomputation ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_equals_the_full_pass(family, attention):
    model = model_of(family, attention)
    ids = torch.cat(documents())[:20]
    expected = run(model, ids, None, lengths=[20])
    cache = KeyValueCache(20)
    pieces = []
    for part in ids.split([7, 3] + [1] * 10):
        segments = Segments.build([len(part)], device="cpu", offset=cache.length)
        pieces.append(model.hidden_states(part, segments, cache))
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(pieces), expected, **EXACT)
    with pytest.raises(ValueError, match="capacity of 20"):
        model.hidden_states(ids[:1], Segments.build([1], device="cpu", offset=20), cache)


@pytest.mark.parametrize("draw", [None, (42, 7)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(family, draw):
    model = model_of(family).float()
    ids, layout = flat()

    def gradients() -> list[torch.Tensor]:
        hidden = run(model, ids, draw, **layout)
        parameters = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
        return list(torch.autograd.grad(hidden.square().sum(), parameters))

    expected = gradients()
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing = "layers"
    actual = gradients()
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_making_the_inputs_of_linears_again_changes_no_bit(family, monkeypatch):
    """Off a CPU they are not kept: neither the norms' outputs nor the activation's."""
    model = model_of(family, attention_dropout=0.0)
    inject(model, LoraConfig(r=4, lora_dropout=0.2), seed=1)
    parameters = {p.data_ptr() for p in model.parameters()}
    ids, layout = flat()

    def step() -> tuple[list[torch.Tensor], int]:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = run(model, ids, (42, 7), **layout)
        adapters = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(hidden.square().sum(), adapters)), sum(kept.values())

    expected, all_kept = step()
    monkeypatch.setattr(linears, "keeps_inputs", lambda device: False)
    actual, kept = step()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    # The first norm of all has no backward pass: its input is kept in the place of its output.
    assert all_kept - kept == sum(LENGTHS) * (5 * 24 + 3 * 40) * 8


# --- dropout ---


def test_the_three_dropouts_act_exactly_where_there_is_a_draw():
    ids, layout = flat()
    plain = run(model_of("starcoder2"), ids, None, **layout)
    none: dict[str, Any] = {
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    }
    for name in none:
        model = model_of("starcoder2", **{**none, name: 0.3})
        for mode in (model.train, model.eval):
            mode()
            assert torch.equal(run(model, ids, None, **layout), plain)
            assert (run(model, ids, (42, 7), **layout) - plain).abs().max() > 1e-3, name
    assert torch.equal(run(model_of("starcoder2", **none), ids, (42, 7), **layout), plain)


def test_dropouts_stand_where_the_architecture_has_them():
    """On the embedding, and on what o_proj and c_proj add to the residual stream."""
    model = model_of("starcoder2", attention_dropout=0.0)
    layer: Any = model.model.layers[1]
    seen: dict[str, torch.Tensor] = {}
    layers: Any = model.model.layers
    layers[0].register_forward_pre_hook(lambda _, args: seen.update(embedded=args[0].x))

    def watch(norm: Any, name: str) -> None:
        add = norm.add

        def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            total, normed = add(*args)
            seen[name] = total
            return total, normed

        norm.add = watched

    watch(layer.input_layernorm, "before")
    layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(attended=out))
    watch(layer.post_attention_layernorm, "between")
    layer.mlp.register_forward_hook(lambda _, args, out: seen.update(transformed=out))
    watch(layers[2].input_layernorm, "after")
    ids, layout = flat()
    segments = Segments.build(device="cpu", draw=(42, 7), **layout)
    model.hidden_states(ids, segments)
    rows = segments.dropout_rows
    assert rows is not None

    def dropped(x: torch.Tensor, place: Dropout) -> torch.Tensor:
        return x * keep_mask(rows, place.id, 24, place.p) * (1 / (1 - place.p))

    places: Any = model
    embedding = model.model.embed_tokens(ids)
    torch.testing.assert_close(seen["embedded"], dropped(embedding, places.embedding_dropout))
    attention = dropped(seen["attended"], layer.attention_residual)
    torch.testing.assert_close(seen["between"], seen["before"] + attention)
    mlp = dropped(seen["transformed"], layer.mlp_residual)
    torch.testing.assert_close(seen["after"], seen["between"] + mlp)


@pytest.mark.parametrize(
    ("family", "count"), [(family, 10 if family == "starcoder2" else 3) for family in FAMILIES]
)
def test_set_dropout_reaches_every_place_that_the_architecture_has(family, count):
    model = model_of(family)
    set_dropout(model, 0.7)
    places = [module for module in model.modules() if isinstance(module, Dropout)]
    assert [place.p for place in places] == [0.7] * count
    assert len({place.id for place in places}) == count  # no two places share a mask
    set_dropout(model, 0.0)
    ids, layout = flat()
    plain = run(model, ids, None, **layout)
    assert torch.equal(run(model, ids, (42, 7), **layout), plain)


def test_set_dropout_leaves_adapters_their_own():
    model = model_of("starcoder2")
    inject(model, LoraConfig(lora_dropout=0.2))
    set_dropout(model, 0.0)
    assert {layer.operands().dropout for layer in lora_layers(model).values()} == {0.2}


# --- building ---


def test_building_on_meta_takes_no_memory_and_holds_parameters_alone():
    model = build(config_of("starcoder2"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not list(model.buffers())
    assert not hasattr(model, "lm_head")
    assert model.head_weight() is model.model.embed_tokens.weight


def test_an_unknown_attention_is_refused_and_the_old_alias_taken():
    with pytest.raises(UserError, match=r"model\.attention is 'eagre'.*did you mean 'eager'"):
        build(config_of("llama"), attention="eagre")
    assert build(config_of("llama"), attention="flash_attention_2").attention_implementation == (
        "sdpa"
    )


def test_rotary_tables_stay_fp32_under_autocast_and_take_the_type_asked_for():
    config = config_of("llama")
    segments = Segments.build([60], device="cpu")
    plain = rotary_tables(config, segments, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rotary_tables(config, segments, 0, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))
    half = rotary_tables(config, segments, 0, torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(plain, half, strict=True))
