"""Pictures of episodes, learning curves, regression tasks and policies, written straight to a file (no pyplot)."""

from __future__ import annotations

import io
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from torch import Tensor

from ..files import write_atomically
from ..tasks import TaskBatch

if TYPE_CHECKING:
    from ..augment.policy import AugmentationPolicy
    from ..runs.history import History

INK, MUTED, GRID = "#1f2430", "#7a8190", "#e4e7ec"
RIGHT, WRONG, ACCENT, SECOND = "#2a9d5c", "#d1434b", "#2f6fdb", "#e08e1b"


def plot_episode(tasks: TaskBatch, predictions: Tensor, path: str | Path, task: int = 0) -> None:
    """One classification episode: in each class's row its support images, then its queries and what they were read as.

    Args:
        tasks: images `[T, N, C, H, W]` (one or three channels) or `[T, N, H, W]`, class ids `[T, N]`.
        predictions: class ids `[T, Q]`, or logits `[T, Q, ways]`.
        path: where to write; the suffix names the format.
        task: which of the tasks.

    Raises:
        ValueError: the inputs are no images, or the predictions do not fit the queries.

    >>> import tempfile, torch
    >>> y = torch.arange(5).repeat(1, 1)
    >>> batch = TaskBatch(torch.rand(1, 5, 1, 28, 28), y, torch.rand(1, 5, 1, 28, 28), y)
    >>> path = Path(tempfile.mkdtemp()) / "episode.png"
    >>> plot_episode(batch, torch.randn(1, 5, 5), path)
    >>> path.stat().st_size > 1000
    True
    """
    if tasks.support_x.ndim not in (4, 5):
        raise ValueError(f"tasks must hold images [T, N, C, H, W] (got support_x {tuple(tasks.support_x.shape)})")
    read_as = predictions[task].detach().cpu()
    read_as = read_as.argmax(-1) if read_as.ndim == 2 else read_as
    support_x, support_y, query_x, query_y = (value[task].detach().cpu() for value in tasks.tensors)
    if read_as.shape != query_y.shape:
        raise ValueError(f"predictions must be [T, {len(query_y)}] (got {tuple(predictions.shape)})")
    ways = int(support_y.max()) + 1
    names = [string.ascii_uppercase[way] if way < 26 else str(way) for way in range(ways)]
    shots = int(support_y.bincount(minlength=ways).max())
    queries = int(query_y.bincount(minlength=ways).max())

    figure = Figure(figsize=(0.95 * (shots + queries) + 1.1, 1.12 * ways + 0.9), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        ways, shots + queries + 1, width_ratios=[1] * shots + [0.35] + [1] * queries, hspace=0.34, wspace=0.12,
        left=0.07, right=0.98, top=1 - 0.72 / figure.get_figheight(), bottom=0.3 / figure.get_figheight(),
    )  # fmt: skip
    for way in range(ways):
        own_support, own_queries = support_x[support_y == way], query_x[query_y == way]
        for column, image in enumerate(own_support):
            axes = _image_axes(figure, grid[way, column], image, MUTED)
            if column == 0:
                axes.set_ylabel(names[way], rotation=0, labelpad=14, va="center", fontsize=13, color=INK)
            if way == 0 and column == 0:
                axes.set_title("support", loc="left", fontsize=11, color=INK, pad=8)
        for column, (image, guess) in enumerate(zip(own_queries, read_as[query_y == way].tolist(), strict=True)):
            color = RIGHT if guess == way else WRONG
            axes = _image_axes(figure, grid[way, shots + 1 + column], image, color, width=2.2)
            axes.set_xlabel(f"{names[guess]} {'✓' if guess == way else '✗'}", fontsize=9, color=color, labelpad=2)
            if way == 0 and column == 0:
                axes.set_title("queries, read as", loc="left", fontsize=11, color=INK, pad=8)
    right = int((read_as == query_y).sum())
    figure.suptitle(
        f"{ways}-way {shots}-shot: {right} of {len(query_y)} right", x=0.02, ha="left", fontsize=12, color=INK,
        y=1 - 0.12 / figure.get_figheight(), va="top", fontweight="bold",
    )  # fmt: skip
    _write(figure, path)


