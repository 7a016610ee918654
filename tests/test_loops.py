"Sorting in the loops of torchdistill, timm, Lightning and ModelOpt: what chapters do not show."
import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from sortkd import DistillationLoss, create_method, sort_logits
from sortkd.loops.common import FrozenTeacher
from sortkd.loops.lightning import DistillationModuleMixin
from sortkd.loops.modelopt import ModelOptLoss
from sortkd.loops.timm import DistillationTaskMixin
from sortkd.loops.trl import SortedGKDMixin
from sortkd.losses import dkd_loss, kd_loss

CLASSES, BATCH = 5, 16


class Network(nn.Module):
    "Small, with batch normalization, whose mode shows in its logits."
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.hidden = nn.BatchNorm1d(12), nn.Linear(12, 16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, pixel_values):
        hidden = torch.tanh(self.hidden(self.norm(pixel_values.flatten(1))))
        return 3 * self.classifier(hidden)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 2, 2, generator=generator) + 0.5
    return TensorDataset(images, torch.randint(CLASSES, (64,), generator=generator))


def largest_difference(first, second):
    weights = (parameters_to_vector(each.parameters()) for each in (first, second))
    return torch.sub(*weights).abs().max().item()


def test_frozen_teacher_follows_copies_and_is_not_saved(data):
    images, original, file = data.tensors[0], FrozenTeacher(Network(0)), io.BytesIO()
    clone = copy.deepcopy(original)
    assert clone.network is not original.network
    torch.save(original, file)
    file.seek(0)
    for other in (clone, torch.load(file, weights_only=False)):
        assert torch.equal(other.train()(images), original(pixel_values=images))
    assert not original(images.requires_grad_()).requires_grad
    whole = nn.Sequential(Network(1), original)
    whole.load_state_dict(copy.deepcopy(whole.state_dict()), strict=True)
    assert whole.to("meta")[1].network.classifier.weight.is_meta


CONFIG = """
sortkd: !import_call {key: 'sortkd.loops.torchdistill.register_torchdistill'}
num_epochs: 2
train_data_loader:
  dataset_id: 'data'
  sampler:
    class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}
  kwargs: {batch_size: 16}
teacher: {forward_proc: 'forward_batch_only', requires_grad: False}
student: {forward_proc: 'forward_batch_only'}
optimizer: {key: 'SGD', kwargs: {lr: 0.05}}
pre_epoch_process: 'sortkd_pre_epoch'
criterion:
  key: 'WeightedSumLoss'
  kwargs:
    sub_terms:
      distillation:
        criterion: {key: 'SortedKDLoss', kwargs: {method: 'kd+sort'}}
        weight: 1.0
"""


@pytest.fixture
def make_box(tmp_path, data):
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.core.distillation import get_distillation_box

    def make(*changes):
        config = CONFIG
        for old, new in changes:
            assert old in config
            config = config.replace(old, new)
        path, cpu = tmp_path / "config.yaml", torch.device("cpu")
        path.write_text(config)
        return get_distillation_box(
            Network(0), Network(1), {"data": data}, load_yaml_file(path), cpu, None, False, 1)
    return make


def train_box(box, mode=True):
    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        box.student_model.train(mode)
        for images, target, supplement in box.train_data_loader:
            loss = box.forward_process(images, target, supplement)
            losses.append(loss.item())
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    return losses


