"""The configuration: one dataclass per concern; the defaults, a YAML file and ``key=value`` merge in that order.

Every field carries its meaning and unit in its metadata, so ``distprune config`` can print both. A point or a
length in training time is written ``2`` or ``"2 epochs"`` (fractions allowed) or ``"500 steps"``.
A file's ``base`` names files that are merged before it (distprune/settings.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

# Deliberately free of torch, deepspeed and transformers: `distprune config` answers at once.


COMPONENTS = (
    "attention",
    "feed_forward",
    "token_embedding",
    "position_embedding",
    "type_embedding",
    "pooler",
    "head",
)
ENCODER = COMPONENTS[:2]

T = TypeVar("T")


def key(default: Any, help: str) -> Any:
    """Return a dataclass field with its default and its one-line meaning."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RecipeConfig:
    """A rule, or a published recipe, that sets what is not given; ``recipe: NAME`` is short for its name."""

    name: str | None = key(
        None,
        "gmp, dense, one_shot, obert_10, obert_30, smc_gmp or sparse_transfer (docs/recipes.md); null: all is given",
    )
    epochs: float = key(2.0, "gmp, dense, one_shot and smc_gmp: epochs of the task's dense recipe, which is replicated")
    replicas: int | None = key(
        None, "gmp, dense, one_shot and smc_gmp: how often; null: as pruning.sparsity asks for, or once"
    )
    derived: list[str] = key([], "the keys that the recipe has set; written by distprune, not to be given")
    derived_by: str | None = key(None, "the recipe that has set them; written by distprune, not to be given")


@dataclass
class ModelConfig:
    """The student: which weights it starts from and how it is run."""

    path: str = key("???", "Hugging Face model directory or hub id that the student starts from")
    revision: str | None = key(None, "branch, tag or commit, for a hub id")
    tokenizer: str | None = key(None, "tokenizer directory or hub id; null: the one in model.path")
    freeze: list[str] = key([], "regexes of parameter names that are not trained, e.g. [embeddings]")
    dropout: float | None = key(None, "dropout of hidden states and attention, [0, 1); null: the model's own")
    activation_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")


@dataclass
class TeacherConfig:
    """The frozen dense model that the student is distilled from."""

    path: str | None = key(None, "fine-tuned model directory or hub id; needed where distillation.hardness > 0")
    revision: str | None = key(None, "branch, tag or commit, for a hub id")
    cache: str | None = key(
        "auto",
        "folder of the teacher's outputs for the training rows, computed once; auto: in the user's cache; null: none, "
        "the teacher is run in every step",
    )
    rebuild_cache: bool = key(False, "make the cache anew, also where there is one")


@dataclass
class TaskConfig:
    """The data and what is measured on it."""

    name: str = key(
        "text_classification",
        "text_classification, multiple_choice, question_answering, choice_by_masked_lm, masked_lm, causal_lm, or "
        "module:Class",
    )
    hub: str | None = key(None, "data set id on the hub; null: train and validation are local files")
    subset: str | None = key(None, "the hub data set's configuration, e.g. sst2 of glue")
    train: str = key("train", "training split of the hub data set, or a file: jsonl, jsonl.gz, csv, tsv, parquet, txt")
    validation: str = key("validation", "evaluation split or file; it may equal train where holdout is set")
    more_validation: list[str] = key([], "more splits or files to evaluate on, e.g. [validation_mismatched]")
    text: list[str] = key(["sentence"], "columns with the text: one, or two for pairs, e.g. [question, context]")
    choices: list[str] = key([], "multiple choice: the column of all choices, or a column for each; a.b is b within a")
    form: list[str] = key(
        [], "multiple choice: the text, or two, that a choice is read in, e.g. ['Q: {question}', 'A: {choice}']"
    )
    label: str = key("label", "column with the label: an integer class, a class name, or a number (regression)")
    labels: list[str] = key([], "class names in the order of their numbers; empty: taken from the training data")
    regression: bool = key(False, "predict a number instead of a class")
    metrics: list[str] = key(
        [],
        "what is measured, the main one first: accuracy, f1, macro_f1, matthews, pearson, spearman, exact_match, nll, "
        "perplexity; empty: those of the kind of task",
    )
    max_length: int = key(128, "tokens kept of an example, or of a window of one")
    stride: int = key(64, "question answering: tokens that a window shares with the next one")
    longest_answer: int = key(30, "question answering: tokens of the longest answer")
    mask: float = key(0.15, "masked language models: part of the tokens that is predicted, (0, 1)")
    bad_rows: str = key("refuse", "rows that cannot be used, such as one without a label: refuse or skip")
    too_long: str = key("truncate", "texts of more than max_length tokens: truncate, skip or refuse; all are counted")
    limit: int | None = key(None, "use only this many training examples, drawn by train.seed; null: all")
    holdout: float = key(0.0, "part of the training data that replaces validation, [0, 1), the same for all seeds")


