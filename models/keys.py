"""The keys of config.json: what a decoder takes from them, and how one is read.

`DecoderConfig` is what they come to, `Reader` takes a value out of the file, and the functions
below it read keys that more than one family has. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from files.errors import UserError, did_you_mean

LAYER_TYPES = ("full_attention", "sliding_attention")
# Their null says that there is no such token.
TOKEN_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})

# Bounds far above any model that exists: they keep a damaged file from asking for the moon.
MAX_LAYERS = 1024
MAX_POSITIONS = 2**31


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
    are equal. `torch_dtype` names what the checkpoint was saved in, and decides nothing;
    `quantization` is the `nf4` or `int8` that bitsandbytes made of the checkpoint's weights.
    """

    model_type: str
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
    quantization: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def window(self, layer: int) -> int | None:
        """Return how many keys, itself included, a query of `layer` sees; None means all."""
        sliding = self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


class Reader:
    """Takes typed, bounded values out of one JSON object.

    A key that is absent, or null and not among `nullable`, takes its default: that of `defaults`,
    else the method's. Every method raises UserError where the value is not what it must be.

    Args:
        raw: the object.
        where: what messages call it.
        defaults: values of keys that are absent.
        nullable: keys whose null is a value.
    """

    def __init__(
        self,
        raw: dict[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        nullable: Collection[str] = (),
    ):
        self.raw = raw
        self.where = where
        self.defaults = defaults or {}
        self.nullable = nullable

    def refuse(self, key: str, rule: str) -> UserError:
        """Return the error that says what `key` is and must be."""
        text = repr(self.raw.get(key))
        shown = text if len(text) <= 60 else text[:57] + "..."
        return UserError(f"{self.where}: {key} is {shown}, but must be {rule}")

    def value(self, key: str, default: Any = None) -> Any:
        """Return what stands there, of whatever type."""
        value = self.raw.get(key)
        if value is not None or (key in self.nullable and key in self.raw):
            return value
        return self.defaults.get(key, default)

    def optional_integer(self, key: str, low: int, high: int, default: Any = None) -> int | None:
        """Return an integer in [low, high], or None where there is neither value nor default."""
        value = self.value(key, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(key, f"an integer from {low} to {high}")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = None) -> int:
        """Return an integer in [low, high]."""
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
        self,
        key: str,
        low: float,
        high: float = 1e300,
        *,
        default: float = 0.0,
        above: bool = False,
    ) -> float:
        """Return a number in [low, high), or in (low, high) where `above`."""
        value = self.optional_number(key, low, high, above=above)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """Return a string, or None."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, "a string")
        return value

    def choice(self, key: str, value: str, allowed: Collection[str]) -> str:
        """Return `value`, which must be one of those allowed."""
        if value not in allowed:
            raise UserError(
                f"{self.where}: {key} '{value}' is not supported; supported are "
                f"{', '.join(allowed)}{did_you_mean(value, allowed)}"
            )
        return value


def window_of_all_layers(read: Reader, layers: int) -> dict[str, Any]:
    """Return the fields of a window that every layer has, where `sliding_window` is not null."""
    window = read.optional_integer("sliding_window", 1, MAX_POSITIONS)
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": (kind,) * layers,
    }


def window_of_later_layers(read: Reader, layers: int) -> dict[str, Any]:
    """Return the fields of a window that is on by `use_sliding_window`, where `layer_types` says.

    Without `layer_types` it is from layer `max_window_layers` on.
    """
    used = read.flag("use_sliding_window")
    # Files of models without a window may name any, zero too.
    window = read.optional_integer("sliding_window", 1 if used else 0, MAX_POSITIONS)
    if not used:
        window = None
    first = read.integer("max_window_layers", 0, MAX_LAYERS)
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
