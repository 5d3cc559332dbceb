"""``distprune oneshot``: prune a model directory without training it.

A score of the weights alone reads one file after the other. One that needs gradients takes them from one batch of a
configuration's data, by the engine that a run would use.
"""

from distprune import dist, settings, turns
from distprune.checks.sections import SCORING, SEED
from distprune.errors import UserError
from distprune.models.files import gone_if_it_fails
from distprune.models.pruned import prune_files
from distprune.monitor.records import write_json
from distprune.paths import expanded
from distprune.pruning.scores import build_score
from distprune.training.one_step import for_one_pruning, prune_by_gradients
from distprune.training.setup import local_model

_RECORDED = ("structure", "scope", "groups", "score", "start_sparse", "components", "include", "exclude", "sparsity")


def run(model_dir: str, out: str, config_path: str | None, overrides: list[str]) -> None:
    """Write a copy of a model whose smallest weights are zero. Collective: every rank calls it."""
    # A configuration's own revision is that of its own model.
    config = settings.load(config_path, ["model.revision=null", *overrides])
    config.model.path, config.train.output = model_dir, out
    for_one_pruning(config)
    settings.validate(config, (SEED, *SCORING))
    pruning, target = config.pruning, expanded(out)
    score = build_score(pruning.score, config.train.seed)
    trains = score.reads_gradients or score.accumulates
    if trains and config_path is None:
        raise UserError(
            f"pruning.score is {pruning.score!r}, which needs gradients; allowed: with a CONFIG, whose data give them"
        )
    if trains or dist.detect().size > 1:
        dist.init()
    if trains:
        made = prune_by_gradients(config, target)
    else:
        source = local_model(model_dir, config.model.revision)
        made = prune_files(source, target, pruning, score, config.model.freeze)
    counts = {"masked_weights": made.masked, "prunable_weights": made.prunable, "threshold": made.threshold}
    chosen = {key: getattr(pruning, key) for key in _RECORDED}

    def finish() -> None:
        sparsity = made.masked / made.prunable
        record = {"method": "one-shot", "sparsity_masked": sparsity, **counts, "pruning": chosen}
        write_json(made.directory / "pruning.json", record)
        made.directory.rename(target)

    with gone_if_it_fails(made.directory):
        turns.write_on_main(finish, target)
    if dist.is_main():
        print(f"masked {made.masked} of {made.prunable} weights -> {target}")
    dist.shutdown()
