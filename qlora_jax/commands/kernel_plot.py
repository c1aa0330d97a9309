"""A plot of kernel timings."""

from collections.abc import Sequence
from pathlib import Path

from qlora_jax.kernels.benchmark import IMPLEMENTATIONS, Measurement


def plot_kernels(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw the share of the roofline over M, a panel for each shape and direction, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Measurement]] = {}
    for one in measurements:
        product = one.product
        direction = "x W" if product.transposed else "x W^T"
        panels.setdefault(f"{one.layer}: {product.n} x {product.k}, {direction}", []).append(one)
    columns = min(4, len(panels))
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes, (name, ones) in zip(grid, panels.items(), strict=False):
        for implementation in IMPLEMENTATIONS:
            points = sorted((one.product.m, one.percent) for one in ones if one.implementation == implementation)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=implementation)
        axes.set_title(name, fontsize=8)
        axes.set(xscale="log", ylim=(0, 100), xlabel="M", ylabel="% of the roofline")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130, format="png")
