"""Dropout masks: the documented rule, bit for bit, and the statistics of what it draws.

A count of n independent bits of probability q has standard deviation √(n·q·(1-q)). Bounds below
are 5 of them: a right rule fails one such comparison in 1.7 million, and since the draws are fixed,
it either always passes or never.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.dropout import (
    attention_keep_mask,
    dropout,
    fold,
    keep_limit,
    keep_mask,
    mix,
    mix_words,
    module_id,
    signed,
)
from kernels.segments import Segments

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
MODULE = module_id("model.layers.0.self_attn.q_proj")
DEVIATIONS = 5


def rows_of(length: int, step: int = 1, seed: int = 42, example: int = 3) -> torch.Tensor:
    segments = Segments.build([length], device="cpu", examples=[example], draw=(seed, step))
    rows = segments.dropout_rows
    assert rows is not None
    return rows


def numpy_mix(words: np.ndarray) -> np.ndarray:
    """lowbias32 on unsigned words, written down a second time."""
    words = words.astype(np.uint32)
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x7FEB352D)
    words ^= words >> np.uint32(15)
    words *= np.uint32(0x846CA68B)
    return words ^ (words >> np.uint32(16))


def numpy_keep_mask(rows: np.ndarray, module: int, width: int, p: float) -> np.ndarray:
    columns = numpy_mix(numpy_mix(np.array([module]))[0] ^ np.arange(width, dtype=np.uint32))
    words = rows.view(np.uint32)[:, None] ^ columns[None, :]
    mixed = numpy_mix(words)
    before_last_shift = mixed ^ (mixed >> np.uint32(16))
    limit = min(round((1 - p) * 2**32) - 2**31, 2**31 - 1)
    return before_last_shift.view(np.int32) < limit


def test_the_rule_against_a_second_implementation():
    rows = rows_of(33)
    for p in (0.05, 0.5, 0.9):
        expected = numpy_keep_mask(rows.numpy(), MODULE, 1027, p)
        assert np.array_equal(keep_mask(rows, MODULE, 1027, p).numpy(), expected)


def test_host_and_tensor_mix_agree():
    words = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    tensor = torch.tensor([signed(word) for word in words], dtype=torch.int32)
    assert mix_words(tensor).tolist() == [signed(mix(word)) for word in words]
    assert [mix(word) for word in words] == numpy_mix(np.array(words, np.uint32)).tolist()
    assert tensor.tolist() == [signed(word) for word in words]  # the argument is left alone


def test_golden_values():
    """Literal values: a change of the rule would silently change every run that is resumed."""
    assert module_id("model.layers.0.self_attn.q_proj") == 1587746156
    assert module_id("") == 1120186595
    assert [mix(0), mix(1), mix(2**32 - 1)] == [0, 1753845952, 1734902346]
    assert [fold(0, 42), fold(7, 2**32 + 3)] == [1612446537, 1757975217]
    segments = Segments.build([2, 1], device="cpu", examples=[7, 123456789], draw=(42, 5))
    assert segments.dropout_rows is not None
    rows = segments.dropout_rows
    assert keep_mask(rows, MODULE, 16, 0.5).int().tolist() == [
        [0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1],
        [0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0],
    ]
    attention = module_id("model.layers.0.self_attn.attention_dropout")
    assert attention_keep_mask(rows[None, :2], attention, 2, 4, 0.5).int().tolist() == [
        [[[1, 0, 1, 0], [1, 0, 0, 1]], [[0, 1, 1, 0], [1, 1, 1, 1]]]
    ]


def test_the_worked_example_of_the_readme():
    """Each line of its table follows from those above, and the last two are what is drawn."""
    table = re.findall(r"^\| `(\w+)` \| `(.+)` \| `0x([0-9A-F]{8})` \|$", README.read_text(), re.M)
    assert len(table) == 13
    values: dict[str, int] = {}
    rule = {
        "fold": fold,
        "keep_limit": keep_limit,
        "mix": mix,
        "module_id": module_id,
        "signed": signed,
    }
    for name, expression, value in table:
        values[name] = eval(expression, rule, values)
        assert values[name] == int(value, 16), name
    rows = Segments.build([2], device="cpu", examples=[7], draw=(42, 5)).dropout_rows
    assert rows is not None
    assert rows[1] == signed(values["row_key"])
    mask = keep_mask(rows, values["module"], 16, 0.1)[1]
    assert [mask[1], mask[13]] == [values["kept_1"], values["kept_13"]] == [True, False]


def test_limits():
    limits = [keep_limit(p) for p in (0.0, 1e-11, 0.1, 0.5, 0.75, 0.999)]
    assert limits == [2**31 - 1, 2**31 - 1, 1717986918, 0, -(2**30), 4294967 - 2**31]


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_keep_rate_of_the_whole_and_of_each_row_and_column(p):
    mask = keep_mask(rows_of(512), MODULE, 512, p).double()
    n, deviation = 512, math.sqrt(512 * p * (1 - p))
    assert abs(mask.sum() - n * n * (1 - p)) < DEVIATIONS * math.sqrt(n) * deviation
    for axis in (0, 1):
        worst = (mask.sum(axis) - n * (1 - p)).abs().max()
        assert worst < DEVIATIONS * deviation
        # The sums themselves must scatter as a binomial's do: not more evenly, not less.
        ratio = mask.sum(axis).var() / (n * p * (1 - p))
        assert abs(ratio - 1) < DEVIATIONS * math.sqrt(2 / n)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: keep_mask(rows_of(512), module_id("another"), 512, 0.5), id="module"),
        pytest.param(lambda: keep_mask(rows_of(512, step=2), MODULE, 512, 0.5), id="step"),
        pytest.param(lambda: keep_mask(rows_of(512, seed=43), MODULE, 512, 0.5), id="seed"),
        pytest.param(lambda: keep_mask(rows_of(512, example=4), MODULE, 512, 0.5), id="example"),
        pytest.param(lambda: keep_mask(rows_of(513)[1:], MODULE, 512, 0.5), id="next row"),
        pytest.param(lambda: keep_mask(rows_of(512), MODULE, 513, 0.5)[:, 1:], id="next column"),
    ],
)
def test_masks_that_differ_in_one_part_of_the_key_are_independent(other):
    n = 512 * 512
    equal = (keep_mask(rows_of(512), MODULE, 512, 0.5) == other()).sum().item()
    assert abs(equal - n / 2) < DEVIATIONS * math.sqrt(n / 4)


@pytest.mark.parametrize("axis", [0, 1])
def test_no_two_rows_and_no_two_columns_are_correlated(axis):
    """The products of two independent signs sum to S over n; S²/n has mean 1, variance 2 - 2/n."""
    n = 512
    signs = keep_mask(rows_of(n), MODULE, n, 0.5).double() * 2 - 1
    sums = signs @ signs.T if axis == 0 else signs.T @ signs
    squares = sums[tuple(torch.triu_indices(n, n, 1))].square() / n
    pairs = n * (n - 1) // 2
    assert len(squares) == pairs
    assert abs(squares.sum() - pairs) < DEVIATIONS * math.sqrt(pairs * (2 - 2 / n))
    # 130,816 pairs: one of them exceeds 7 deviations once in 3 million such masks.
    assert squares.max() < 7**2


def test_heads_and_keys_of_attention_are_independent():
    mask = attention_keep_mask(rows_of(256)[None], MODULE, 3, 257, 0.5)[0]
    n, pairs = 256 * 256, [(mask[0, :, 1:], mask[1, :, 1:]), (mask[1, :, 1:], mask[1, :, :-1])]
    assert mask.shape == (3, 256, 257)
    for a, b in pairs:
        assert abs((a == b).sum().item() - n / 2) < DEVIATIONS * math.sqrt(n / 4)


def test_blocks_do_not_show():
    rows = rows_of(300)
    whole = keep_mask(rows, MODULE, 2000, 0.3)  # 300 · 2000 elements take several blocks
    parts = [keep_mask(part, MODULE, 2000, 0.3) for part in rows.split(7)]
    assert torch.equal(torch.cat(parts), whole)


def test_attention_mask_does_not_depend_on_the_number_of_keys_or_documents():
    rows = rows_of(8)
    wide = attention_keep_mask(rows.view(2, 4), MODULE, 2, 9, 0.5)
    narrow = attention_keep_mask(rows[None, 4:], MODULE, 2, 6, 0.5)
    assert torch.equal(wide[1, :, :, :6], narrow[0])


def test_dropout_scales_what_it_keeps_and_its_gradient_alike():
    x = torch.randn(64, 96, requires_grad=True)
    y = dropout(x, rows_of(64), MODULE, 0.25)
    mask = keep_mask(rows_of(64), MODULE, 96, 0.25)
    assert torch.allclose(y, x * mask / 0.75, rtol=1e-6, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, mask / 0.75, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_type_is_dropped_alike_and_what_is_dropped_is_zero(dtype):
    """NaN too; and of an expanded tensor, which a gradient may be."""
    mask = keep_mask(rows_of(64), MODULE, 96, 0.25)
    x = torch.randn(64, 96, dtype=dtype)
    y = dropout(x.masked_fill(~mask, math.nan), rows_of(64), MODULE, 0.25)
    assert y.dtype == dtype
    assert torch.equal(y, x * mask * (1 / 0.75))
    row = torch.randn(1, 96, dtype=dtype).expand(64, 96)
    assert torch.equal(dropout(row, rows_of(64), MODULE, 0.25), row * mask * (1 / 0.75))


def test_a_mask_does_not_depend_on_the_masks_drawn_before():
    """Column keys are kept between calls: by module and width, and cut to any width below."""
    first = keep_mask(rows_of(8), MODULE, 96, 0.5)
    keep_mask(rows_of(8), MODULE + 1, 96, 0.5)
    for width in (1, 64, 65, 96, 128, 2000):
        mask = keep_mask(rows_of(8), MODULE, width, 0.5)
        both = min(width, 96)
        assert torch.equal(mask[:, :both], first[:, :both])


def test_nothing_is_dropped_without_a_draw():
    x = torch.randn(4, 8)
    assert dropout(x, None, MODULE, 0.5) is x
    assert Segments.build([4], device="cpu").dropout_rows is None
    assert dropout(x, rows_of(4), MODULE, 0.0) is x


def test_no_generator_is_read_or_advanced():
    before = torch.get_rng_state()
    dropout(torch.ones(4, 8), rows_of(4), MODULE, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu():
    rows = rows_of(300)
    on_gpu = keep_mask(rows.cuda(), MODULE, 2000, 0.3)
    assert torch.equal(on_gpu.cpu(), keep_mask(rows, MODULE, 2000, 0.3))