def plot_samples(samples: Mapping[str, Tensor], path: str | Path, numbers: Mapping[str, Tensor] | None = None) -> None:
    """A sheet of pictures: in each class's row a block of columns for each kind, real beside generated, say.

    Args:
        samples: of each kind, by its name: `[classes, N, C, H, W]`, with one or three channels; N may differ.
        path: where to write; the suffix names the format.
        numbers: what to write under each picture of some kinds, `[classes, N]`: how much it is worth, say.

    Raises:
        ValueError: they are no such pictures, or of different numbers of classes, or the numbers are not theirs.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "samples.png"
    >>> real, learned = torch.rand(3, 4, 1, 28, 28), torch.rand(3, 1, 1, 28, 28)
    >>> plot_samples({"real": real, "learned": learned}, path, {"learned": torch.rand(3, 1)})
    >>> path.stat().st_size > 1000
    True
    """
    shapes = {name: tuple(each.shape) for name, each in samples.items()}
    classes = {
        shape[0] for shape in shapes.values() if len(shape) == 5 and shape[2] in (1, 3) and shape[0] and shape[1]
    }
    if len(classes) != 1 or any(len(shape) != 5 or shape[2] not in (1, 3) for shape in shapes.values()):
        raise ValueError(f"samples must be pictures [classes, N, C, H, W] of the same classes (got {shapes})")
    numbers = {} if numbers is None else numbers
    for name, values in numbers.items():
        if values.shape != shapes.get(name, ())[:2]:
            raise ValueError(
                f"numbers must be [classes, N] of a kind of samples (got {name!r} {tuple(values.shape)}, {shapes})"
            )
    (rows,), columns = classes, [shape[1] for shape in shapes.values()]
    widths = [width for count in columns for width in [*[1.0] * count, 0.35]][:-1]
    height, gap = (0.8, 0.42) if numbers else (0.6, 0.08)
    figure = Figure(figsize=(0.6 * sum(widths) + 0.2, height * rows + 0.5), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        rows, len(widths), width_ratios=widths, hspace=gap, wspace=0.08, left=0.02, right=0.98,
        bottom=(0.2 if numbers else 0.02) / figure.get_figheight(), top=1 - 0.4 / figure.get_figheight(),
    )  # fmt: skip
    first = 0
    for (name, pictures), count in zip(samples.items(), columns, strict=True):
        for row, own in enumerate(pictures.detach().cpu()):
            for column, image in enumerate(own):
                axes = _image_axes(figure, grid[row, first + column], image, GRID)
                if row == column == 0:
                    axes.set_title(name, loc="left", fontsize=9, color=INK, pad=5)
                if name in numbers:
                    axes.set_xlabel(f"{float(numbers[name][row, column]):.2f}", fontsize=7, color=MUTED, labelpad=2)
        first += count + 1
    _write(figure, path)


