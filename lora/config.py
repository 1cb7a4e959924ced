"""What the adapters of a model are: `LoraConfig`, whose names and meanings are PEFT's."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from files.errors import UserError, did_you_mean

ALL_LINEAR = "all-linear"
STARTS = ("default", "pissa")
BIAS_MODES = ("none", "lora_only", "all")
# The largest number of fp16: a scale beyond it cannot be computed with there.
_MAX_ALPHA = 65504
_ALPHA_RULE = f"a number above 0, at most {_MAX_ALPHA}"


@dataclass(frozen=True)
class LoraConfig:
    """What the adapters are; the names and meanings are PEFT's.

    Attributes:
        r: Rank.
        lora_alpha: The update counts lora_alpha / r.
        lora_dropout: Probability of dropping an element of an adapter's input, in [0, 1).
        target_modules: `all-linear` (every linear layer but the output head), another string: a
            regular expression that must match a module's full name, or names, each of which stands
            for every module that is called so or ends in `.` and it.
        use_rslora: Scale by lora_alpha / √r instead.
        bias: Biases trained beside the adapters: `none`, `lora_only` (those of adapted layers),
            `all`.
        rank_pattern: Other ranks, by regular expression for the end of a module's name.
        alpha_pattern: Other alphas, likewise.
        use_dora: Train the lengths of the adapted weights' rows beside their directions.
        modules_to_save: Embedding and head that are trained whole (`lora.saved_modules`).
        trainable_token_indices: Rows of the embedding that are trained (`lora.token_rows`).
        init_lora_weights: How A and B begin: `default` (A drawn, B zero) or `pissa` (`lora.pissa`).

    Raises:
        UserError: A value is out of its range; the message names the key.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    use_rslora: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Sequence[int] = ()
    init_lora_weights: str = "default"

    def __post_init__(self) -> None:
        _require(_is_rank(self.r), "r", self.r, "a whole number from 1 on")
        _require(_is_alpha(self.lora_alpha), "lora_alpha", self.lora_alpha, _ALPHA_RULE)
        _require(
            _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            "lora_dropout",
            self.lora_dropout,
            "a number from 0 up to, but not including, 1",
        )
        for key in ("use_rslora", "use_dora"):
            value = getattr(self, key)
            _require(isinstance(value, bool), key, value, "true or false")
        if self.bias not in BIAS_MODES:
            raise UserError(
                f"lora.bias: {self.bias!r} must be one of {', '.join(BIAS_MODES)}"
                f"{did_you_mean(str(self.bias), BIAS_MODES)}"
            )
        _require(
            isinstance(self.modules_to_save, list | tuple)
            and all(isinstance(name, str) and name for name in self.modules_to_save),
            "modules_to_save",
            self.modules_to_save,
            "a list of module names",
        )
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        rows = self.trainable_token_indices
        _require(
            isinstance(rows, list | tuple) and all(type(row) is int and row >= 0 for row in rows),
            "trainable_token_indices",
            rows,
            "a list of token ids",
        )
        object.__setattr__(self, "trainable_token_indices", tuple(rows))
        _require(
            self.init_lora_weights in STARTS,
            "init_lora_weights",
            self.init_lora_weights,
            f"one of {', '.join(STARTS)}",
        )
        if self.init_lora_weights == "pissa" and self.use_dora:
            raise UserError(
                "lora.init_lora_weights=pissa with lora.use_dora=true: no file says both of the "
                "base as everybody has it; use one of them"
            )
        for key, patterns, fits, rule in (
            ("rank_pattern", self.rank_pattern, _is_rank, "a whole number from 1 on"),
            ("alpha_pattern", self.alpha_pattern, _is_alpha, _ALPHA_RULE),
        ):
            _require(isinstance(patterns, Mapping), key, patterns, "patterns with a number each")
            for pattern, value in patterns.items():
                _require(fits(value), f"{key}.{pattern}", value, rule)
                _compiled(pattern, key)
        if self.init_lora_weights == "pissa":
            for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
                rule = f"at most {_MAX_ALPHA // 2} under pissa, whose files say twice as much"
                _require(2 * alpha <= _MAX_ALPHA, "lora_alpha", alpha, rule)
        targets = self.target_modules
        if isinstance(targets, str):
            if targets != ALL_LINEAR:
                _compiled(targets, "target_modules")
            return
        _require(
            isinstance(targets, Sequence)
            and len(targets) > 0
            and all(isinstance(target, str) and target for target in targets),
            "target_modules",
            targets,
            f"'{ALL_LINEAR}', a regular expression, or at least one module name",
        )
        object.__setattr__(self, "target_modules", tuple(targets))

    def rank(self, name: str) -> int:
        """Return the rank of the adapter of the module called `name`."""
        return _matching(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """Return what the low-rank product of the module called `name` is multiplied by."""
        alpha, r = _matching(self.alpha_pattern, name, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def unmatched_patterns(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Return the patterns that match none of the adapted modules, each behind its key."""
        adapted = list(names)
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return [
            (key, pattern)
            for key, given in patterns.items()
            for pattern in given
            if not any(_ending(pattern).match(name) for name in adapted)
        ]


def _matching(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name.

    Source: peft 0.21 `get_pattern_key`.
    """
    for pattern, value in patterns.items():
        if _ending(pattern).match(name):
            return value
    return default


@lru_cache(maxsize=4096)
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"lora.{key}: '{pattern}' is no regular expression ({error}); mend it, or give a list "
            "of module names"
        ) from None


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise UserError(f"lora.{key}: {value!r:.200} must be {rule}")


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # An integer may be beyond every float.
    return -sys.float_info.max <= value <= sys.float_info.max


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and 0 < value <= _MAX_ALPHA
