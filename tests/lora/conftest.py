"""A small decoder of each family, in transformers and in ours, with the same weights."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from models import build
from models.config import parse_config
from models.layers import CausalLM


def _theirs(family: str, **options: Any) -> Any:
    keys = {key: value for key, value in FAMILIES[family].items() if "tie" not in key}
    config = AutoConfig.for_model(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **keys,
            **options,
        }
    )
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # Weights at their initial values would hide a bias or a norm that is left out.
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.eval()


def _ours(theirs: Any) -> CausalLM:
    model = build(parse_config(theirs.config.to_dict(), "test"), attention="eager", device="cpu")
    model.load_state_dict(dict(theirs.named_parameters()), strict=True)
    return model


@pytest.fixture
def make_theirs() -> Callable[..., Any]:
    """Return the maker of transformers' model of a family."""
    return _theirs


@pytest.fixture
def make_ours() -> Callable[[Any], CausalLM]:
    """Return the maker of our model with the weights of transformers'."""
    return _ours


@pytest.fixture
def tokens() -> torch.Tensor:
    """Return two rows of eleven tokens."""
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(3))