def test_torchdistill_settings_weights_and_places(make_box, data):
    "A method's settings; a term of weight 3 on logits that a hook recorded, before their factor 3."
    images, target = data[:BATCH]
    student, teacher = Network(1)(images), Network(0).eval()(images).detach()
    distillation = dkd_loss(student, sort_logits(teacher, target), target, beta=2.0)
    expected = (F.cross_entropy(student, target) + 1 / 20 * distillation).item()
    box = make_box(("method: 'kd+sort'", "method: 'dkd+sort', beta: 2.0"))
    assert train_box(box)[0] == pytest.approx(expected, rel=1e-5)
    hooks = "forward_hook: {input: [], output: ['classifier']}"
    places = "student_module_path: 'classifier', teacher_module_path: 'classifier'"
    box = make_box(
        ("requires_grad: False", f"requires_grad: False, {hooks}"),
        ("student: {", f"student: {{{hooks}, "), ("weight: 1.0", "weight: 3.0"),
        ("'kd+sort'", f"'kd+sort', ce_weight: 0.0, {places}"))
    expected = 3 * 0.9 * kd_loss(student / 3, sort_logits(teacher / 3, target), 4.0)
    assert train_box(box)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_torchdistill_passes_the_epoch_on(make_box, data):
    box, (images, target) = make_box(("kd+sort", "dkd+sort")), data[:BATCH]
    for epoch in (0, 6):
        box.pre_epoch_process(epoch=epoch)
        assert not box.teacher_model.training
        with torch.no_grad():
            student, teacher = box.student_model(images), box.teacher_model(images)
            repaired = sort_logits(teacher, target)
        value = create_method("dkd+sort").loss(student, repaired, target, epoch + 1)
        loss = box.forward_process(images, target, {})
        assert loss.item() == pytest.approx(value.item(), rel=1e-5)
    box = make_box(("requires_grad: False", "requires_grad: True"))
    box.pre_epoch_process(epoch=0)
    assert box.teacher_model.training, "a teacher that learns keeps its mode"


def test_torchdistill_accumulates_gradients_of_a_sum(make_box, data):
    "14 rows do not count; with the weight that the error tells, each other row weighs the same."
    data.tensors[1][:14] = -100
    once = "num_epochs: 2", "num_epochs: 1"
    # Batch normalization in training mode would tell a batch from its parts.
    whole = make_box(once, ("batch_size: 16", "batch_size: 64"))
    train_box(whole, mode=False)
    accumulate = "lr: 0.05}", "lr: 0.05}, grad_accum_step: 4"
    box = make_box(once, accumulate)
    with pytest.raises(ValueError, match="weighs 4 micro-batches equally"):
        box.pre_epoch_process(epoch=0)
    summed = ("'kd+sort'", "'kd+sort', reduction: 'sum'"), ("weight: 1.0", f"weight: {4 / 50}")
    box = make_box(once, accumulate, *summed)
    train_box(box, mode=False)
    assert largest_difference(box.student_model, whole.student_model) < 1e-7
    assert largest_difference(box.student_model, Network(1)) > 1e-3


@pytest.fixture
def make_task():
    import timm
    from timm.task import LogitDistillationTask

    class DistillationTask(DistillationTaskMixin, LogitDistillationTask): ...

    def make(method="kd+sort", **named):
        torch.manual_seed(0)
        student, teacher = (
            timm.create_model("test_vit", img_size=32, num_classes=5) for _ in range(2))
        teacher.pretrained_cfg = {"mean": (0.4,) * 3, "std": (0.2,) * 3}
        with torch.no_grad():
            teacher.head.weight.mul_(50)
        loss = DistillationLoss(method)
        return DistillationTask(student, teacher, distillation_loss=loss, verbose=False, **named)
    return make


def test_timm_normalizes_for_the_teacher(make_task):
    task, images, target = make_task().eval(), torch.randn(4, 3, 32, 32), torch.arange(4)
    student = copy.deepcopy(task.trainable_module)
    assert student.pretrained_cfg["mean"] == student.pretrained_cfg["std"] == (0.5,) * 3
    with torch.no_grad():
        logits, teacher_logits = student(images), task.teacher(((images + 1) / 2 - 0.4) / 0.2)
        loss = DistillationLoss("kd+sort")(logits, teacher_logits, target)
    result = task(images, target)
    torch.testing.assert_close(result["loss"], loss)
    result["loss"].backward()
    assert task.distillation_loss.teacher_wrong.any()
    torch.testing.assert_close(result["output"], logits)
    assert all(each.grad is None for each in task.teacher.parameters())


