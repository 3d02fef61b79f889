"""Plots training and evaluation loss over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Curve = Sequence[tuple[int, float]]  # (step, loss)


def plot_losses(curves: Mapping[int, tuple[Curve, Curve]], file: Path) -> None:
    """Writes a PNG with the training and evaluation curves of each seed."""
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for color, (seed, (training, evaluation)) in enumerate(curves.items()):
        for curve, label in ((training, "training"), (evaluation, "evaluation")):
            look = "-" if curve is training else "o-"
            (line,) = axes.plot(*zip(*curve, strict=True), look, label=f"{label}, seed {seed}", color=f"C{color}")
            line.set(markersize=4, linewidth=1, alpha=0.5 if curve is training else 1)
    axes.set(xlabel="optimizer step", ylabel="relation KL (Q-Q + K-K + V-V), nats", ylim=(0, None), xlim=(0, None))
    axes.set_title("MiniLM-L6 into 3 × 384")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
