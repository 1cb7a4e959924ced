"""What a rank of a shared model holds while it is loaded and written: its rows, and one tensor."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ended, said, start_ranks
from safetensors.torch import load_file
from small import FAMILIES, SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from files.hub import ModelSource
from files.tensors import Rows, write_shares
from models import build
from models.config import parse_config
from models.weights import initialise, save_model
from train.config.load import load_config
from train.inputs.base_model import load_shared
from train.inputs.sharding import sharing_of
from train.precision import Precision
from train.process.memory import allocated_bytes
from train.process.world import World

SIZES = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
# Besides, Python's own objects and what a collective takes.
SPARE = 1.10


class Peak(TorchDispatchMode):
    """The most memory in use at any operation of torch, beyond what was in use before."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.most = allocated_bytes() or 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, (allocated_bytes() or 0) - self.before)
        return result


@pytest.mark.skipif(allocated_bytes() is None, reason="libc does not tell what is allocated")
def test_a_rank_holds_its_share_and_one_tensor(tmp_path: Path) -> None:
    decoder = parse_config(SMALL | FAMILIES["llama"] | SIZES, "a test")
    model = build(decoder, device="meta")
    initialise(model, 3, torch.float32, "cpu", initializer_range=0.02)
    save_model(model, tmp_path / "base", config=decoder)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    del model
    settings = {"train.method": "full", "train.precision": "fp32", "model.path": "base"}
    config = load_config(overrides=settings)
    source = ModelSource(tmp_path / "base", None, None)

    def work(world: World) -> int:
        precision = Precision("fp32", torch.device("cpu"))
        load_shared(config, source, precision, world)  # what is imported and made once is no share
        gc.collect()
        with Peak() as loading:
            shared = load_shared(config, source, precision, world)
        sharing = sharing_of(shared, world)
        assert sharing is not None
        rows = {
            name: Rows(sharing.local(x), sharing.first[name], tuple(x.shape))
            for name, x in sharing.sources.items()
        }
        share = sum(x.tensor.numel() * x.tensor.element_size() for x in rows.values())
        print("share", share, "loading", loading.most, "largest", largest)
        assert share < loading.most <= SPARE * share + largest
        with Peak() as writing:
            number = iter(range(9))
            write_shares(
                tmp_path / "copy.safetensors",
                rows,
                leads=world.first,
                meet=lambda: world.met(f"copy-{next(number)}"),
            )
        print("writing", writing.most)
        assert writing.most <= largest
        return 0

    codes = ended(start_ranks(3, work, tmp_path))
    assert codes == [0, 0, 0], [said(tmp_path, rank) for rank in range(3)]
    copy: dict[str, Tensor] = load_file(tmp_path / "copy.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert copy.keys() == base.keys()
    assert all(torch.equal(copy[name], x) for name, x in base.items())
    assert (tmp_path / "copy.safetensors").stat().st_size == (
        tmp_path / "base" / "model.safetensors"
    ).stat().st_size
