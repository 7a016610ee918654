"The mechanism where the chapter does not look: devices, layouts, compilation to machine code, the special values."
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sortkd
from sortkd.sorting import _sort_fixed_shape, _sort_moving_classes, sort_logits, swap_logits

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
REPAIRS = [sort_logits, swap_logits]


def some_rows(rows=64, classes=100, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator).to(dtype), torch.randint(classes, (rows,), generator=generator)


def by_two_sorts(logits, target):
    "The textbook way: rank with the target on top, and hand the sorted values out."
    values = logits.sort(dim=1, descending=True).values
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target[:, None], True)
    order = torch.where(is_target, torch.inf, logits).argsort(dim=1, descending=True, stable=True)  # random float32 rows do hold ties
    return torch.zeros_like(logits).scatter(1, order, values)


def two_full_sorts(logits, target):
    "The plain way to the new values, for rows `(N, C)` that hold neither NaN nor zero."
    values, order = logits.sort(dim=1, descending=True, stable=True)
    target = target.unsqueeze(1)
    others = order[order != target].view(len(order), -1)
    return values.gather(1, torch.cat([target, others], dim=1).argsort(dim=1))


def bits(values):
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(sizes[values.element_size()])


SPECIAL = [0.0, -0.0, 1.0, 1.0, 2.0, -3.0, torch.inf, -torch.inf, torch.nan]


def test_exported_at_the_top():
    assert sortkd.sort_logits is sort_logits and sortkd.swap_logits is swap_logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_ways_agree_on_every_device(device, dtype):
    logits, target = some_rows(dtype=dtype)
    expected = _sort_moving_classes(logits, target, 1, -100)
    assert torch.equal(_sort_fixed_shape(logits.to(device), target.to(device), 1, -100).cpu(), expected)
    assert torch.equal(sort_logits(logits.to(device), target.to(device)).cpu(), expected)


def test_agrees_with_the_textbook_way():
    logits, target = some_rows(512, 1000)
    assert torch.equal(sort_logits(logits, target), by_two_sorts(logits, target))


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("shape,dim", [((12, 7), 1), ((3, 4, 7), -1), ((3, 7, 2, 2), 1), ((7, 12), 0), ((7,), 0), ((0, 7), 1), ((5, 1), 1), ((2, 3, 1, 2, 7), 4)])
def test_any_leading_shape(repair, shape, dim):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    target = torch.randint(shape[dim], logits.movedim(dim, -1).shape[:-1], generator=torch.Generator().manual_seed(2))
    repaired = repair(logits, target, dim=dim)
    rows = logits.movedim(dim, -1).reshape(-1, shape[dim])
    expected = torch.stack([repair(row, label) for row, label in zip(rows, target.reshape(-1))]) if len(rows) else rows
    assert torch.equal(repaired.movedim(dim, -1).reshape(-1, shape[dim]), expected)


@pytest.mark.parametrize("repair", REPAIRS)
def test_layout_and_input_are_left_alone(repair):
    logits, target = some_rows(8, 10)
    for view in (logits.t().contiguous().t(), logits[:, ::2], logits.expand(8, 10)):
        labels = target % view.shape[1]
        before = view.clone()
        assert torch.equal(repair(view, labels), repair(before, labels))
        assert torch.equal(view, before)
    right = torch.eye(4)
    assert repair(right, torch.arange(4)).data_ptr() != right.data_ptr()


@pytest.mark.parametrize("way", [_sort_moving_classes, _sort_fixed_shape])
def test_special_values(way):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1.0, inf, -inf, 3.0], [nan, 2.0, 1.0, 0.0], [0.0, 2.0, nan, 1.0], [-0.0, 0.0, -1.0, -2.0], [1.0, 1.0, 1.0, 1.0]])
    repaired = way(logits, torch.tensor([2, 3, 2, 0, 3]), 1, -100)
    assert repaired[0].tolist() == [-inf, 3.0, inf, 1.0]
    assert torch.equal(repaired[1:3].isnan(), logits[1:3].isnan()) and torch.equal(repaired[1:3].nan_to_num(), logits[1:3].nan_to_num())
    assert torch.equal(repaired[3].signbit(), logits[3].signbit())  # a tie with the maximum is right: bit for bit, the sign of zero too
    assert torch.equal(repaired[4], logits[4])


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
def test_ignored_rows_come_back(repair, ignore_index):
    logits, target = some_rows(32, 10)
    target[::2] = ignore_index
    repaired = repair(logits, target, ignore_index=ignore_index)
    assert torch.equal(repaired[target == ignore_index], logits[target == ignore_index])
    counted = target != ignore_index
    assert torch.equal(repaired[counted], repair(logits[counted], target[counted]))