@dataclass
class TrainConfig:
    """Length, batches, evaluation and output of a run."""

    output: str = key(
        "runs/run",
        "run directory, on a disk that all nodes share; an unfinished run in it goes on, anything else is refused",
    )
    epochs: float = key(10.0, "length of the run in epochs")
    batch_size: int = key(32, "examples in an optimizer step over all ranks")
    accumulation: int = key(1, "forward passes that an optimizer step is made of")
    eval_batch_size: int = key(64, "examples in an evaluation forward pass on one rank")
    eval_every: str = key("1 epochs", "time between evaluations")
    log_every: int = key(10, "optimizer steps between lines of metrics.jsonl")
    seed: int = key(42, "seed of data order, dropout and new weights")
    select: str = key("last", "which state at the target sparsity becomes final/: last, or best by the main metric")
    patience: int | None = key(None, "stop after this many evaluations at the target without a better one; null: never")
    deterministic: bool = key(False, "deterministic kernels, and a warning where there is none (slower on GPUs)")


@dataclass
class CheckpointConfig:
    """When the whole state of a run is saved, to go on from after an interruption (docs/checkpoints.md)."""

    epochs: bool = key(True, "save at the end of each epoch")
    steps: int | None = key(None, "save after every so many optimizer steps; null: not by steps")
    minutes: float | None = key(30.0, "save when so many minutes have passed since the last time; null: not by time")
    keep: int = key(2, "newest checkpoints that stay, beside the one with the best metric at the target sparsity")


@dataclass
class OptimizerConfig:
    """AdamW."""

    betas: list[float] = key([0.9, 0.999], "decay rates of the two moments")
    eps: float = key(1e-8, "added to the denominator")
    weight_decay: float = key(0.0, "decoupled weight decay; biases and norms have none")
    clip: float = key(1.0, "largest global norm of the unpruned weights' gradient; 0: no clipping")


@dataclass
class LrConfig:
    """Linear decay, rewound to the peak at given times."""

    peak: float = key(1e-4, "learning rate at the start of each cycle")
    final: float = key(1e-6, "learning rate at the end of each cycle")
    warmup: str = key("0 epochs", "time from 0 to the peak at the start of the run")
    rewind_every: str | None = key(None, "length of a cycle; null: one cycle, no rewinds")
    rewind_first: str | None = key(None, "time of the first rewind; null: after one cycle")


@dataclass
class PruningConfig:
    """Which weights are removed, how many, and when."""

    sparsity: float = key(0.0, "part of the prunable weights that is zero at the end, [0, 1); 0: dense training")
    initial: float = key(0.0, "sparsity of the first pruning, at start")
    start: str = key("2 epochs", "time of the first pruning")
    end: str = key("8 epochs", "time of the last pruning; the mask is fixed from there on")
    every: str = key("0.1 epochs", "time between prunings")
    components: list[str] = key(list(ENCODER), f"whose matrices are pruned: some of {', '.join(COMPONENTS)}")
    include: list[str] = key([], "regexes of weights to prune; empty: those of pruning.components")
    exclude: list[str] = key([], "regexes of weights to leave out of those")
    structure: str = key(
        "unstructured",
        "what goes together: unstructured, N:M (N kept of each M), RxC (blocks), heads or neurons",
    )
    scope: str = key("global", "what unstructured weights compete with: global, layer, tensor, or groups")
    groups: list[str] = key([], "regexes, each the weights of a group, where scope is groups")
    score: str = key(
        "magnitude",
        "what goes first has the smallest: magnitude, normalized_magnitude, taylor, movement, random, obs "
        "(oBERT's), or module:Class",
    )
    weights_of: str | None = key(
        None,
        "model directory or hub id whose weights are scored in place of the student's, e.g. the trained ones of a "
        "lottery ticket; null: the student's own",
    )
    start_sparse: bool = key(False, "zeros of the model are its first mask")


