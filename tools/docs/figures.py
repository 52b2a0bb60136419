"""Draw the figures of the page about the mathematics, from its equations: `python -m tools.docs.figures`.

Each figure is computed with NumPy in milliseconds, from a fixed seed. Ink is a variable, so that it follows dark mode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
INK = "#010203"
"""Stands for the colour of text until the file is written."""
OURS, THEIRS, GREY = "#00897b", "#d1603d", "#8a8a8a"
STYLE = "<style>svg{--ink:#222}@media(prefers-color-scheme:dark){svg{--ink:#ddd}}</style>"
Array = NDArray[np.float64]


def text_map(keys: Array, values: Array, preserved: Array, ridge: float) -> Array:
    """T = I + (V - K) K^T A^-1 with A = K K^T + R R^T + ridge I: d x d, for keys and values d x m, preserved d x n."""
    width = len(keys)
    moment = keys @ keys.T + preserved @ preserved.T + ridge * np.eye(width)
    return np.eye(width) + (values - keys) @ keys.T @ np.linalg.inv(moment)


def moved_words() -> Any:
    """What the map does to words in two dimensions: the erased one goes to its anchor, the others stay nearly where they are."""
    words = {"cat": (1.0, 0.14), "kitty": (0.93, -0.12), "dog": (0.16, 0.8), "tree": (-0.12, 1.0), "car": (0.1, -0.75)}
    erased, anchor = np.array([words["cat"], words["kitty"]]).T, np.array([[-0.55, 0.0]]).T.repeat(2, 1)
    # Two dimensions hold two directions: one is the concept's, the words to preserve share the other.
    preserved = np.array([words[name] for name in ("dog", "tree", "car")]).T
    change = text_map(erased, anchor, preserved, 0.01)
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for name, place in words.items():
        gone = name in ("cat", "kitty")
        end = change @ np.array(place)
        axes.annotate("", end, place, arrowprops={"arrowstyle": "->", "color": THEIRS if gone else GREY, "lw": 1.6})
        axes.plot(*place, "o", color=THEIRS if gone else OURS)
        axes.annotate(name, place, textcoords="offset points", xytext=(7, 5), color=INK)
    axes.plot(*anchor[:, 0], "s", color=GREY)
    axes.annotate("nothing (the anchor)", anchor[:, 0], textcoords="offset points", xytext=(-20, -34), color=INK)
    axes.set_aspect("equal")
    axes.margins(0.18)
    axes.set_axis_off()
    return figure


def sums_of_patches() -> Any:
    """How far the sum of N patches is from the joint optimum: of one universe, and each solved as if it were alone."""
    rng, width, most = np.random.default_rng(0), 96, 32
    keys = rng.normal(size=(most, width, 2)) / np.sqrt(width) + rng.normal(size=(width, 1)) / np.sqrt(width)
    values, preserved = np.zeros((width, 2)), rng.normal(size=(width, 60)) / np.sqrt(width)
    everything = np.concatenate([*keys], axis=1)
    counts, ours, alone = list(range(1, most + 1)), [], []
    for count in counts:
        some = np.concatenate([*keys[:count]], axis=1)
        rest = np.concatenate([preserved, *keys[count:]], axis=1)
        joint = text_map(some, np.zeros_like(some), rest, 0.1) - np.eye(width)
        moment = everything @ everything.T + preserved @ preserved.T + 0.1 * np.eye(width)
        universe = sum((values - key) @ key.T @ np.linalg.inv(moment) for key in keys[:count])
        single = sum(text_map(key, values, preserved, 0.1) - np.eye(width) for key in keys[:count])
        ours.append(np.linalg.norm(universe - joint) / np.linalg.norm(joint))
        alone.append(np.linalg.norm(single - joint) / np.linalg.norm(joint))
    figure, axes = plt.subplots(figsize=(5.6, 3.2))
    axes.semilogy(counts, np.maximum(alone, 1e-17), color=THEIRS, label="each solved alone, then summed")
    axes.semilogy(counts, np.maximum(ours, 1e-17), color=OURS, label="of one universe, then summed")
    axes.set_xlabel("concepts erased together")
    axes.set_ylabel("distance from the joint solution")
    axes.set_ylim(1e-17, 1e2)
    return legible(figure, axes)


def sizes() -> Any:
    """Bytes for one concept on Stable Diffusion 1.5, in the forms that the field ships."""
    rows = {
        "text map, one direction": 6.2e3,
        "LoRA of cross-attention, rank 1": 2.1e5,
        "dense cross-attention weights": 3.8e7,
        "a checkpoint of the U-Net": 1.7e9,
    }
    figure, axes = plt.subplots(figsize=(5.6, 2.2))
    axes.barh(list(rows), list(rows.values()), color=[OURS, GREY, GREY, GREY], log=True, height=0.6)
    axes.invert_yaxis()
    axes.set_xlim(1e3, 1e11)
    for row, size in enumerate(rows.values()):
        unit, power = next((unit, power) for unit, power in (("GB", 9), ("MB", 6), ("KB", 3)) if size >= 10**power)
        axes.annotate(
            f"{size / 10**power:.3g} {unit}", (size, row), textcoords="offset points", xytext=(6, -4), color=INK
        )
    axes.set_xlabel("bytes")
    return legible(figure, axes)


def legible(figure: Any, axes: Any) -> Any:
    """Ink on everything that is text or a line of the frame."""
    axes.tick_params(colors=INK)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(INK)
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(name in ("left", "bottom"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)
    return figure


FIGURES: dict[str, Callable[[], Any]] = {"moved-words": moved_words, "sums": sums_of_patches, "sizes": sizes}


def main(folder: Path = FOLDER) -> None:
    """Write every figure as SVG; the same bytes each time, with the same matplotlib."""
    folder.mkdir(exist_ok=True)
    settings = {"svg.hashsalt": "overpaint", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    with plt.rc_context(settings):
        for name, draw in FIGURES.items():
            file = folder / f"{name}.svg"
            draw().savefig(file, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
            text = file.read_text("utf-8").replace(INK, "var(--ink)").replace("<defs>", f"{STYLE}<defs>", 1)
            file.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")
            print(file)


if __name__ == "__main__":
    main()
