"""The README.md of a trained model, with the hub's metadata."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

HUB_METRICS = {
    "macro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
_PACKED = b"**Packed**: what follows holds once `distprune export DIR OUT` has unpacked it.\n\n"
_FRONT_MATTER = re.compile(rb"---\r?\n.*?\n---\r?\n(\r?\n)?", re.DOTALL)


def model_card(
    summary: Mapping[str, Any],
    auto_class: str,
    task_type: str,
) -> str:
    """Return the README.md of a pruned or a dense model, for the hub or a directory.

    Local paths are named by their last two parts only.

    Args:
        summary: the run's: ``base_model``, ``teacher`` (or null), ``task`` (hub id or path of the data),
            ``metric_name``, ``final_metric``, ``dense_metric`` (or null), ``method``, ``sparsity_masked``,
            ``masked_weights``, ``prunable_weights``, ``zeros_in_file``, ``encoder_sparsity``,
            ``model_sparsity``.
        auto_class: the class of transformers that loads the model.
        task_type: the hub's name of the task.
    """
    base, data = _short(summary["base_model"]), _short(summary["task"])
    metric, sparsity = summary["metric_name"].replace("_", " "), summary["sparsity_masked"]
    dense = "" if summary["dense_metric"] is None else f" (dense: {summary['dense_metric']:.4f})"
    teacher = "" if summary["teacher"] is None else f" and distilled from `{_short(summary['teacher'])}`"
    title, rows, stored = f"{base}, fine-tuned", "", ""
    text = f"`{base}` trained on `{data}`{teacher} with distprune."
    if summary["masked_weights"]:
        title = f"{base}, {100 * sparsity:.4g} % pruned"
        text = f"""`{base}` trained on `{data}`{teacher} and pruned:
{summary["method"]}, with distprune after [arXiv 2312.13547](https://arxiv.org/abs/2312.13547)."""
        rows = f"""
| pruned weights | {summary["masked_weights"]:,} of {summary["prunable_weights"]:,} ({sparsity:.2%}) |
| zeros in the prunable matrices, as written | {summary["zeros_in_file"]:,} |
| sparsity of the layers' matrices | {summary["encoder_sparsity"]:.2%} |
| sparsity of the whole model | {summary["model_sparsity"]:.2%} |"""
        stored = "The pruned weights are stored as zeros: the file is as large as the dense one. "
    return f"""---
{_front_matter(summary, data, task_type)}
---

# {title}

{text}

| | |
| --- | --- |
| {metric} | {summary["final_metric"]:.4f}{dense} |{rows}

{stored}transformers alone loads it:

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/of/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")
```
"""


def mark_card(path: Path, packed: bool) -> None:
    """Say in a model's README.md, where there is one, that it has to be unpacked first; or no longer say so."""
    if not path.exists():
        return
    text = path.read_bytes().replace(_PACKED, b"")
    end = _FRONT_MATTER.match(text)
    place = end.end() if end else 0
    path.write_bytes(text[:place] + _PACKED + text[place:] if packed else text)


def _front_matter(summary: Mapping[str, Any], data: str, task_type: str) -> str:
    """Return the hub's metadata as YAML."""
    metric, pruned = summary["metric_name"], summary["masked_weights"] > 0
    base = _short(summary["base_model"]).removesuffix("/final")  # of a run, which has a better name
    result = EvalResult(
        task_type=task_type,
        dataset_type=data,
        dataset_name=data,
        metric_type=HUB_METRICS.get(metric, metric),
        metric_name=metric.replace("_", " "),
        metric_value=summary["final_metric"],
    )
    return ModelCardData(
        base_model=summary["base_model"] if _on_hub(summary["base_model"]) else None,
        datasets=[data] if _on_hub(summary["task"]) else None,
        library_name="transformers",
        pipeline_tag=task_type,
        tags=["pruned", "distprune"] if pruned else ["distprune"],
        metrics=[result.metric_type],
        model_name=f"{Path(base).name}-{'pruned' if pruned else 'fine-tuned'}",
        eval_results=[result],
    ).to_yaml()


def _on_hub(name: str) -> bool:
    """Return whether a name is a hub id and not a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def chosen_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``pruning.json`` says of how the weights were chosen: sections, local paths as in the card."""
    of = config["pruning"]["weights_of"]
    pruning = config["pruning"] | {"weights_of": None if of is None else _short(of)}
    return {"pruning": pruning, "regrowth": config["regrowth"], "distillation": config["distillation"]}


def _short(name: str) -> str:
    """Return a hub id as it is, and the last two parts of a path."""
    return name if _on_hub(name) else "/".join(Path(name).resolve().parts[-2:])
