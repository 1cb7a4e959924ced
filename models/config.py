"""config.json of a Hugging Face model folder → `DecoderConfig`: typed, bounded, the keys verbatim.

Both dialects are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5
(`rope_parameters`, `dtype`). A key that is absent or null takes the family's default, apart from
the few whose null the family reads as a value; zero is a value, taken or refused, never "not
given". Unknown architectures, activations and rotary types are refused by name; code in the folder
(`auto_map`) is never run. What differs by family stands in the family's file, which brings torch
with it when the first configuration is parsed, not when this module is imported.

Source: transformers 5.23, `modeling_rope_utils.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import UserError
from files.strict_json import read_json_object
from models.keys import (
    LAYER_TYPES,
    MAX_LAYERS,
    MAX_POSITIONS,
    DecoderConfig,
    Reader,
    RopeConfig,
)

if TYPE_CHECKING:
    from models.layers import Family

__all__ = ["DecoderConfig", "RopeConfig", "parse_config", "read_config"]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Bounds far above any model that exists: they keep a damaged file from asking for the moon.
_MAX_SIZE = 2**20
_MAX_VOCABULARY = 2**24
_MAX_FACTOR = 2.0**31
_MAX_ROTATIONS = 1e6


def read_config(folder: str | Path) -> DecoderConfig:
    """Return the architecture that `folder`/config.json describes.

    Raises:
        UserError: the file is missing, not JSON, or `parse_config` refuses it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a model folder holds config.json, *.safetensors and "
            f"tokenizer.json"
        )
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Return the architecture that the object `raw` describes; `where` is what messages name.

    Raises:
        UserError: unknown model_type, hidden_act, rope type, layer type or dtype; a value of the
            wrong type or out of bounds; sizes that do not divide; quantised weights.
    """
    family = _family(raw, where)
    read = Reader(raw, where, family.defaults, family.null_is_a_value)
    heads = read.integer("num_attention_heads", 1, 2**16)
    kv_heads = read.optional_integer("num_key_value_heads", 1, 2**16)
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    hidden = read.integer("hidden_size", 1, _MAX_SIZE)
    head_dim = _head_dim(read, hidden, heads)
    layers = read.integer("num_hidden_layers", 1, MAX_LAYERS)
    positions = read.integer("max_position_embeddings", 1, MAX_POSITIONS)
    rope_theta, rope = _rope(raw, where, positions, head_dim)
    hidden_act = read.text("hidden_act") or ""
    return DecoderConfig(
        model_type=family.model_type,
        vocab_size=read.integer("vocab_size", 1, _MAX_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size", 1, _MAX_SIZE),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        hidden_act=read.choice("hidden_act", hidden_act, family.activations),
        initializer_range=read.number("initializer_range", 0.0),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        rope_theta=rope_theta,
        rope=rope,
        bos_token_id=_token_id(read, "bos_token_id"),
        eos_token_id=_eos_token_id(read),
        pad_token_id=_token_id(read, "pad_token_id"),
        torch_dtype=_dtype(read),
        quantization=_quantization(raw, where),
        notes=_notes(raw, where),
        raw=raw,
        attention_dropout=read.number("attention_dropout", 0.0, 1.0),
        **family.special_fields(read, layers),
    )


def _family(raw: dict[str, Any], where: str) -> Family:
    from models.families import FAMILIES

    read = Reader(raw, where)
    name = read.text("model_type")
    if name is None:
        raise UserError(f"{where}: model_type is missing; supported are {', '.join(FAMILIES)}")
    read.choice("model_type", name, FAMILIES)
    return FAMILIES[name]


def _quantization(raw: dict[str, Any], where: str) -> str | None:
    """Return what bitsandbytes made of the weights; refuse what is made in other ways."""
    settings = raw.get("quantization_config")
    if settings is None:
        return None
    where, remedy = f"{where}: quantization_config", "use the model's original weights"
    if not isinstance(settings, dict):
        raise UserError(f"{where} must be an object or null, is a {type(settings).__name__}")
    read = Reader(settings, where)
    method = read.text("quant_method") or "bitsandbytes"
    if method != "bitsandbytes":
        raise UserError(
            f"{where} says that the weights are quantised by {method:.60}, which is not supported "
            f"(those of bitsandbytes' nf4 and int8 are); {remedy}"
        )
    if read.flag("load_in_8bit"):
        return "int8"
    if not read.flag("load_in_4bit"):
        raise UserError(f"{where} says neither load_in_4bit nor load_in_8bit; {remedy}")
    kind = read.text("bnb_4bit_quant_type") or "fp4"
    if kind != "nf4":
        raise UserError(
            f"{where} says that the weights are quantised as {kind:.60}, which is not supported; "
            f"{remedy}, with model.quantization=nf4 if they are to take four bits"
        )
    return "nf4"


def _head_dim(read: Reader, hidden: int, heads: int) -> int:
    head_dim = read.optional_integer("head_dim", 1, _MAX_SIZE)
    if head_dim is None:
        if hidden % heads:
            raise UserError(
                f"{read.where}: hidden_size {hidden} must be a multiple of num_attention_heads "
                f"{heads} where head_dim is not given"
            )
        head_dim = hidden // heads
    if head_dim % 2:
        raise UserError(
            f"{read.where}: head_dim {head_dim} must be even, since rotary embeddings pair its "
            f"halves"
        )
    return head_dim


def _rope(
    raw: dict[str, Any], where: str, positions: int, head_dim: int
) -> tuple[float, RopeConfig]:
    """Return (theta, scaling) from either dialect.

    The dictionary is `rope_scaling`, else `rope_parameters`; theta stands in it, else at the top,
    else it is 10000. Reading only the top level would silently train CodeLlama at 10000.
    """
    for key in ("rope_parameters", "rope_scaling"):
        value = raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"{where}: {key} must be an object or null, is a {type(value).__name__}"
            )
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    values = raw.get(key) or {}
    if nested := [name for name in LAYER_TYPES if name in values]:
        raise UserError(
            f"{where}: {key} differs by layer type ({nested[0]}), which no supported architecture "
            f"does"
        )
    read = Reader(values, f"{where}: {key}")
    top = Reader(raw, where)
    theta = read.optional_number("rope_theta", 1.0, above=True)
    if theta is None:
        theta = top.number("rope_theta", 1.0, default=10000.0, above=True)
    for reader in (read, top):
        if reader.number("partial_rotary_factor", 0.0, default=1.0) != 1.0:
            raise reader.refuse("partial_rotary_factor", "1; partial rotation is not supported")
    rope_type = read.text("rope_type")
    if rope_type is None:
        rope_type = read.text("type")
    if rope_type is None:
        rope_type = "default"
    read.choice("rope_type", rope_type, ROPE_TYPES)
    if rope_type == "default":
        return theta, RopeConfig()
    original = None
    if rope_type in ("llama3", "yarn"):
        original = top.optional_integer("original_max_position_embeddings", 1, MAX_POSITIONS)
        if original is None:
            original = read.integer("original_max_position_embeddings", 1, MAX_POSITIONS, positions)
    factor = read.optional_number("factor", 1.0, _MAX_FACTOR)
    if factor is None and rope_type == "yarn" and original is not None:
        factor = positions / original
    if factor is None or factor < 1.0:
        raise UserError(f"{where}: {key} of type {rope_type} needs a factor of at least 1")
    if rope_type == "linear":
        return theta, RopeConfig("linear", factor)
    if rope_type == "dynamic":
        if head_dim == 2:
            raise UserError(f"{where}: dynamic rotary scaling needs a head_dim above 2")
        return theta, RopeConfig("dynamic", factor)
    if rope_type == "llama3":
        return theta, _llama3(read, factor, original)
    return theta, RopeConfig(
        "yarn",
        factor,
        original,
        beta_fast=_rotations(read, "beta_fast", 32.0),
        beta_slow=_rotations(read, "beta_slow", 1.0),
        attention_factor=read.optional_number("attention_factor", 0.0),
        mscale=read.optional_number("mscale", 0.0),
        mscale_all_dim=read.optional_number("mscale_all_dim", 0.0),
        truncate=read.flag("truncate", True),
    )


def _rotations(read: Reader, key: str, default: float) -> float:
    # Zero stands for "not given" in the files that transformers reads; so it does here.
    value = read.number(key, 0.0, default=default) or default
    if not 1 / _MAX_ROTATIONS <= value <= _MAX_ROTATIONS:
        raise read.refuse(key, f"a number from {1 / _MAX_ROTATIONS:g} to {_MAX_ROTATIONS:g}")
    return value


def _llama3(read: Reader, factor: float, original: int | None) -> RopeConfig:
    low = read.optional_number("low_freq_factor", 0.0, above=True)
    high = read.optional_number("high_freq_factor", 0.0, above=True)
    if low is None or high is None or high <= low:
        raise UserError(
            f"{read.where} of type llama3 needs low_freq_factor and high_freq_factor, the second "
            f"the larger; they are {low} and {high}"
        )
    return RopeConfig("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _token_id(read: Reader, key: str) -> int | None:
    # -1 is how the first Llama conversions wrote "none".
    value = read.optional_integer(key, -1, _MAX_VOCABULARY)
    return None if value == -1 else value


def _eos_token_id(read: Reader) -> int | tuple[int, ...] | None:
    value = read.value("eos_token_id")
    if not isinstance(value, list):
        return _token_id(read, "eos_token_id")
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= _MAX_VOCABULARY:
            raise read.refuse("eos_token_id", "a token id or a list of token ids")
    return tuple(value)


def _dtype(read: Reader) -> str | None:
    key = "dtype" if read.raw.get("dtype") is not None else "torch_dtype"
    name = read.text(key)
    if name is None:
        return None
    return read.choice(key, name.removeprefix("torch."), DTYPES)


def _notes(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return what was seen and left aside, for the run to say."""
    if raw.get("auto_map"):
        return (f"{where}: auto_map names code in the model's repository; it is never run",)
    return ()