def test_timm_passes_the_epoch_on_and_refuses_what_has_no_effect(make_task):
    images, target, task = torch.randn(2, 3, 32, 32), torch.arange(2), make_task("dkd+sort").eval()
    with pytest.raises(ValueError, match="needs to know the epoch"):
        task(images, target)
    losses = []
    for task.epoch in (1, 2):
        losses.append(task(images, target)["loss"])
    assert losses[0] != losses[1]
    with pytest.raises(TypeError, match="class indices"):
        task(images, torch.full((2, 5), 0.2))  # mixup
    with pytest.raises(ValueError, match="^task_loss_weight, temperature of timm's own loss"):
        make_task(temperature=2.0, task_loss_weight=0.5)
    with pytest.raises(ValueError, match="learns its temperature"):
        make_task("ctkd")


def test_timm_accumulates_gradients(make_task):
    images, target = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, -100, 4])
    whole, parts = make_task().eval(), make_task().eval()
    whole(images, target)["loss"].backward()
    parts.num_items = 5
    for part in (slice(0, 4), slice(4, 6)):
        parts(images[part], target[part])["loss"].backward()
    gradients, others = (
        torch.cat([each.grad.flatten() for each in task.trainable_module.parameters()])
        for task in (whole, parts))
    assert (gradients - others).norm() < 1e-5 * gradients.norm()


@pytest.mark.filterwarnings("ignore")
def test_lightning_learns_a_temperature(data, tmp_path):
    import lightning

    class Module(DistillationModuleMixin, lightning.LightningModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module = Module(Network(1), Network(0), DistillationLoss("ctkd+sort"))
    (before,) = [each.clone() for each in module.distillation_loss.parameters()]
    lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, DataLoader(data, BATCH))
    (after,) = module.distillation_loss.parameters()
    assert after != before


@pytest.mark.slow  # the import takes ten seconds; not in [dev]: pip install nvidia-modelopt
@pytest.mark.filterwarnings("ignore")
def test_modelopt_itself():
    distill = pytest.importorskip("modelopt.torch.distill")

    class LanguageModel(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)

        def forward(self, tokens):
            return 3 * self.head(torch.tanh(self.embedding(tokens)))

    student, teacher = LanguageModel(0), LanguageModel(1)
    tokens, labels = torch.randint(13, (2, 3, 8))
    labels[:, :3] = labels[0, 4:] = -100
    by_hand = copy.deepcopy(student)
    settings = {"teacher_model": teacher, "criterion": ModelOptLoss("kd+sort")}
    model = distill.convert(student, mode=[("kd_loss", settings)])
    model.train()  # which returns nothing
    loss, count = 0.0, (labels != -100).sum()
    for part in (slice(0, 1), slice(1, 3)):  # accumulating gradients
        model(tokens[part])
        loss += model.compute_kd_loss(labels=labels[part], num_items=count)
    loss.backward()
    expected = DistillationLoss("kd+sort")(by_hand(tokens), LanguageModel(1)(tokens), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.head.weight.grad, by_hand.head.weight.grad)
    model(tokens)
    with pytest.raises(ValueError, match="passed no labels"):
        model.compute_kd_loss()


@pytest.mark.parametrize("setting", ["use_liger_kernel", "use_uld_loss", "lmbda", "seq_kd"])
def test_trl_paths_in_which_nothing_would_be_sorted_are_refused(setting):
    class Trainer:  # as TRL's GKDTrainer and GOLDTrainer, which need models
        def __init__(self, **given):
            self.args = SimpleNamespace(**given)
            self.lmbda, self.seq_kd = given.get("lmbda", 0.0), given.get("seq_kd", False)

        def generalized_jsd_loss(self, *logits): ...

    class Sorted(SortedGKDMixin, Trainer): ...

    Sorted()
    with pytest.raises(ValueError, match=setting):
        Sorted(**{setting: 1})
