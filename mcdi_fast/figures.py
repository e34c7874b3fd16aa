"""Figures without a display."""

from __future__ import annotations

import io
from typing import Any

import numpy as np


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """A figure without a display, and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Any) -> bytes:
    """The figure's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
