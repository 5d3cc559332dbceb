"""``distprune eval``: measure a model directory on a configuration's task, under any launcher or alone."""

import json
import sys

from distprune import dist, settings
from distprune.engines.build import build_frozen
from distprune.engines.evaluate import evaluate
from distprune.engines.options import precision_of
from distprune.models.export import count_zeros
from distprune.models.files import match_names, read_config
from distprune.models.weights import skeleton
from distprune.monitor.jsonl import finite
from distprune.pruning.targets import matrices_of
from distprune.training.fit import check_limits
from distprune.training.setup import load_task, local_model


def run(model_dir: str, config_path: str, overrides: list[str]) -> None:
    """Print the metrics and the sparsity of a model as one line of JSON. Collective: every rank calls it.

    The model runs as the teacher's engine would: replicated at ZeRO 0, sharded at ZeRO 3, in its type of weights.
    """
    dist.init()
    named = json.dumps(model_dir.replace("${", "\\${"), ensure_ascii=False)  # neither YAML nor an interpolation
    config = dist.agree(
        lambda: settings.load_valid(config_path, ["model.revision=null", *overrides, f"model.path={named}"])
    )
    directory = local_model(config.model.path, config.model.revision)
    task = load_task(config, directory)
    dist.agree(lambda: task.check_labels(read_config(directory), "the model"))
    model, _ = dist.agree(lambda: skeleton(directory, task.auto_class, task.model_options(), shrunk_allowed=True))
    dist.agree(lambda: check_limits(model, task))
    for note in task.notes if dist.is_main() else ():
        print(f"data: {note}", file=sys.stderr)  # beside the line of JSON
    engine = build_frozen(
        config.deepspeed.teacher,
        directory,
        task.auto_class,
        task.model_options(),
        config.train.eval_batch_size,
    )
    metrics = evaluate(engine, task, config.train.eval_batch_size)
    if dist.is_main():
        counts = count_zeros(directory)
        stored = match_names(sorted(matrices_of(engine.module)), list(counts), engine.module.base_model_prefix)
        zeros = sum(counts[name].zeros for name in stored.values())
        weights = sum(counts[name].elements for name in stored.values())
        dtype = precision_of(config.deepspeed.teacher)
        line = {"model": model_dir, "dtype": dtype, **metrics, "encoder_zeros": zeros, "encoder_weights": weights}
        if (remark := task.remark(metrics)) is not None:
            print(remark, file=sys.stderr)
        print(json.dumps(finite(line), allow_nan=False))
    dist.shutdown()
