"Sorting in the trainers of transformers and TRL: what chapters 64 and 65 do not show."
import copy
import os
import socket
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import default_collate

from sortkd import DistillationLoss, sort_logits
from sortkd.loops.transformers import DistillationTrainerMixin
from sortkd.loops.trl import SortedGKDMixin

CLASSES = 7
SETTINGS = dict(
    use_cpu=True, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0, max_grad_norm=0.0,
    max_steps=1, train_sampling_strategy="sequential", dataloader_pin_memory=False,
    logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
pytestmark = pytest.mark.filterwarnings("ignore")


class Network(nn.Module):
    "Logits `(B, T, V)` of tokens `(B, T)`, in double precision."
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(CLASSES, 8, dtype=torch.float64)
        self.head = nn.Linear(8, CLASSES, dtype=torch.float64)

    def forward(self, input_ids):
        return 3 * self.head(torch.tanh(self.embedding(input_ids)))


class NetworkWithMore(Network):
    "Takes any keyword, by which the Trainer believes that it scales its loss itself."
    def forward(self, input_ids, **named):
        return super().forward(input_ids)


class NetworkWithLabels(Network):
    def forward(self, input_ids, labels=None):
        return super().forward(input_ids)


def weights(network):
    return parameters_to_vector(network.parameters())


@pytest.fixture
def tokens():
    "Four examples of eight tokens, of which 8, 6, 1 and 1 count."
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(CLASSES, (2, 4, 8), generator=generator).unbind()
    labels[1, :2] = labels[2:, 1:] = -100
    labels[2:] = labels[2:].flip(1)
    return [{"input_ids": one, "labels": other} for one, other in zip(tokens, labels)]


@pytest.fixture
def quick_hub(monkeypatch):
    "Nothing is downloaded, and no memory is collected after each training, which takes longer."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def create_trainer(folder, model, data, teacher="the usual", method="kd+sort", causal_lm=False,
                   compute_loss_func=None, loss=None, **settings):
    from transformers import Trainer, TrainingArguments

    class DistillationTrainer(DistillationTrainerMixin, Trainer): ...

    own = dict(remove_unused_columns=False, label_names=["labels"])
    return DistillationTrainer(
        model=model, args=TrainingArguments(str(folder), **SETTINGS | own | settings),
        train_dataset=data, eval_dataset=data, compute_loss_func=compute_loss_func,
        causal_lm=causal_lm, teacher=Network(0) if teacher == "the usual" else teacher,
        distillation_loss=DistillationLoss(method) if loss is None else loss)


@pytest.fixture
def make_trainer(tmp_path, tokens, quick_hub):
    def make(model, data=tokens, *others, **settings):
        return create_trainer(tmp_path, model, data, *others, **settings)
    return make


@pytest.mark.parametrize("network", [Network, NetworkWithMore])
@pytest.mark.parametrize(("causal_lm", "options"), [
    (False, {}), (True, {}), (False, {"ignore_index": 3}), (True, {"reduction": "sum"})])
def test_trainer_accumulates_the_gradient_of_the_whole_batch(make_trainer, tokens, network,
                                                             causal_lm, options):
    for example in tokens if "ignore_index" in options else ():
        example["labels"][example["labels"] == -100] = 3
    batch, loss = default_collate(tokens), DistillationLoss("kd+sort", **options)
    target = batch["labels"]
    if causal_lm:
        target = F.pad(target[:, 1:], (0, 1), value=-100)
    by_hand, inputs = Network(1), batch["input_ids"]
    loss(by_hand(inputs), Network(0)(inputs), target).backward()
    torch.optim.SGD(by_hand.parameters(), lr=1.0).step()
    for size in (4, 2, 1):
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        student = network(1)
        make_trainer(student, causal_lm=causal_lm, loss=loss, **sizes).train()
        assert (weights(student) - weights(by_hand)).abs().max() < 1e-9
    assert (weights(by_hand) - weights(Network(1))).abs().max() > 1e-2


@pytest.mark.parametrize("teacher", [Network(0), NetworkWithLabels(0), None])
def test_trainer_evaluates_and_predicts_with_the_model_alone(make_trainer, tokens, teacher):
    "Networks return logits alone; labels are never inputs, though a teacher may name them."
    batch = default_collate(tokens)
    trainer = make_trainer(Network(1), teacher=teacher, method="kd+sort" if teacher else "ce")
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"])
    predicted = trainer.predict(tokens)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "ctkd"}, "learns its temperature"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ({"compute_loss_func": lambda outputs, labels, **_: 0.0}, "compute_loss_func"),
    ({"method": "dist", "gradient_accumulation_steps": 2}, "dist relates the rows")])
