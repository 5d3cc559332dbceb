"""What a step minimises, against the formulas written out on a small model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import BartConfig, BertConfig, BertForSequenceClassification, FNetConfig

from distprune.config import DistillationConfig
from distprune.errors import UserError
from distprune.teachers.live import LiveTeacher
from distprune.training.distill import attention_loss, hidden_loss, layer_pairs
from distprune.training.objective import Objective, check_features
from tests.unit.task_files import WORDS

SIZES = {"vocab_size": len(WORDS), "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


def model(layers: int, seed: int, **sizes: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    built = BertForSequenceClassification(BertConfig(**SIZES | sizes, num_hidden_layers=layers)).eval()
    built.set_attn_implementation("eager")
    with torch.no_grad():
        built.classifier.weight.mul_(50)  # or all logits are alike
        for layer in built.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(50)  # or all attention is uniform, and its divergence rounding
    return built


@pytest.fixture
def batch_of(build):
    task = build()
    rows = [0, 3, 4]
    return task, task.collate([task.train[row] for row in rows]), rows


def test_all_parts_add_up(batch_of) -> None:
    task, batch, rows = batch_of
    student, teacher = model(2, 0), model(4, 1)
    config = DistillationConfig(hardness=0.75, temperature=3.0, hidden=0.5, attention=2.0)
    losses = Objective(task, LiveTeacher(teacher, task), config).losses(student, batch, rows)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    options = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = student(**inputs, **options), teacher(**inputs, **options)
    real = batch["attention_mask"].bool()

    def by_row(values: torch.Tensor) -> float:
        return sum(row[mask].mean().item() for row, mask in zip(values, real, strict=True)) / len(rows)

    squares = [(ours.hidden_states[a] - theirs.hidden_states[b]).square() for a, b in ((1, 2), (2, 4))]
    hidden = sum(map(by_row, squares))
    attention = 0.0
    for a, b in ((0, 1), (1, 3)):
        kl = F.kl_div(ours.attentions[a].clamp_min(1e-6).log(), theirs.attentions[b].clamp_min(1e-6), reduction="none")
        attention += by_row(kl.sum(-1).mean(1))
    soft = F.kl_div(F.log_softmax(ours.logits / 3, -1), F.softmax(theirs.logits / 3, -1), reduction="batchmean")
    assert losses.task.item() == pytest.approx(F.cross_entropy(ours.logits, batch["labels"]).item())
    assert losses.distillation.item() == pytest.approx(9 * soft.item(), rel=1e-4)
    assert losses.hidden.item() == pytest.approx(hidden / 2, rel=1e-5)
    assert losses.attention.item() == pytest.approx(attention / 2, rel=1e-4)
    total = 0.25 * losses.task + 0.75 * losses.distillation + 0.5 * losses.hidden + 2 * losses.attention
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)
    losses.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(batch_of) -> None:
    task, batch, rows = batch_of
    same = model(2, 0)
    config = DistillationConfig(hardness=1.0, hidden=1.0, attention=1.0)
    losses = Objective(task, LiveTeacher(same, task), config).losses(same, batch, rows)
    assert losses.total.item() == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_there_is_the_task_alone(batch_of) -> None:
    task, batch, rows = batch_of
    losses = Objective(task, None, DistillationConfig()).losses(model(1, 0), batch, rows)
    assert losses.total is losses.task
    assert losses[2:] == (0, 0, 0)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    before = hidden_loss(student, teacher, mask)
    student[mask == 0] += 100
    assert torch.equal(hidden_loss(student, teacher, mask), before)
    ours, theirs = (torch.rand(2, 2, 3, 3).softmax(-1) for _ in range(2))
    before = attention_loss(ours, theirs, mask)
    ours[:, :, 2] = torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(attention_loss(ours, theirs, mask), before)
    assert torch.isfinite(attention_loss(torch.eye(3).expand(2, 2, 3, 3), theirs, mask))


def test_parts_of_a_batch_weigh_alike_however_long_their_rows_are() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    hidden = torch.randn(2, 2, 3, 4)
    attention = torch.rand(2, 2, 2, 3, 3).softmax(-1)
    for loss, (ours, theirs) in ((hidden_loss, hidden), (attention_loss, attention)):
        parts = [loss(ours[[row]], theirs[[row]], mask[[row]]) for row in (0, 1)]
        assert loss(ours, theirs, mask) == pytest.approx(sum(parts) / 2)


def test_layers_are_spread_or_as_given() -> None:
    assert layer_pairs([], 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert layer_pairs([], 6, 6) == [(layer, layer) for layer in range(6)]
    assert layer_pairs([], 4, 6)[-1] == (3, 5)
    assert layer_pairs([1, 6], 2, 6) == [(0, 0), (1, 5)]
    for layers in ([1], [1, 7], [0, 1]):
        with pytest.raises(UserError, match=r"allowed: one of the teacher's layers 1 to 6 for each of the student's 2"):
            layer_pairs(layers, 2, 6)


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (DistillationConfig(hidden=1.0), {"hidden_size": 12}, "hidden states of 8 and the teacher hidden states of 12"),
        (DistillationConfig(attention=1.0), {"num_attention_heads": 4}, "attention heads: 2 and the teacher attention"),
        (DistillationConfig(hidden=1.0, layers=[1, 13]), {}, "allowed: one of the teacher's layers 1 to 12 for each"),
    ],
)
def test_what_cannot_be_compared_is_refused(config, sizes, message) -> None:
    student = BertConfig(**SIZES, num_hidden_layers=2)
    with pytest.raises(UserError, match=message):
        check_features(config, student, BertConfig(**SIZES | sizes, num_hidden_layers=12))
    check_features(DistillationConfig(hardness=1.0), student, BertConfig(**SIZES | sizes, num_hidden_layers=12))


def test_models_without_attention_are_compared_by_their_logits() -> None:
    student = FNetConfig()
    check_features(DistillationConfig(hardness=1.0), student, student)
    with pytest.raises(UserError, match="the student has attention heads: None and the teacher attention heads: None"):
        check_features(DistillationConfig(attention=1.0), student, student)


def test_tokens_without_a_mask_all_count(batch_of) -> None:
    task, batch, rows = batch_of
    objective = Objective(task, LiveTeacher(model(2, 1), task), DistillationConfig(hidden=1.0))
    masked = objective.losses(model(2, 0), batch, rows)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = objective.losses(model(2, 0), batch, rows)
    assert masked.hidden != expected.hidden, "the batch has padding"
    del batch["attention_mask"]
    assert objective.losses(model(2, 0), batch, rows) == expected


def test_models_whose_layers_are_not_those_of_tokens_are_refused(batch_of) -> None:
    two_stacks = BartConfig()
    with pytest.raises(UserError, match="a bart has two stacks of layers; allowed with it: distillation"):
        check_features(DistillationConfig(hidden=1.0), two_stacks, two_stacks)
    task, batch, rows = batch_of
    student, teacher = model(2, 0), model(2, 1)
    whole = student.forward
    for given in (None, (None, None), (torch.zeros(3, 2, 8), torch.zeros(3, 2, 8))):
        student.forward = lambda given=given, **inputs: replace(whole(**inputs), hidden_states=given, attentions=given)
        for config in (DistillationConfig(hidden=1.0), DistillationConfig(attention=1.0)):
            with pytest.raises(UserError, match="the student does not put out what each layer has"):
                Objective(task, LiveTeacher(teacher, task), config).losses(student, batch, rows)
