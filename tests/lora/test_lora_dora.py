"""DoRA against PEFT: its start, its training with torch's dropout, its merged weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from files.errors import UserError
from lora import LoraConfig, adapter_tensors, count_parameters, fill_adapter, inject, merge

Maker = Callable[..., Any]
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "use_dora": True}


class Network(nn.Module):
    """Two linear layers, which PEFT and we adapt alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(**options: Any) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """Return ours and PEFT's with the same adapter, away from its start, and its tensors there."""
    ours, base = Network().double(), Network().double()
    inject(ours, LoraConfig(**OPTIONS, **options))
    theirs = get_peft_model(
        base, PeftConfig(target_modules=["first", "second"], **OPTIONS, **options)
    )
    trained = {
        name.replace(".default", "").replace("vector.weight", "vector"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    fill_adapter(ours, {name: p.detach() for name, p in trained.items()})
    return ours, theirs, trained


def test_the_start_is_peft_s_and_changes_nothing() -> None:
    ours, base = Network(), Network()
    inject(ours, LoraConfig(**OPTIONS))
    theirs = get_peft_model(base, PeftConfig(target_modules=["first", "second"], **OPTIONS))
    start = {n: p for n, p in theirs.named_parameters() if "magnitude" in n}
    mine = {n: p for n, p in ours.named_parameters() if "magnitude" in n}
    for expected, magnitude in zip(start.values(), mine.values(), strict=True):
        torch.testing.assert_close(magnitude, expected, rtol=1e-6, atol=0)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), Network()(x), rtol=1e-5, atol=1e-6)
    count = count_parameters(ours)
    assert (count.trainable, count.base) == (3 * (6 + 9 + 9 + 4) + 9 + 4, 6 * 9 + 9 + 9 * 4)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_training_in_another_s_network_is_peft_s(lora_dropout: float) -> None:
    """Both draw torch's dropout, once a layer: under one seed they are to drop the same."""
    ours, theirs, trained = pair(lora_dropout=lora_dropout)
    x = torch.randn(5, 6, dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    places = {t.data_ptr(): p.grad for t, p in ((p.detach(), p) for p in ours.parameters())}
    for name, tensor in adapter_tensors(ours).items():
        gradient = places[tensor.data_ptr()]
        torch.testing.assert_close(gradient, trained[name].grad, rtol=1e-9, atol=1e-9)


def test_merged_it_is_peft_s_merged() -> None:
    ours, theirs, _ = pair()
    merge(ours)
    expected = theirs.merge_and_unload()
    for one, other in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_file_without_the_magnitudes_is_told_so() -> None:
    ours, _, trained = pair()
    some = {n: p.detach() for n, p in trained.items() if "first.lora_magnitude" not in n}
    with pytest.raises(UserError, match=r"missing are .*first\.lora_magnitude_vector"):
        fill_adapter(ours, some)