def test_trainer_refuses_what_would_have_no_effect(make_trainer, options, message):
    network = Network(1)
    network.config = types.SimpleNamespace()  # which the Trainer reads to smooth labels
    with pytest.raises(ValueError, match=message):
        make_trainer(network, **options)


def test_trainer_refuses_what_it_cannot_train_on(make_trainer, tokens):
    trainer = make_trainer(Network(1), causal_lm=None)
    for mode in (True, False):
        with pytest.raises(ValueError, match="'labels', but it holds input_ids"):
            trainer.compute_loss(trainer.model.train(mode), {"input_ids": tokens[0]["input_ids"]})
        with pytest.raises(ValueError, match="need causal_lm"):
            trainer.compute_loss(trainer.model, default_collate(tokens))


def test_a_loss_that_a_trainer_computes_itself_is_not_replaced(quick_hub):
    "The user's own, TRL's and those of every library; transformers' and SFT's cross-entropy are."
    import transformers
    from trl import DistillationTrainer, SFTTrainer
    from trl.experimental.gkd import GKDTrainer

    class Weighted(transformers.Trainer):
        def compute_loss(self, model, inputs, **named):
            return 2 * super().compute_loss(model, inputs, **named)

    for base in (Weighted, DistillationTrainer, GKDTrainer):
        with pytest.raises(ValueError, match=f"^{base.__name__} has a loss of its own"):
            type("Mixed", (DistillationTrainerMixin, base), {})(
                teacher=None, distillation_loss=DistillationLoss("ce"))
    with pytest.raises(TypeError, match="model"):
        type("Mixed", (DistillationTrainerMixin, SFTTrainer), {})(
            teacher=None, distillation_loss=DistillationLoss("ce"))


@pytest.mark.parametrize("with_types", ["student", "teacher"])
def test_each_network_has_the_columns_that_it_names(make_trainer, with_types):
    "A DistilBERT, which knows no token types, and a BERT, which needs them; a column for neither."
    import datasets
    import transformers
    torch.manual_seed(4)
    small = dict(
        vocab_size=11, num_labels=CLASSES, max_position_embeddings=8, initializer_range=0.5)
    distilbert = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        dim=8, hidden_dim=8, n_layers=1, n_heads=2, dropout=0, attention_dropout=0,
        seq_classif_dropout=0, **small))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, **small))
    columns = {"input_ids": torch.randint(11, (8, 6)), "attention_mask": torch.ones(8, 6).long()}
    typed = columns | {"token_type_ids": torch.arange(6).gt(2).long().repeat(8, 1)}
    target = torch.randint(CLASSES, (8,))
    parts = {bert: typed, distilbert: columns}
    student, teacher = (bert, distilbert) if with_types == "student" else (distilbert, bert)
    lists = {name: value.tolist() for name, value in (typed | {"labels": target}).items()}
    examples = datasets.Dataset.from_dict(lists | {"text": ["a pair; of texts"] * 8})
    by_hand, seen = copy.deepcopy(student), []
    with torch.no_grad():
        teacher_logits = teacher.eval()(**parts[teacher]).logits
        untyped = bert.eval()(**columns).logits
        assert (bert(**typed).logits - untyped).abs().max() > 1e-2
    DistillationLoss("kd+sort")(by_hand(**parts[student]).logits, teacher_logits, target).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.05).step()
    settings = dict(remove_unused_columns=True, label_names=None, learning_rate=0.05)
    trainer = make_trainer(student, examples, teacher, **settings)
    student.register_forward_pre_hook(
        lambda _, __, named: seen.append(set(named) - {"return_dict"}), with_kwargs=True)
    trainer.train()
    assert (weights(student) - weights(by_hand)).abs().max() < 1e-6
    trainer.predict(examples.remove_columns("labels"))
    assert seen == [set(parts[student])] * 2


