"""Kept logits do not depend on which views were asked with them, nor on which process has computed them: a run finds the
same numbers in a cache that others have filled, or that was carried away and is filled anew.
"""
import pytest
import torch

from sortkd.train.augmentation import Batches, draw_views
from sortkd.train.images import load_digits
from sortkd.train.networks import create_model
from sortkd.train.teacher_logits import CachedTeacherLogits


@pytest.fixture(scope="module")
def batches():
    return Batches(load_digits(), "cpu")


@pytest.fixture(scope="module", params=["resnet56", pytest.param("ResNet50", marks=pytest.mark.slow)])
def network(request):
    torch.manual_seed(0)
    return create_model(request.param, 10).eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_views_logits_do_not_depend_on_its_company(network, batches, tmp_path, precision):
    together, alone = (CachedTeacherLogits(network, batches, tmp_path / name, precision) for name in ("together", "alone"))
    rows = torch.arange(128)
    together._fill(rows)
    for part in (rows[:1], rows[1:3], rows[3:6], rows[6:13], rows[13:28], rows[28:60], rows[60:]):
        alone._fill(part)
    assert torch.equal(together._stored[rows], alone._stored[rows]) and together._stored[rows].abs().sum() > 0


def test_what_another_process_computes_reaches_a_copy_on_the_device(network, batches, tmp_path):
    "Every process has a copy of its own in the memory of a GPU; here in another tensor."
    one, two = (CachedTeacherLogits(network, batches, tmp_path) for _ in range(2))
    for each in (one, two):
        each._on_device = each._stored.clone()
    data = batches.data
    views = draw_views(len(data.train_targets), data.pad, data.flip, seed=0, epoch=1)
    first = one(views.part(0, 64))
    one.close()  # marks them in the file
    assert torch.equal(two(views.part(0, 64)), first) and first.abs().sum() > 0
    assert torch.equal(two(views.part(32, 96))[:32], first[32:]), "and with views that are missing"
