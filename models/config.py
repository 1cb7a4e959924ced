"""config.json of a Hugging Face model folder → `DecoderConfig`: typed, bounded, the keys verbatim.

Both dialects are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5
(`rope_parameters`, `dtype`). A key that is absent or null takes the default of the family's own
config class, apart from the few whose null that class reads as a value (`_NULL_IS_A_VALUE`); zero
is a value, taken or refused, never "not given". Unknown architectures, activations and rotary types
are refused by name; code in the folder (`auto_map`) is never run. Nothing here imports torch, so
that planning stays instant.

Source: transformers 5.23, `configuration_{llama,qwen2,starcoder2}.py` and `modeling_rope_utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from files.errors import UserError, did_you_mean
from files.strict_json import read_json_object

FAMILIES = ("llama", "qwen2", "starcoder2")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Per family: `silu` and its other name, or the tanh form of GELU; nothing else was ever published.
_ACTIVATIONS = {
    "llama": ("silu", "swish"),
    "qwen2": ("silu", "swish"),
    "starcoder2": ("gelu_pytorch_tanh",),
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "starcoder2": {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
}

# Null means "there is none" (no such token, no window), or "as many as there are heads".
_TOKEN_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
_NULL_IS_A_VALUE = {
    "llama": _TOKEN_IDS | {"num_key_value_heads"},
    "qwen2": _TOKEN_IDS | {"num_key_value_heads", "sliding_window"},
    "starcoder2": _TOKEN_IDS,
}

# Bounds far above any model that exists: they keep a damaged file from asking for the moon.
_MAX_SIZE = 2**20
_MAX_VOCABULARY = 2**24
_MAX_LAYERS = 1024
_MAX_POSITIONS = 2**31
_MAX_FACTOR = 2.0**31
_MAX_ROTATIONS = 1e6


@dataclass(frozen=True)
class RopeConfig:
    """How the rotary frequencies are scaled; fields that a type does not use keep their defaults.

    `factor` ≥ 1 is the stretch of the context. `llama3` uses the two frequency factors, `yarn` the
    betas (rotations), `truncate` and either `attention_factor` or the two mscales for the size of
    cos and sin. `original_max_position_embeddings` is the context (tokens) before the stretch.
    """

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder's architecture: Hugging Face's keys, resolved to the family's defaults.

    Keys of other families keep a neutral value (`use_bias` outside StarCoder2, `rms_norm_eps` in
    it). `raw` is the file as read, for writing it back; two configs that differ in dialect only
    are equal. `torch_dtype` names what the checkpoint was saved in, and decides nothing.
    """

    model_type: Literal["llama", "qwen2", "starcoder2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str
    initializer_range: float
    tie_word_embeddings: bool
    rope_theta: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    rms_norm_eps: float = 1e-6
    norm_epsilon: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    use_bias: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    layer_types: tuple[str, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    torch_dtype: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def window(self, layer: int) -> int | None:
        """Return how many keys, itself included, a query of `layer` sees; None means all."""
        sliding = self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


class _Reader:
    """Takes typed, bounded values out of one JSON object.

    A key that is absent, or null where `family` does not read null as a value, takes its default.
    """

    def __init__(self, raw: dict[str, Any], where: str, family: str | None = None):
        self.raw = raw
        self.where = where
        self.defaults = _DEFAULTS[family] if family else {}
        self.nullable = _NULL_IS_A_VALUE[family] if family else frozenset()

    def refuse(self, key: str, rule: str) -> UserError:
        text = repr(self.raw.get(key))
        shown = text if len(text) <= 60 else text[:57] + "..."
        return UserError(f"{self.where}: {key} is {shown}, but must be {rule}")

    def value(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is not None or (key in self.nullable and key in self.raw):
            return value
        return self.defaults.get(key, default)

    def optional_integer(self, key: str, low: int, high: int, default: Any = None) -> int | None:
        value = self.value(key, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(key, f"an integer from {low} to {high}")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = None) -> int:
        value = self.optional_integer(key, low, high, default)
        if value is None:
            raise UserError(f"{self.where}: {key} is missing; it must be an integer ≥ {low}")
        return value

    def optional_number(
        self, key: str, low: float, high: float = 1e300, *, above: bool = False
    ) -> float | None:
        """Return a number in [low, high), or in (low, high) where `above`."""
        value = self.value(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value < high or (above and value == low):
            bound = f"more than {low:g}" if above else f"at least {low:g}"
            limit = f" and below {high:g}" if high < 1e300 else ""
            raise self.refuse(key, f"a number {bound}{limit}")
        return float(value)

    def number(
        self, key: str, low: float, high: float = 1e300, *, default: float, above: bool = False
    ) -> float:
        value = self.optional_number(key, low, high, above=above)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, "a string")
        return value

    def choice(self, key: str, value: str, allowed: tuple[str, ...]) -> str:
        if value not in allowed:
            raise UserError(
                f"{self.where}: {key} '{value}' is not supported; supported are "
                f"{', '.join(allowed)}{did_you_mean(value, allowed)}"
            )
        return value


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
    read = _Reader(raw, where, family)
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
    layers = read.integer("num_hidden_layers", 1, _MAX_LAYERS)
    positions = read.integer("max_position_embeddings", 1, _MAX_POSITIONS)
    rope_theta, rope = _rope(raw, where, positions, head_dim)
    hidden_act = read.text("hidden_act") or ""
    return DecoderConfig(
        model_type=family,
        vocab_size=read.integer("vocab_size", 1, _MAX_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size", 1, _MAX_SIZE),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        hidden_act=read.choice("hidden_act", hidden_act, _ACTIVATIONS[family]),
        initializer_range=read.number(
            "initializer_range", 0.0, default=read.defaults["initializer_range"]
        ),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        rope_theta=rope_theta,
        rope=rope,
        bos_token_id=_token_id(read, "bos_token_id"),
        eos_token_id=_eos_token_id(read),
        pad_token_id=_token_id(read, "pad_token_id"),
        torch_dtype=_dtype(read),
        notes=_notes(raw, where),
        raw=raw,
        attention_dropout=read.number("attention_dropout", 0.0, 1.0, default=0.0),
        **_family_fields(read, family, layers),
    )


def _family(raw: dict[str, Any], where: str) -> Literal["llama", "qwen2", "starcoder2"]:
    read = _Reader(raw, where)
    name = read.text("model_type")
    if name is None:
        raise UserError(f"{where}: model_type is missing; supported are {', '.join(FAMILIES)}")
    read.choice("model_type", name, FAMILIES)
    if raw.get("quantization_config") is not None:
        raise UserError(
            f"{where}: quantization_config says that the weights are quantised, which is not "
            f"supported; use the model's original weights"
        )
    return name  # pyright: ignore[reportReturnType]  # choice() has just checked it


def _family_fields(read: _Reader, family: str, layers: int) -> dict[str, Any]:
    """Return the fields that only one family has."""
    if family == "llama":
        return {
            "rms_norm_eps": read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            "attention_bias": read.flag("attention_bias"),
            "mlp_bias": read.flag("mlp_bias"),
            "layer_types": ("full_attention",) * layers,
        }
    if family == "qwen2":
        return {
            "rms_norm_eps": read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            **_qwen2_window(read, layers),
        }
    window = read.optional_integer("sliding_window", 1, _MAX_POSITIONS)
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "norm_epsilon": read.number("norm_epsilon", 0.0, 1.0, default=1e-5),
        "use_bias": read.flag("use_bias", True),
        "residual_dropout": read.number("residual_dropout", 0.0, 1.0, default=0.0),
        "embedding_dropout": read.number("embedding_dropout", 0.0, 1.0, default=0.0),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": (kind,) * layers,
    }


def _qwen2_window(read: _Reader, layers: int) -> dict[str, Any]:
    """Return Qwen2's window: on by `use_sliding_window`, then from layer `max_window_layers`."""
    used = read.flag("use_sliding_window")
    # Files of models without a window may name any, zero too.
    window = read.optional_integer("sliding_window", 1 if used else 0, _MAX_POSITIONS)
    if not used:
        window = None
    first = read.integer("max_window_layers", 0, _MAX_LAYERS, 28)
    layer_types = read.value("layer_types")
    if layer_types is None:
        layer_types = [
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(layers)
        ]
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise read.refuse("layer_types", f"a list of num_hidden_layers = {layers} names")
    for name in layer_types:
        read.choice("layer_types", str(name), LAYER_TYPES)
    if window is None and "sliding_attention" in layer_types:
        raise UserError(
            f"{read.where}: layer_types has sliding_attention, but use_sliding_window with "
            f"sliding_window sets no window; set both or make every layer full_attention"
        )
    return {
        "sliding_window": window,
        "use_sliding_window": used,
        "max_window_layers": first,
        "layer_types": tuple(layer_types),
    }


def _head_dim(read: _Reader, hidden: int, heads: int) -> int:
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
    read = _Reader(values, f"{where}: {key}")
    top = _Reader(raw, where)
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
        original = top.optional_integer("original_max_position_embeddings", 1, _MAX_POSITIONS)
        if original is None:
            original = read.integer(
                "original_max_position_embeddings", 1, _MAX_POSITIONS, positions
            )
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


def _rotations(read: _Reader, key: str, default: float) -> float:
    # Zero stands for "not given" in the files that transformers reads; so it does here.
    value = read.number(key, 0.0, default=default) or default
    if not 1 / _MAX_ROTATIONS <= value <= _MAX_ROTATIONS:
        raise read.refuse(key, f"a number from {1 / _MAX_ROTATIONS:g} to {_MAX_ROTATIONS:g}")
    return value


def _llama3(read: _Reader, factor: float, original: int | None) -> RopeConfig:
    low = read.optional_number("low_freq_factor", 0.0, above=True)
    high = read.optional_number("high_freq_factor", 0.0, above=True)
    if low is None or high is None or high <= low:
        raise UserError(
            f"{read.where} of type llama3 needs low_freq_factor and high_freq_factor, the second "
            f"the larger; they are {low} and {high}"
        )
    return RopeConfig("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _token_id(read: _Reader, key: str) -> int | None:
    # -1 is how the first Llama conversions wrote "none".
    value = read.optional_integer(key, -1, _MAX_VOCABULARY)
    return None if value == -1 else value


def _eos_token_id(read: _Reader) -> int | tuple[int, ...] | None:
    value = read.value("eos_token_id")
    if not isinstance(value, list):
        return _token_id(read, "eos_token_id")
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= _MAX_VOCABULARY:
            raise read.refuse("eos_token_id", "a token id or a list of token ids")
    return tuple(value)


def _dtype(read: _Reader) -> str | None:
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
