"""The gradients that train an adapter equal PEFT's, for every family, with and without biases.

Each tensor's gradient is compared in norm, relative to its own: ≤ 1e-5. Both sides are in fp64, but
transformers' norms and softmax, which are in fp32 whatever the model is in: it rounds at 6e-8 an
operation, and biases add up what cancels to a hundredth of its size. A scale, a transpose or a
shift that is wrong changes gradients by a part in ten or more.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from small import FAMILIES

from kernels.segments import Segments
from lora import LoraConfig, adapter_tensors, fill_adapter, inject

Maker = Callable[..., Any]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("use_rslora", "use_dora"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_peft(
    family: str,
    bias: Any,
    use_rslora: bool,
    use_dora: bool,
    checkpointing: bool,
    make_theirs: Maker,
    make_ours: Maker,
    tokens: torch.Tensor,
) -> None:
    theirs = make_theirs(family).double()
    model = make_ours(theirs).double()
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "bias": bias}
    options |= {"use_rslora": use_rslora, "use_dora": use_dora}
    inject(model, LoraConfig(**options))
    peft = get_peft_model(theirs, PeftConfig(target_modules="all-linear", **options))
    trained = {
        name.replace(".default", "").replace("vector.weight", "vector"): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == adapter_tensors(model).keys()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    fill_adapter(model, {name: parameter.detach() for name, parameter in trained.items()})

    expected_loss = peft(tokens, labels=tokens).loss
    expected_loss.backward()

    model.gradient_checkpointing = checkpointing
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1).flatten()
    segments = Segments.build([11, 11], device="cpu")
    hidden = model.hidden_states(tokens.flatten(), segments)
    loss = model.operations.linear_cross_entropy(hidden, model.head_weight(), targets) / 20
    loss.backward()

    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for name, gradient in gradients_by_peft_name(model).items():
        expected = trained[name].grad
        assert expected is not None
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def gradients_by_peft_name(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of the adapter, each found through the tensor that it belongs to."""
    by_memory = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    gradients = {name: by_memory[t.data_ptr()] for name, t in adapter_tensors(model).items()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return gradients


def test_nothing_but_the_adapter_gets_a_gradient(
    make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    model = make_ours(make_theirs("llama"))
    inject(model, LoraConfig())
    model(tokens).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
