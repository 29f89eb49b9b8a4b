"""Figures of a sensitivity map: blocks by kinds, cheap against dear, bytes against KL, and where the bits went."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import NullFormatter

from helpers.harness.sensitivity import where
from helpers.measure.stats import Interval
from helpers.models.method import Method
from helpers.plots import OTHERS

LEAST = 1e-7  # KL below which a logarithmic scale shows no difference


def heat_map(ax, frame: pd.DataFrame, norm: Normalize | None = None, title: str | None = None):
    """KL of the model in which one linear is quantized: a row a block, a column a kind. Returns what a colour bar needs."""
    kl = frame[frame.block.notna()].assign(kl=lambda f: [max(k.estimate, LEAST) for k in f.kl])
    kinds = list(dict.fromkeys(kl.kind))
    grid = kl.pivot_table(index="block", columns="kind", values="kl", aggfunc="sum")[kinds]
    image = ax.imshow(grid, cmap="YlOrRd", norm=norm or LogNorm(np.nanmin(grid), np.nanmax(grid)), aspect="auto")
    if grid.size <= 60:
        for y, x in np.ndindex(*grid.shape):
            dark = image.norm(value := grid.iloc[y, x]) > 0.6
            ax.text(x, y, f"{1000 * value:.2g}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    ax.set_xticks(range(len(kinds)), [k.removesuffix("_proj") for k in kinds], fontsize=8)
    ax.set_yticks(range(len(grid)), [f"{int(b)}" for b in grid.index], fontsize=8)
    ax.set(ylabel="block", title=title)
    ax.grid(visible=False)
    return image


def common_norm(frame: pd.DataFrame) -> LogNorm:
    """One scale of colours for several heat maps."""
    values = [max(k.estimate, LEAST) for k, block in zip(frame.kl, frame.block, strict=True) if block == block]
    return LogNorm(min(values), max(values))


def against(ax, cheap: Mapping[str, float], dear: Mapping[str, float], title: str) -> None:
    """A cheap score of each linear against the effect that was measured; a colour and marker a kind."""
    kinds = list(dict.fromkeys(where(n)[1] for n in dear))
    for n, kind in enumerate(kinds):
        colour, marker = [("#0072B2", "o"), ("#D55E00", "s"), *OTHERS][n % (2 + len(OTHERS))]
        mine = [layer for layer in dear if where(layer)[1] == kind]
        ax.plot([cheap[m] for m in mine], [max(dear[m], LEAST) for m in mine], marker, color=colour, linestyle="none",
                label=kind.removesuffix("_proj"), markersize=5)
    ax.set(xscale="log", yscale="log", title=title)
    ax.title.set_fontsize(9)
    ax.xaxis.set_minor_formatter(NullFormatter())


def curve(ax, families: Mapping[str, Sequence[tuple[float, Interval]]], joined: Sequence[str] = ()) -> None:
    """Bits a weight against KL with its interval: a colour and marker a family, a line through those that are `joined`."""
    looks = [("#0072B2", "^"), ("#56B4E9", "v"), ("#D55E00", "P"), ("#009E73", "D"), *OTHERS]
    for (name, points), (colour, marker) in zip(families.items(), looks, strict=False):
        points = sorted(points, key=lambda p: p[0])
        kl = [max(i.estimate, LEAST) for _, i in points]
        error = [[k - max(i.low, LEAST) for k, (_, i) in zip(kl, points, strict=True)],
                 [i.high - k for k, (_, i) in zip(kl, points, strict=True)]]
        ax.errorbar([b for b, _ in points], kl, yerr=np.clip(error, 0, None), fmt=marker, color=colour, capsize=2, label=name,
                    linestyle="-" if name in joined else "none", linewidth=1, markersize=5)
    ax.set(yscale="log", xlabel="bits a weight, as files count them", ylabel="KL from 16 bits on answers (nats/token)")
    ax.legend(fontsize=8)


def where_bits_went(ax, methods: Mapping[str, Method], title: str | None = None) -> None:
    """The bits of each linear of a plan: a row a block, a column a kind."""
    frame = pd.DataFrame([(*where(n), 16 if m.stays else getattr(m, "bits", 4)) for n, m in methods.items()],
                         columns=["block", "kind", "bits"])
    grid = frame.pivot_table(index="block", columns="kind", values="bits")[list(dict.fromkeys(frame.kind))]
    ax.imshow(np.log2(grid), cmap="Blues", vmin=0.5, vmax=4.5, aspect="auto")
    if grid.size <= 250:
        for y, x in np.ndindex(*grid.shape):
            ax.text(x, y, f"{grid.iloc[y, x]:g}", ha="center", va="center", fontsize=8,
                    color="white" if grid.iloc[y, x] >= 8 else "black")
    ax.set_xticks(range(grid.shape[1]), [k.removesuffix("_proj") for k in grid.columns], fontsize=8)
    ax.set_yticks(range(len(grid)), [f"{int(b)}" for b in grid.index], fontsize=8)
    ax.set(ylabel="block", title=title)
    ax.grid(visible=False)
