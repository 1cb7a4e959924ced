"""Rounding to bf16 by chance: the draw of the rule, its mean, and what it leaves alone."""

import pytest
import torch

from kernels.dropout import fold, mix, module_id
from kernels.stochastic_rounding import column_keys, round_to_bf16, row_keys

CPU = torch.device("cpu")
NAME = "model.layers.0.mlp.up_proj.weight"


def rounded(values: torch.Tensor, seed: int = 1, step: int = 1, first: int = 0) -> torch.Tensor:
    rows, columns = values.shape
    return round_to_bf16(
        values, row_keys(seed, step, NAME, first, rows, CPU), column_keys(NAME, columns, CPU)
    )


def random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def draw(seed: int, step: int, name: str, row: int, column: int) -> int:
    """Return the 16 bits of one element, by the rule, on the host."""
    module, salt = module_id(name), mix(module_id("stochastic rounding"))
    key = fold(fold(fold(salt, seed), step), module)
    return mix(mix(key ^ row) ^ mix(mix(module) ^ column)) >> 16


def test_an_element_is_rounded_as_its_place_says() -> None:
    values = random(3, 5)
    found = rounded(values, seed=2**40 + 7, step=9, first=11).float().view(torch.int32)
    for row in range(3):
        for column in range(5):
            bits = int(values[row, column].view(torch.int32)) & 0xFFFFFFFF
            wanted = bits + draw(2**40 + 7, 9, NAME, 11 + row, column) & 0xFFFF0000
            assert int(found[row, column]) & 0xFFFFFFFF == wanted


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 3e4])
def test_the_mean_over_steps_is_the_number_itself(size: float) -> None:
    """Within 5 standard errors of a choice between the two neighbours, for every number."""
    values, draws = size * random(16, 64), 4096
    mean = torch.zeros(16, 64, dtype=torch.float64)
    for step in range(draws):
        mean += rounded(values, step=step).double() / draws
    down = (values.view(torch.int32) & -65536).view(torch.float32).double()
    up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    share = (values.double() - down) / (up - down)
    error = (up - down).abs() * (share * (1 - share) / draws).sqrt()
    assert ((mean - values.double()).abs() <= 5 * error + 1e-12 * values.abs()).all()


def test_the_mean_over_places_too() -> None:
    values = torch.full((512, 512), 1.0 + 2**-10)  # an eighth of the way to the next number
    up = (rounded(values) > 1).double().mean().item()
    assert up == pytest.approx(1 / 8, abs=5 * (1 / 8 * 7 / 8 / 512**2) ** 0.5)


def test_draws_of_two_parameters_steps_and_seeds_are_not_alike() -> None:
    values = torch.full((64, 64), 1.0 + 2**-8)  # half way
    one = rounded(values)
    others = [rounded(values, seed=2), rounded(values, step=2), rounded(values, first=1)]
    names = row_keys(1, 1, "other", 0, 64, CPU), column_keys("other", 64, CPU)
    for other in [*others, round_to_bf16(values, *names)]:
        assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_what_bf16_holds_stays() -> None:
    values = torch.cat([random(8, 16).bfloat16().float(), torch.zeros(1, 16), -torch.zeros(1, 16)])
    found = rounded(values)
    assert torch.equal(found.float().view(torch.int32), values.view(torch.int32))
    assert torch.equal(rounded(torch.full((1, 4), torch.inf)), torch.full((1, 4), torch.inf))


def test_rows_are_rounded_as_the_whole() -> None:
    values = random(10, 7)
    parts = [rounded(values[:3]), rounded(values[3:], first=3)]
    assert torch.equal(torch.cat(parts), rounded(values))
