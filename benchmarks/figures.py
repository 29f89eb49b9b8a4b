"""The figure of the README, from committed records: `make figures`."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from helpers import plots
from helpers.harness.carry import panels
from helpers.models.source import DATA

SHOWN = {"rounding": "rounding", "NF4": "NF4", "AWQ": "AWQ", "GPTQ, symmetric": "GPTQ, auto-gptq's settings",
         "GPTQ, symmetric, searched scales": "GPTQ, searched scales",
         "GPTQ, symmetric, group aware, searched scales": "GPTQ, our default\n(group aware)",
         "GPTQ, desc_act, searched scales": "GPTQ, asymmetric,\ndesc_act",
         "AWQ's scales, then GPTQ, group aware, searched scales": "awq+gptq\n(asymmetric)"}


def main() -> None:
    whose = panels("recipes")
    titles = {"bundled": "bundled model, its questions", "novel": "SmolLM2-135M, a novel",
              "questions": "SmolLM2-135M, questions"}
    with plots.style():
        figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", sharey=True)
        for ax, (text, title) in zip(axes, titles.items(), strict=True):
            plots.recipes(ax, {SHOWN[n]: whose[text]["recipes, 4 bits"][n]["kl"] for n in SHOWN})
            ax.set_title(title, fontsize=9)
        axes[1].set_xlabel("KL from 16 bits (nats/token), 95 % interval")
        figure.savefig(DATA / "figures" / "recipes.png", dpi=160)


if __name__ == "__main__":
    main()