def _train_in_process(rank, processes, port, path):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(CLASSES, (2, 8, 8), generator=generator).unbind()
    for row, length in enumerate((8, 6, 1, 1, 3, 2, 8, 1)):
        labels[row, length:] = -100
    student = Network(1)
    data = [{"input_ids": one, "labels": other} for one, other in zip(tokens, labels)]
    create_trainer(path.parent, student, data, per_device_train_batch_size=2,
                   gradient_accumulation_steps=4 // processes).train()
    if rank == 0:
        torch.save(weights(student), path)


@pytest.mark.slow
def test_processes_make_the_step_of_one(tmp_path):
    for processes in (1, 2):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        arguments = processes, port, tmp_path / str(processes)
        torch.multiprocessing.spawn(_train_in_process, arguments, processes)
    one, two = (torch.load(tmp_path / name) for name in "12")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.fixture
def make_gkd(tmp_path, quick_hub):
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class SortedGKDTrainer(SortedGKDMixin, GKDTrainer): ...

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"w0": 0, "w1": 1}, unk_token="w0")),
        pad_token="w0", eos_token="w1", unk_token="w0")
    torch.manual_seed(0)
    tokens = torch.randint(2, 13, (4, 8))
    labels = tokens.clone()
    labels[1:, :3] = labels[1, 6:] = labels[2:, :7] = -100  # 7, 3, 1 and 1 tokens count
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    data = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})

    def make(kind=SortedGKDTrainer, **settings):
        torch.manual_seed(1)
        config = transformers.GPT2Config(
            vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1,
            eos_token_id=1, initializer_range=0.5, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        student, teacher = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
        own = dict(bf16=False, gradient_checkpointing=False, lmbda=0.0, learning_rate=0.1)
        arguments = GKDConfig(str(tmp_path), **SETTINGS | own | settings)
        return kind(
            model=student, teacher_model=teacher, args=arguments, processing_class=tokenizer,
            train_dataset=data, data_collator=transformers.default_data_collator)

    make.batch, make.plain = batch, GKDTrainer
    return make


def test_trl_sorts_before_its_divergence(make_gkd):
    beta = 0.5  # chapter 65 has 0
    trainer, plain, batch = make_gkd(beta=beta), make_gkd(make_gkd.plain, beta=beta), make_gkd.batch
    counts = batch["labels"][:, 1:] != -100
    student, teacher = (model(batch["input_ids"]).logits[:, :-1][counts]
                        for model in (trainer.model, trainer.teacher_model))
    labels = batch["labels"][:, 1:][counts]
    log_q, log_p = student.log_softmax(1), sort_logits(teacher, labels).log_softmax(1)
    mixture = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    expected = beta * log_p.exp() * (log_p - mixture)
    expected = expected + (1 - beta) * log_q.exp() * (log_q - mixture)
    expected = expected.sum(1).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)
    assert abs(plain.compute_loss(plain.model, batch) - expected) > 1e-3, "without sorting"


def test_a_class_in_which_nothing_would_be_sorted_is_refused(make_gkd):
    import trl
    for bases in ((SortedGKDMixin, trl.DistillationTrainer), (make_gkd.plain, SortedGKDMixin)):
        with pytest.raises(TypeError, match="write class Sorted.SortedGKDMixin, GKDTrainer"):
            type("Sorted", bases, {})
