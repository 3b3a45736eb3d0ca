"""The pictures of a training run: how the loss fell and how retrieval improved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


def _new_figure(title: str, ylabel: str) -> tuple[Figure, Axes]:
    # a figure of its own instead of pyplot: no global state, no window system
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _series(history: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in history if key in record]
    return [step for step, _ in found], [value for _, value in found]


def plot_loss(history: Sequence[Record], path: Path, name: str) -> None:
    """Draw "loss" (left axis) and, where the loss reports one, a share of the batch (right axis) over "step".

    The share is "accuracy" or "active_share", whichever is logged. The picture is a PNG.

    Args:
        history: log records; those without "loss" are passed over.
        path: the file to write.
        name: what the loss is called in the title.
    """
    figure, axes = _new_figure(f"{name} while training", "loss (mean over the logging interval)")
    lines = axes.plot(*_series(history, "loss"), color="tab:blue", label="loss")
    axes.set_ylim(bottom=0)
    for key, label in (("accuracy", "in-batch accuracy"), ("active_share", "share of triplets with a loss")):
        steps, share = _series(history, key)
        if not steps:
            continue
        right = axes.twinx()
        lines += right.plot(steps, share, color="tab:orange", linestyle="--", label=label)
        right.set_ylabel(label)
        right.set_ylim(0, 1)
        right.spines["top"].set_visible(False)
    axes.legend(handles=lines, loc="center right", frameon=False)
    figure.savefig(path)


def plot_recall(history: Sequence[Record], path: Path, candidates: int) -> None:
    """Draw recall@1, recall@10 and MRR@10 over "step" into a PNG; step 0 is the untrained model.

    Args:
        history: evaluation records with "eval_recall@1" and so on; others are passed over.
        path: the file to write.
        candidates: how many texts were searched, for the title.
    """
    series = (("eval_recall@10", "recall@10"), ("eval_mrr@10", "MRR@10"), ("eval_recall@1", "recall@1"))
    _plot_shares(history, path, f"Search among {candidates:,} held-out texts", "share of queries", series)


def plot_label_accuracy(history: Sequence[Record], path: Path, candidates: int) -> None:
    """Draw accuracy@1 and MAP@R of labels over "step" into a PNG; step 0 is the untrained model.

    Args:
        history: evaluation records with "eval_accuracy@1" and "eval_map@r"; others are passed over.
        path: the file to write.
        candidates: how many texts were compared, for the title.
    """
    series = (("eval_accuracy@1", "nearest text has the label"), ("eval_map@r", "MAP@R"))
    _plot_shares(history, path, f"Labels of neighbours among {candidates:,} held-out texts", "share", series)


def _plot_shares(
    history: Sequence[Record], path: Path, title: str, ylabel: str, series: Sequence[tuple[str, str]]
) -> None:
    """Draw the values of each (key, label) over "step", with the first and the last in the legend."""
    figure, axes = _new_figure(title, ylabel)
    for (key, label), marker in zip(series, "os^", strict=False):
        steps, values = _series(history, key)
        axes.plot(steps, values, marker=marker, markersize=4, label=f"{label}: {values[0]:.2f} to {values[-1]:.2f}")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", frameon=False, ncols=3, fontsize="small")
    figure.savefig(path)
