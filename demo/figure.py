"""The figure of both runs: losses, what training holds, and memory of the processes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from demo.runs import Run

# Of the Okabe-Ito palette, which colour-blind readers tell apart.
_FULL, _PARTIAL = "#D55E00", "#0072B2"
_SHADES = {"weights": 0.8, "gradients": 0.6, "optimizer": 0.4}


def draw(full: Run, partial: Run, path: Path) -> None:
    """Writes a PNG."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, (losses, held, memory) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        _draw_losses(losses, full, partial)
        _draw_held(held, full, partial)
        _draw_memory(memory, full, partial)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_losses(axes: Axes, full: Run, partial: Run) -> None:
    steps = range(1, len(full.losses) + 1)
    axes.plot(steps, full.losses, color=_FULL, linewidth=4, alpha=0.45, label="full vocabulary")
    axes.plot(steps, partial.losses, color=_PARTIAL, linewidth=1, label="partial vocabulary")
    axes.set(title="Training loss: the same, bit for bit", xlabel="step", ylim=(0, None))
    axes.legend(frameon=False)


def _draw_held(axes: Axes, full: Run, partial: Run) -> None:
    for at, (run, color) in enumerate(((full, _FULL), (partial, _PARTIAL))):
        bottom = 0.0
        for part, shade in _SHADES.items():
            megabytes = run.result[f"{part}_bytes"] / 1e6
            axes.bar(at, megabytes, bottom=bottom, color=color, alpha=shade, width=0.6)
            axes.text(at, bottom + megabytes / 2, f"{part} {megabytes:.0f} MB", ha="center", va="center", color="black")
            bottom += megabytes
        axes.text(at, bottom, f"{bottom:.0f} MB", ha="center", va="bottom", weight="bold")
    axes.set_xticks([0, 1], ["full vocabulary", "partial vocabulary"])
    axes.set(title="What training holds", ylabel="MB")
    axes.margins(y=0.08)


def _draw_memory(axes: Axes, full: Run, partial: Run) -> None:
    for run, color, label in ((full, _FULL, "full vocabulary"), (partial, _PARTIAL, "partial vocabulary")):
        seconds, held = zip(*run.anonymous, strict=True)
        axes.plot(seconds, [each / 1e6 for each in held], color=color, linewidth=1, label=label)
    axes.set(title="Memory allocated by the process", xlabel="seconds", ylabel="MB", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