def plot_learning_curve(history: History, path: str | Path, title: str = "") -> None:
    """Accuracy, or the loss where there are no classes, on training and validation episodes over the meta-steps.

    >>> import tempfile
    >>> from metaaug_fast.runs.history import History, Point
    >>> history = History(training=[Point(10, 0.8, 0.7), Point(20, 0.4, 0.9)])
    >>> path = Path(tempfile.mkdtemp()) / "curve.png"
    >>> plot_learning_curve(history, path)
    >>> path.exists()
    True
    """
    figure = Figure(figsize=(6.4, 3.6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    accuracies = [point.accuracy for point in history.training if point.accuracy is not None]
    classes = bool(accuracies)
    scale = 100 if classes else 1
    values = accuracies or [point.loss for point in history.training]
    steps = [point.step for point in history.training]
    axes.plot(steps, scale * np.array(values), color=ACCENT, alpha=0.75, lw=1.3, label="training episodes")
    if history.validation:
        at, mean, interval = np.array([(point.step, point.mean, point.interval) for point in history.validation]).T
        axes.fill_between(at, scale * (mean - interval), scale * (mean + interval), color=SECOND, alpha=0.25, lw=0)
        axes.plot(at, scale * mean, color=SECOND, lw=1.8, marker="o", ms=3.5, label="new classes, 95 % interval")
    style(axes, "meta-steps", "accuracy, %" if classes else "loss")
    if classes:
        axes.set_ylim(top=101)
    elif min([*values, *(point.mean for point in history.validation)], default=1.0) > 0:  # not of densities
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    _write(figure, path)


def plot_sinusoid(tasks: TaskBatch, curves: Mapping[int | None, Tensor], path: str | Path, panels: int = 3) -> None:
    """Regression tasks before and after adaptation, a panel for each of the first tasks.

    Args:
        tasks: scalar inputs and targets; the queries, sorted by x, draw the true curve.
        curves: predictions on the queries `[T, Q, 1]` after so many inner steps; of None where there is no inner loop.
        path: where to write; the suffix names the format.
        panels: how many tasks.

    >>> import tempfile, torch
    >>> x = torch.linspace(-5, 5, 50).reshape(1, -1, 1)
    >>> batch = TaskBatch(x[:, ::10], x[:, ::10].sin(), x, x.sin())
    >>> path = Path(tempfile.mkdtemp()) / "sinusoid.png"
    >>> plot_sinusoid(batch, {0: 0 * x, 1: 0.9 * x.sin()}, path, panels=1)
    >>> path.exists()
    True
    """
    panels = min(panels, tasks.tasks)
    figure = Figure(figsize=(3.4 * panels + 0.4, 3.1), dpi=150, facecolor="white", layout="constrained")
    shades = [MUTED, SECOND, ACCENT, RIGHT]
    for task, axes in enumerate(np.atleast_1d(figure.subplots(1, panels, sharey=True))):
        x = tasks.query_x[task].detach().flatten()
        order = x.argsort()
        axes.plot(
            x[order], tasks.query_y[task].detach().flatten()[order], color=INK, lw=1.2, ls=(0, (4, 3)), label="truth"
        )
        for color, steps in zip(shades, sorted(curves, key=lambda steps: steps or 0), strict=False):
            curve = curves[steps]
            label = f"after {steps} step{'s' * (steps != 1)}" if steps else "before adaptation"
            label = "prediction" if steps is None else label
            axes.plot(x[order], curve[task].detach().flatten()[order], color=color, lw=1.8, label=label)
        axes.plot(
            tasks.support_x[task].flatten(), tasks.support_y[task].flatten(), "o", color=INK, ms=4.5, label="support"
        )
        style(axes, "x", "y" if task == 0 else "")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    _write(figure, path)


def plot_draws(tasks: TaskBatch, curves: Tensor, path: str | Path, panels: int = 4) -> None:
    """Regression tasks that can be read in several ways: a panel for each of the first tasks, a curve for each draw.

    Args:
        tasks: scalar inputs and targets; the queries, sorted by x, draw the true curve.
        curves: what each of D draws predicts for the queries, `[T, D, Q]` or `[T, D, Q, 1]`.
        path: where to write; the suffix names the format.
        panels: how many tasks.

    Raises:
        ValueError: the curves do not fit the queries.

    >>> import tempfile, torch
    >>> x = torch.linspace(-5, 5, 50).reshape(1, -1, 1)
    >>> batch = TaskBatch(x[:, ::20], x[:, ::20].sin(), x, x.sin())
    >>> path = Path(tempfile.mkdtemp()) / "draws.png"
    >>> plot_draws(batch, torch.stack([x.sin(), 0.3 * x], 1), path)
    >>> path.exists()
    True
    """
    count, queries = tasks.query_x.shape[:2]
    if curves.ndim not in (3, 4) or (len(curves), *curves.shape[2:]) not in ((count, queries), (count, queries, 1)):
        raise ValueError(f"curves must be [{count}, draws, {queries}] (got {tuple(curves.shape)})")
    panels = min(panels, count)
    figure = Figure(figsize=(3.0 * panels + 0.4, 3.1), dpi=150, facecolor="white", layout="constrained")
    for task, axes in enumerate(np.atleast_1d(figure.subplots(1, panels))):
        x, order = tasks.query_x[task].detach().flatten(), tasks.query_x[task].detach().flatten().argsort()
        own = curves[task].detach().flatten(1)
        for draw, curve in enumerate(own):
            label = "draws" if draw == 0 else None
            axes.plot(x[order], curve[order], color=ACCENT, lw=1.1, alpha=max(0.25, 1 / len(own)), label=label)
        truth = tasks.query_y[task].detach().flatten()
        axes.plot(x[order], truth[order], color=INK, lw=1.4, ls=(0, (4, 3)), label="truth")
        axes.plot(
            tasks.support_x[task].flatten(), tasks.support_y[task].flatten(), "o", color=SECOND, ms=5.5,
            label="support", zorder=3,
        )  # fmt: skip
        style(axes, "x", "y" if task == 0 else "")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    _write(figure, path)


def plot_policy(policy: AugmentationPolicy, path: str | Path, support_x: Tensor | None = None) -> None:
    """How often each transform of a policy is applied, and how strongly.

    Args:
        policy: those without strength are on or off, and have no second bar.
        path: where to write; the suffix names the format.
        support_x: one task's, `[S, ...]`, as for `policy.as_dict`.

    >>> import tempfile, metaaug_fast as mf
    >>> path = Path(tempfile.mkdtemp()) / "policy.png"
    >>> plot_policy(mf.augment.AugmentationPolicy(["noise", "mixup"], 0.3), path)
    >>> path.exists()
    True
    """
    settings = policy.as_dict(support_x)
    figure = Figure(figsize=(5.6, 0.36 * len(settings) + 1.1), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(settings))
    axes.barh(places - 0.2, [chance for chance, _ in settings.values()], 0.36, color=ACCENT, label="probability")
    strengths = {at: strength for at, (_, strength) in enumerate(settings.values()) if strength is not None}
    axes.barh(np.array([*strengths]) + 0.2, [*strengths.values()], 0.36, color=SECOND, label="strength")
    style(axes, "of what is possible", "")
    axes.set_xlim(0, 1)
    axes.set_yticks(places, [name.replace("_", " ") for name in settings])
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    _write(figure, path)


def _image_axes(figure: Figure, cell: SubplotSpec, image: Tensor, color: str, width: float = 1.0) -> Axes:
    """One picture in a frame, dark ink on light paper whichever way it is stored."""
    axes = figure.add_subplot(cell)
    if image.ndim == 3 and image.shape[0] == 3:
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
    else:
        plane = image.reshape(image.shape[-2:]).numpy()
        axes.imshow(plane, cmap="gray" if plane.mean() > 0.5 * plane.max() else "gray_r", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=width)
    return axes


def style(axes: Axes, x: str, y: str, size: float = 10) -> None:
    """Labels in points, a quiet grid, no frame above and to the right."""
    axes.set_xlabel(x, color=INK, fontsize=size)
    axes.set_ylabel(y, color=INK, fontsize=size)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=size - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)


def _write(figure: Figure, path: str | Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:] or None)
    write_atomically(path, drawn.getvalue())