@pytest.mark.parametrize("way", [_sort_moving_classes, _sort_fixed_shape])
def test_gradient_is_the_permutation(way):
    logits, target = some_rows(16, 12, torch.float64)
    assert torch.autograd.gradcheck(lambda z: way(z, target, 1, -100), logits.requires_grad_())
    upstream = torch.randn_like(logits)
    gradient, = torch.autograd.grad(way(logits, target, 1, -100), logits, upstream)
    assert torch.equal(gradient.sort(1).values, upstream.sort(1).values)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiles_to_machine_code():
    logits, target = some_rows(64, 100)
    assert torch.equal(torch.compile(sort_logits, fullgraph=True)(logits, target), sort_logits(logits, target))


@given(st.integers(1, 5), st.integers(1, 8), st.data())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_swap_exchanges_two_values(rows, classes, data):
    logits = torch.tensor(data.draw(st.lists(st.lists(st.integers(-5, 5), min_size=classes, max_size=classes), min_size=rows, max_size=rows)), dtype=torch.float32)
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    for before, after, label in zip(logits, swap_logits(logits, target), target):
        expected = before.clone()
        if before[label] < before.max():
            expected[before.argmax()], expected[label] = before[label], before.max()
        assert torch.equal(after, expected)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("logits,target,dim,error,words", [
    (torch.zeros(3, 4), torch.tensor([0, 1, 4]), -1, ValueError, "target holds 4"),
    (torch.zeros(3, 4), torch.tensor([0, -1, 2]), -1, ValueError, "target holds -1"),
    (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), -1, ValueError, r"\(3,\)"),
    (torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64), -1, ValueError, r"\(3, 1\)"),
    (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 2, ValueError, "dim=2"),
    (torch.zeros(()), torch.zeros((), dtype=torch.int64), -1, ValueError, "dim=-1"),
    (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), -1, ValueError, "no classes"),
    (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), -1, TypeError, "floating-point"),
    ([[1.0, 2.0]], torch.zeros(1, dtype=torch.int64), -1, TypeError, "list"),
    (torch.zeros(3, 4), torch.zeros(3), -1, TypeError, "class indices"),
    (torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), -1, TypeError, "class indices"),
])
def test_bad_input_is_named(repair, logits, target, dim, error, words):
    with pytest.raises(error, match=words):
        repair(logits, target, dim=dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("rank", [2, 30, None])
@pytest.mark.parametrize("shape,dim", [((300, 10), 1), ((40, 1000), 1), ((120, 100), 1), ((6000,), 0), ((2, 30, 200), -1), ((4, 50, 8, 8), 1)])
def test_every_way_through_the_data_gives_the_same_bits(dtype, share, rank, shape, dim):
    "Few and many wrong rows, few and many classes above the target: the bounds between the ways lie among these."
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=generator).add(5).to(dtype)
    order = logits.argsort(dim=dim, descending=True, stable=True).movedim(dim, -1)
    wrong = torch.rand(order.shape[:-1], generator=generator) < share
    place = (order.shape[-1] if rank is None else min(rank, order.shape[-1])) - 1
    target = torch.where(wrong, order[..., place], order[..., 0])
    before = logits.clone()
    repaired = sort_logits(logits, target, dim)
    rows, labels = logits.movedim(dim, -1).reshape(-1, shape[dim]), target.reshape(-1)
    expected = two_full_sorts(rows, labels).view(order.shape).movedim(-1, dim)
    assert torch.equal(repaired, expected) and torch.equal(logits, before)
    assert repaired.stride() == logits.stride()
    assert torch.equal(bits(repaired), bits(_sort_fixed_shape(logits, target, dim, -100)))


@given(st.integers(0, 2**32), st.sampled_from([(3, 4), (430, 10), (900, 10), (9, 500), (30, 500)]), st.floats(0, 1), st.integers(1, 500), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_special_values_on_every_way(seed, shape, share, rank, ignoring):
    "Zeros of both signs, infinities, NaN and ties, with rows, entries and targets on both sides of each bound."
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator).round(decimals=1)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    logits = torch.where(torch.rand(shape, generator=generator) < 2 / shape[1], special, logits)
    order = logits.argsort(dim=1, descending=True, stable=True)
    wrong = torch.rand(shape[0], generator=generator) < share
    target = torch.where(wrong, order[:, min(rank, shape[1]) - 1], order[:, 0])
    if ignoring:
        target[::3] = -100
    expected = torch.stack([_sort_one_row(row, int(label)) for row, label in zip(logits, target)])
    for way in (_sort_moving_classes, _sort_fixed_shape):
        assert torch.equal(bits(way(logits, target, 1, -100)), bits(expected))
    tracked = logits.clone().requires_grad_()
    assert torch.equal(bits(sort_logits(tracked, target).detach()), bits(expected))


def _sort_one_row(row, label):
    if label == -100 or row.isnan().any():
        return row
    above = [c for c in row.argsort(descending=True, stable=True).tolist() if row[c] > row[label]]
    cycle = torch.tensor([label, *above])
    return row.scatter(0, cycle, row[cycle.roll(-1)])
