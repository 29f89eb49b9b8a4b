"""Scores of lm-evaluation-harness, document by document, so that two variants are paired as on the book's own questions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from torch import nn


class LmEvalMissing(RuntimeError):
    """lm-evaluation-harness is not installed."""


def lm_eval_scores(model: nn.Module, tokenizer, tasks: Sequence[str | Path], limit: int | None = None, batch_size: int = 8
                   ) -> dict[str, Mapping[str, np.ndarray]]:
    """{task: {id [documents], and each metric by its name, fp64 [documents]}} of a model that is loaded.

    `tasks`: names, or paths of YAML files; their documents come from files or from the local cache, nothing is fetched. An id
    is a document's place and hash. With several filters a metric is "metric, filter". `stats.mcnemar` compares two arrays of
    0 and 1, `stats.swap_test` the difference of any two. Sets Python's, numpy's and torch's seeds, as lm_eval does. Raises
    LmEvalMissing, ValueError for a task that is neither, and what reading its documents raises.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LmEvalMissing("lm-evaluation-harness is not installed: pip install 'lm-eval==0.4.13'") from error
    manager = TaskManager(include_defaults=not all(Path(t).is_file() for t in tasks))  # looking for thousands takes seconds
    if unknown := [t for t in map(str, tasks) if not Path(t).is_file() and t not in manager.task_index]:
        raise ValueError(f"tasks: {unknown[0]!r} is no task of lm-evaluation-harness and no YAML file")
    # HFLM ties the head to the embedding again, even one that was quantized apart from it; offline is read at import
    with (patch.object(model, "tie_weights", lambda *_, **__: None), patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
          patch("datasets.config.HF_HUB_OFFLINE", True)):
        found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(map(str, tasks)),
                                limit=limit, task_manager=manager, bootstrap_iters=0)
    return {task: _arrays(samples) for task, samples in found["samples"].items()}


def _arrays(samples: Sequence[Mapping]) -> dict[str, np.ndarray]:
    filters = list(dict.fromkeys(s["filter"] for s in samples))
    by_filter = {f: sorted((s for s in samples if s["filter"] == f), key=lambda s: s["doc_id"]) for f in filters}
    arrays = {"id": np.array([f"{s['doc_id']}-{s['doc_hash'][:10]}" for s in by_filter[filters[0]]])}
    for f, of in by_filter.items():
        arrays |= {metric if len(filters) == 1 else f"{metric}, {f}": np.array([s[metric] for s in of], dtype=float)
                   for metric in of[0]["metrics"]}
    return arrays