@dataclass
class RegrowthConfig:
    """Weights that change places with pruned ones while training goes on (RigL), at a sparsity that stays."""

    part: float = key(0.0, "of each matrix's kept weights, at first; falls by a cosine to a hundredth of it; 0: none")
    every: str = key("0.1 epochs", "time between exchanges, from the beginning on")


@dataclass
class FisherConfig:
    """The Fisher matrix behind pruning.score obs, estimated before each pruning from batches of their own."""

    block: int = key(50, "consecutive weights of a block; 1: the diagonal. A rank holds 4 * (block + 3) bytes a weight")
    samples: int = key(1024, "gradients, each the mean of a batch of train.batch_size examples")
    damping: float = key(1e-7, "added to the diagonal, > 0")
    dropout: bool = key(False, "leave dropout on, as SMC-Bench does")


@dataclass
class DistillationConfig:
    """Knowledge distillation: (1 - hardness) * task loss + hardness * T^2 KL(teacher || student), and features."""

    hardness: float = key(0.0, "weight of the teacher's loss, [0, 1]; 0 here, in hidden and in attention: no teacher")
    temperature: float = key(5.5, "softening T of both distributions, > 0")
    hidden: float = key(0.0, "weight of the squared error of hidden states; needs a live teacher of the same width")
    attention: float = key(0.0, "weight of the divergence of attention; needs a live teacher with as many heads")
    layers: list[int] = key([], "the teacher's layer that each of the student's follows, from 1; empty: evenly spread")

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher."""
        return max(self.hardness, self.hidden, self.attention) > 0


@dataclass
class DeepSpeedConfig:
    """DeepSpeed's own options, as in its JSON file, for each engine."""

    student: dict[str, Any] = key(
        {"zero_optimization": {"stage": 2}}, "the student's engine: ZeRO 0 to 3, bf16, offload, buckets, ..."
    )
    teacher: dict[str, Any] = key({"zero_optimization": {"stage": 3}}, "the teacher's engine: ZeRO 0 or 3, bf16, ...")


@dataclass
class WandbConfig:
    """One run in Weights & Biases, on global rank 0."""

    mode: str = key("disabled", "online, offline or disabled")
    project: str = key("distprune", "project")
    entity: str | None = key(None, "user or team")
    name: str | None = key(None, "name of the run; null: the run directory's name")
    group: str | None = key(None, "runs that belong together, as those of a sweep; null: none")
    tags: list[str] = key([], "tags")


@dataclass
class Config:
    """Everything a run is made of."""

    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    regrowth: RegrowthConfig = field(default_factory=RegrowthConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


SECTIONS: dict[str, Any] = get_type_hints(Config)
"""The class of each section."""


def dotted(sections: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Return what sections hold, by dotted key."""
    return {f"{section}.{name}": each for section, held in sections.items() for name, each in held.items()}


def describe() -> dict[str, str]:
    """Return the meaning of every key, by dotted key."""
    return dotted(
        {name: {each.name: each.metadata["help"] for each in fields(kind)} for name, kind in SECTIONS.items()}
    )


def value_of(config: Config, key: str, default: Any = None) -> Any:
    """Return the value at a dotted key; ``default`` for an option of DeepSpeed that is not set."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part, default) if isinstance(value, dict) else getattr(value, part, default)
    return value


def set_value(config: Config, key: str, value: Any) -> None:
    """Set the value of a dotted key."""
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
