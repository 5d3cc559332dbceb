"""Windows of questions on real ranks: the same answers at every world size."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from distprune import settings
from distprune.engines.build import build_frozen
from distprune.engines.evaluate import evaluate
from distprune.tasks import build_task
from distprune.training.setup import load_task, local_model
from tests.unit.task_files import WORDS, make_tokenizer
from tests.world import Worlds, by_world

QUESTIONS = 23


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model and of questions, most of them with several windows and some without an answer."""
    directory, rng = tmp_path_factory.mktemp("squad"), random.Random(1)
    rows = []
    for number in range(QUESTIONS):
        words = rng.choices("abcdefghij", k=rng.randint(3, 40))
        start = rng.randrange(len(words) - 2)
        texts = [" ".join(words[start : start + size]) for size in (1, 2, 3)]
        answers = {"text": texts, "answer_start": [2 * start] * 3}
        nothing: dict[str, list[str]] = {"text": [], "answer_start": []}
        rows.append({"question": "a b", "context": " ".join(words), "answers": answers if number % 4 else nothing})
    for name in ("train", "validation"):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(WORDS), initializer_range=1.0, **sizes))
    model.save_pretrained(directory / "model")
    make_tokenizer(cls_token="[CLS]", sep_token="[SEP]").save_pretrained(directory / "model")
    (directory / "run.yaml").write_text(f"""
model: {{path: {directory}/model}}
task:
  name: question_answering
  train: {directory}/train.jsonl
  validation: {directory}/validation.jsonl
  text: [question, context]
  label: answers
  max_length: 17
  stride: 4
  longest_answer: 4
pruning: {{sparsity: 0}}
distillation: {{hardness: 0}}
""")
    return directory


def measured(directory: Path) -> dict[str, float]:
    """Evaluate the model in batches of four windows. Collective."""
    config = settings.load_valid(str(directory / "run.yaml"), [])
    path = local_model(config.model.path, None)
    task = load_task(config, path)
    engine = build_frozen(config.deepspeed.teacher, path, task.auto_class, task.model_options(), 4)
    found = evaluate(engine, task, 4)
    engine.destroy()
    return found


@by_world
def test_answers_are_the_same_at_every_world_size(world: Worlds, squad: Path, size: int) -> None:
    config = settings.load_valid(str(squad / "run.yaml"), [])
    task = build_task(config, make_tokenizer(cls_token="[CLS]", sep_token="[SEP]"))
    assert len(task.validation) > 2 * QUESTIONS
    model = BertForQuestionAnswering.from_pretrained(squad / "model").eval()
    with torch.no_grad():
        alone = [task.collate([row]) for row in task.validation]
        logits = torch.cat([task.predictions(task.forward(model, batch), batch) for batch in alone])
    expected = task.metrics(logits, task.validation)
    assert 0 < expected["exact_match"] < expected["f1"] < 0.9
    assert world(size).run(measured, squad) == [expected] * size
