"`sort_topk` gives listed classes what `sort_logits` gives them in the whole row."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from special_logits import INTEGERS

from sortkd import sort_logits, sort_topk

FEW_VALUES = st.integers(-2, 3).map(float)  # with many ties


@st.composite
def kept(draw, outside=False):
    "A whole row, its `k` highest classes in any order, and a target inside or `outside` the list."
    count = draw(st.integers(2, 9))
    logits = torch.tensor(draw(st.lists(FEW_VALUES, min_size=count, max_size=count)))
    k = draw(st.integers(1, count - 1 if outside else count))
    ranked = logits.argsort(descending=True, stable=True)  # ties by class index
    classes = ranked[:k][torch.tensor(draw(st.permutations(range(k))))]
    target = ranked[draw(st.integers(k, count - 1) if outside else st.integers(0, k - 1))]
    return logits, classes, target


@settings(deadline=None)
@given(kept(), st.booleans())
def test_a_listed_target_is_sorted_as_in_the_whole_row(row, insert):
    logits, classes, target = row
    values, same = sort_topk(logits[classes], classes, target, insert=insert)
    assert torch.equal(values, sort_logits(logits, target)[classes]) and torch.equal(same, classes)


@settings(deadline=None)
@given(kept(outside=True))
def test_a_target_outside_the_list(row):
    logits, classes, target = row
    before = logits[classes]
    values, same = sort_topk(before, classes, target)
    assert torch.equal(values, before) and torch.equal(same, classes)

    values, listed = sort_topk(before, classes, target, insert=True)
    assert torch.equal(values.sort().values, before.sort().values)
    dropped = set(classes.tolist()) - set(listed.tolist())
    assert dropped == {classes[before == before.min()].max().item()} and set(listed.tolist()) == {*classes.tolist(), int(target)} - dropped
    order = sorted(range(len(before)), key=lambda place: (-before[place], classes[place]))
    expected = dict(zip([int(target), *classes[order].tolist()], before[order].tolist()))  # the last class finds no value
    assert dict(zip(listed.tolist(), values.tolist())) == expected


def test_any_shape_and_dtype_and_what_comes_back_as_it_is():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(3, 5, 40, generator=generator), torch.randint(40, (3, 5), generator=generator)
    target[0, 0] = -100
    logits[1, 1, 2], logits[1, 1, 3] = torch.nan, torch.inf
    values, classes = logits.topk(20)
    for kind in (torch.int16, torch.int32, torch.int64):
        repaired, listed = sort_topk(values, classes.to(kind), target)
        inside = (classes == target[..., None]).any(-1)
        expected = torch.where(inside[..., None], sort_logits(logits, target).gather(-1, classes), values)
        assert torch.equal(repaired.nan_to_num(), expected.nan_to_num()) and listed.dtype == kind
    assert repaired.data_ptr() != values.data_ptr() and listed.data_ptr() != classes.data_ptr()
    repaired, listed = sort_topk(values, classes, target, insert=True)
    on_top = listed.gather(-1, repaired.argmax(-1, keepdim=True))[..., 0] == target
    on_top[0, 0] = on_top[1, 1] = True
    assert on_top.all()
    for row in ((0, 0), (1, 1)):
        assert torch.equal(listed[row], classes[row]) and torch.equal(repaired[row].nan_to_num(), values[row].nan_to_num())
    half = sort_topk(values.half(), classes, target, insert=True)
    assert half[0].dtype == torch.float16 and torch.equal(half[0].nan_to_num(), repaired.half().nan_to_num())


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_classes_of_every_integer_type(dtype):
    "A target that their type cannot hold is not in the list, and cannot be put there."
    values, classes, target = torch.tensor([[9.0, 8.0, 7.0]]), torch.tensor([[44, 2, 3]]), torch.tensor([44 + 256])
    repaired, listed = sort_topk(values, classes.to(dtype), target)
    assert torch.equal(repaired, values) and torch.equal(listed.long(), classes) and listed.dtype == dtype
    if dtype.itemsize == 1:
        with pytest.raises(ValueError, match="target holds 300; classes of .*int8 cannot hold it"):
            sort_topk(values, classes.to(dtype), target, insert=True)
    else:
        assert sort_topk(values, classes.to(dtype), target, insert=True)[1].tolist() == [[44, 2, 300]]


def test_gradients_follow_the_values():
    values, classes = torch.tensor([5.0, 4.0, 3.0], requires_grad=True), torch.tensor([7, 1, 4])
    repaired, _ = sort_topk(values, classes, torch.tensor(4))
    assert torch.equal(torch.autograd.grad(repaired @ torch.tensor([1.0, 2.0, 3.0]), values)[0], torch.tensor([3.0, 1.0, 2.0]))


def test_it_is_one_graph():
    values, classes = torch.randn(4, 50).topk(9)
    target = torch.tensor([1, 2, 3, 60])
    for insert in (False, True):
        compiled = torch.compile(sort_topk, backend="aot_eager", fullgraph=True)(values, classes, target, insert)
        for one, other in zip(compiled, sort_topk(values, classes, target, insert)):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda values, classes, target: (values.long(), classes, target), TypeError, "floating-point"),
        (lambda values, classes, target: (values, classes.float(), target), ValueError, "integers of the shape of values"),
        (lambda values, classes, target: (values, classes[:, :2], target), ValueError, r"but they are torch.int64 \(2, 2\)"),
        (lambda values, classes, target: (values, classes > 2, target), ValueError, "torch.bool"),
        (lambda values, classes, target: (values, None, target), ValueError, "NoneType"),
        (lambda values, classes, target: (values, classes, target[:1]), ValueError, "target has shape"),
        (lambda values, classes, target: (values, classes, target - 5), ValueError, "target holds -4"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        sort_topk(*change(torch.ones(2, 3), torch.tensor([[0, 1, 2], [4, 5, 6]]), torch.tensor([1, 9])))
