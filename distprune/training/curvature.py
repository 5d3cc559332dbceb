"""Gradients that are taken for a score alone, before a pruning: of the task's loss, and no step follows them."""

from collections.abc import Callable
from itertools import count, islice

import torch

from distprune.config import Config
from distprune.engines.batches import rank_part, stream_seed, train_batches
from distprune.engines.evaluate import on_device
from distprune.pruning.pruner import Pruner
from distprune.training.setup import Setup


def estimate(config: Config, setup: Setup, pruner: Pruner, step: int, before_each: Callable[[], None]) -> None:
    """Let the pruner's score know ``fisher.samples`` gradients of whole batches. Collective: every rank calls it.

    Args:
        config: of the run.
        setup: whose student and data are used.
        pruner: whose score is told.
        step: with the seed it says which batches; they are drawn as a run's are, by epochs of their own.
        before_each: is called on every rank before each of them, and may end it: nothing of the run has changed.
    """
    student, task, world = setup.student, setup.task, setup.world
    seed = stream_seed(config.train.seed, step, [])
    lengths, size = task.train["length"], config.train.batch_size
    batches = (batch.tolist() for epoch in count() for batch in train_batches(lengths, size, seed, epoch))
    student.train(config.fisher.dropout)
    for module in student.module.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # this alone and not what is in it: else transformers keeps all activations
    for sample, batch in enumerate(islice(batches, config.fisher.samples)):
        before_each()
        parts, draw = rank_part(batch, world.rank, world.size, config.train.accumulation), stream_seed(seed, sample, [])
        for number, rows in enumerate(parts, start=1):
            micro_batch = on_device(task.collate(task.train.__getitems__(rows), draw), student)
            student.set_gradient_accumulation_boundary(number == len(parts))
            torch.manual_seed(stream_seed(seed, sample, rows))  # dropout, the same where a run goes on
            logits = task.logits(task.run(student, micro_batch), micro_batch)
            student.backward(task.loss(logits, micro_batch))
        pruner.learn()
    student.set_gradient_accumulation_boundary(None)
    student.train()
