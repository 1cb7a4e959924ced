"""The curves of a run as PNG files, drawn with matplotlib, which is imported only here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files.atomic import replacing
from files.errors import counted
from train.config.schema import LOWER_IS_BETTER, METRICS
from train.log.metrics import Row
from train.report.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float]]

BLUE, ORANGE, GREEN, GREY = "#1f5a96", "#d9701e", "#2e7d4f", "#8a8f98"
SIZE_INCHES, DOTS_PER_INCH = (8.0, 4.4), 150
# A curve of fewer steps is drawn as it is; a longer one with its mean over a fortieth of the run.
SMOOTH_FROM_STEPS, SMOOTH_SHARE = 40, 40
# A gradient norm that spans more than this factor is drawn on a logarithmic axis.
LOG_AXIS_RATIO = 30
# A clipping bound beyond this factor of the largest norm is not drawn.
FAR_BOUND = 2.5


def draw_plots(record: Record, folder: Path) -> list[Path] | None:
    """Draw into a folder every curve that a run has rows for; None without matplotlib.

    Marked are the best evaluation, the end of the warm-up and the bound of the gradient norm.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return None
    loss, rate, norm = (
        _points(record.train, name) for name in ("loss", "learning_rate", "grad_norm")
    )
    valid, test = _points(record.valid, "loss"), _points(record.test, "loss")
    beside = _points(record.valid, "train_loss")
    targets = {row["step"]: row["targets"] for row in record.train}
    best_step = record.best["step"] if record.best else None
    max_grad_norm = record.section("optimizer").get("max_grad_norm")
    warmup_steps = record.plan.get("warmup_steps")

    def draw_train_loss(axes: Axes) -> None:
        _curve(axes, loss, targets, "loss of a step")
        _mark_step(axes, best_step, "best evaluation")

    def draw_eval_loss(axes: Axes) -> None:
        if beside:
            axes.plot(
                *_xy(beside),
                color=GREY,
                lw=1.4,
                marker="o",
                ms=3,
                label="train loss since the last evaluation",
            )
        if valid:
            axes.plot(*_xy(valid), color=BLUE, lw=2, marker="o", ms=4.5, label="valid loss")
        for step, value in [point for point in valid if point[0] == best_step][-1:]:
            label = f"best: {value:.4f} at step {step}"
            axes.plot([step], [value], color=ORANGE, lw=0, marker="*", ms=14, label=label)
        if test:
            # Hollow and on top: the last test often lies on the best evaluation.
            hollow: dict[str, Any] = {"marker": "D", "ms": 9, "mfc": "none", "mew": 1.8}
            axes.plot(*_xy(test), color=GREEN, lw=0, label="test loss", **hollow)

    def draw_learning_rate(axes: Axes) -> None:
        axes.plot(*_xy(rate), color=BLUE, lw=2, **_dots(rate))
        if warmup_steps:
            # Rows count steps from 1, and the first one uses the schedule's value at 0.
            warmup = counted(warmup_steps, "step")
            _mark_step(axes, warmup_steps + 1, f"peak, after {warmup} of warm-up")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.2e}" if rate else "0")

    def draw_grad_norm(axes: Axes) -> None:
        _curve(axes, norm, targets, "norm of a step, before clipping")
        positive = [value for _, value in norm if value > 0]
        # A bound far above every norm would press the curve flat.
        if max_grad_norm and positive and max_grad_norm < FAR_BOUND * max(positive):
            axes.axhline(
                max_grad_norm, color=ORANGE, lw=1.4, ls="--", label=f"clipped to {max_grad_norm:g}"
            )
        if positive and max(positive) > LOG_AXIS_RATIO * min(positive):
            axes.set_yscale("log")

    shares = [name for name in METRICS if name not in LOWER_IS_BETTER]
    measured = {name: points for name in shares if (points := _points(record.valid, name))}

    def draw_measured(axes: Axes) -> None:
        for name, points in measured.items():
            axes.plot(*_xy(points), lw=2, marker="o", ms=4.5, label=name.replace("_", " "))
        _mark_step(axes, best_step, "best evaluation")
        axes.set_ylim(bottom=0)

    plots: list[tuple[str, str, str, Points, Callable[[Axes], None]]] = [
        ("train-loss", "Train loss", "loss (nats per target)", loss, draw_train_loss),
        ("eval-loss", "Evaluation loss", "loss (nats per target)", valid or test, draw_eval_loss),
        (
            *("eval-metrics", "Beside the loss, valid set", "share"),
            next(iter(measured.values()), []),
            draw_measured,
        ),
        ("learning-rate", "Learning rate", "learning rate", rate, draw_learning_rate),
        ("grad-norm", "Gradient norm", "global L2 norm", norm, draw_grad_norm),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, heading, unit, points, draw in plots:
        path = folder / f"{name}.png"
        if points:
            _save(
                path, f"{heading} · {record.name}", unit, draw, record.plan.get("steps_per_epoch")
            )
            drawn.append(path)
        else:
            # What an earlier report drew from rows that a resume has since dropped.
            path.unlink(missing_ok=True)
    return drawn


def draw_comparison(runs: Sequence[tuple[str, Record]], path: Path) -> bool:
    """Draw the curves of several runs over each other; False without matplotlib.

    They are drawn over the tokens trained on, which runs of unlike batches have in common.

    Args:
        runs: A name and the record of each.
        path: The picture, a PNG.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False

    def draw(axes: Axes) -> None:
        for number, (name, record) in enumerate(runs):
            trained = [(row["step"], row["tokens"]) for row in record.train]
            tokens = {0: 0} | dict(accumulate(trained, lambda a, b: (b[0], a[1] + b[1])))
            targets = {row["step"]: row["targets"] for row in record.train}
            loss, valid = _points(record.train, "loss"), _points(record.valid, "loss")
            if len(loss) >= SMOOTH_FROM_STEPS:
                loss = running_mean(loss, targets, max(5, len(loss) // SMOOTH_SHARE))
            color: dict[str, Any] = {"color": f"C{number}"}

            def over_tokens(points: Points, at: dict[int, int] = tokens) -> Any:
                return _xy([(at[step], value) for step, value in points if step in at])

            axes.plot(*over_tokens(loss), alpha=0.45, lw=1.1, label=f"{name}, train", **color)
            if valid:
                axes.plot(
                    *over_tokens(valid), lw=2, marker="o", ms=4, label=f"{name}, valid", **color
                )

    unit = "loss (nats per target)"
    _save(path, "Losses of runs", unit, draw, None, x_label="tokens trained on")
    return True


def _points(rows: Sequence[Row], name: str) -> Points:
    """Return (step, value) of the rows that have a finite value."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _dots(points: Points) -> dict[str, Any]:
    """Return the marker that a curve of a few points needs to be seen."""
    return {"marker": "o", "ms": 4} if len(points) < SMOOTH_FROM_STEPS else {}


def _curve(axes: Axes, points: Points, weights: dict[int, int], label: str) -> None:
    """Draw each step's value faintly and, over it, the running mean by target."""
    if len(points) < SMOOTH_FROM_STEPS:
        axes.plot(*_xy(points), color=BLUE, lw=1.8, label=label, **_dots(points))
        return
    window = max(5, len(points) // SMOOTH_SHARE)
    axes.plot(*_xy(points), color=BLUE, alpha=0.28, lw=0.9, label=label)
    smooth = running_mean(points, weights, window)
    axes.plot(*_xy(smooth), color=BLUE, lw=2, label=f"mean of the last {window} steps")


def running_mean(points: Points, weights: dict[int, int], window: int) -> Points:
    """Return at each point the mean of the last `window` values, weighted by targets."""
    steps = [step for step, _ in points]
    weight = np.array([weights.get(step, 0) or 1 for step in steps], dtype=np.float64)
    value = np.array([value for _, value in points], dtype=np.float64)

    def sums(values: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(values)])
        ends = np.arange(1, len(values) + 1)
        return total[ends] - total[np.maximum(0, ends - window)]

    return list(zip(steps, (sums(weight * value) / sums(weight)).tolist(), strict=True))


def _mark_step(axes: Axes, step: int | None, what: str) -> None:
    if step is not None:
        axes.axvline(step, color=ORANGE, lw=1.4, ls="--", label=f"{what} (step {step})")


def _save(
    path: Path,
    title: str,
    unit: str,
    draw: Callable[[Axes], None],
    steps_per_epoch: int | None,
    x_label: str = "step (optimizer update)",
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A figure of its own instead of pyplot: no window system and no state that outlives the call.
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=GREY, alpha=0.22, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if steps_per_epoch:
        scale = float(steps_per_epoch)
        epochs = axes.secondary_xaxis(
            "top", functions=(lambda x: np.divide(x, scale), lambda x: np.multiply(x, scale))
        )
        place: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "right",
        }
        axes.annotate("epoch", (0, 1), (-6, 7), **place).set(color=GREY, fontsize=8)
        epochs.tick_params(colors=GREY, labelsize=8)
        epochs.spines["top"].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png")
