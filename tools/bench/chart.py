"""The throughput table as a picture.

python tools/bench train --json figures.json
.venv-peers/bin/python tools/bench/chart.py figures.json throughput.png

matplotlib comes with the peers (tools/bench/make_peers): it draws their chart and nothing else here needs it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from train import MEMORY, RATE

NAMES = {
    "floor": "bare loop, packed",
    "fit": "lightning-trainer fit",
    "fit_compiled": "lightning-trainer fit,\ncompiled",
    "fit_previews": "lightning-trainer fit,\nwith previews",
    "trl_packed": "TRL SFTTrainer, packed",
    "trl_padded": "TRL SFTTrainer, padded",
    "hf_grouped": "HF Trainer, by length",
    "hf_padded": "HF Trainer, padded",
    "litgpt_padded": "LitGPT finetune_full, padded",
    "hf_single": "HF Trainer, chat by chat",
    "trl_single": "TRL SFTTrainer, chat by chat",
    "litgpt_single": "LitGPT finetune_full, chat by chat",
}
OURS, BARE, OTHERS, INK, QUIET = "#1f6feb", "#8c959f", "#c6ccd3", "#1f2328", "#656d76"


@dataclass(frozen=True)
class Bar:
    """One arm's figure.

    Attributes:
        values: Of the rounds.
    """

    arm: str
    median: float
    values: list[float]

    @property
    def colour(self) -> str:
        """Ours, the bare loop's, or others'."""
        return OURS if self.arm.startswith("fit") else BARE if self.arm == "floor" else OTHERS


def bars(table: list[dict[str, Any]], prefix: str) -> dict[str, Bar]:
    """The rows of a table that begin so, by arm."""
    found = {}
    for row in table:
        what, _, arm = row["what"].partition(": ")
        if what == prefix:
            found[arm] = Bar(arm, row["median"], row["values"])
    return found


def draw(axes: Axes, shown: list[Bar], title: str, unit: str) -> None:
    """One panel: a bar for each arm, a line from its smallest to its largest round."""
    places = range(len(shown))
    axes.barh(places, [bar.median for bar in shown], color=[bar.colour for bar in shown], height=0.62)
    end = 1.02 * max(max(bar.values) for bar in shown)
    for place, bar in zip(places, shown, strict=True):
        axes.plot([min(bar.values), max(bar.values)], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
        weight = "bold" if bar.arm == "fit" else "normal"
        axes.text(
            max(bar.values) + 0.02 * end,
            place,
            f"{bar.median:,.0f}",
            va="center",
            fontsize=9.5,
            color=INK,
            weight=weight,
        )
    axes.set_title(title, loc="left", fontsize=11, color=INK, weight="bold", pad=22)
    axes.text(0, 1.025, unit, transform=axes.transAxes, fontsize=9, color=QUIET)
    axes.set_xlim(0, 1.14 * end)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(OTHERS)
    axes.tick_params(axis="both", length=0, labelsize=9, colors=QUIET)
    axes.grid(axis="x", color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)


def chart(figures: dict[str, Any], target: Path) -> None:
    """Draw both panels into a PNG."""
    table = figures["tables"]["train"]
    rates, memory = bars(table, RATE), bars(table, MEMORY)
    order = sorted(rates, key=lambda arm: -rates[arm].median)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.47 * len(order)), sharey=True, gridspec_kw={"width_ratios": [1.5, 1]}
    )
    draw(left, [rates[arm] for arm in order], "Throughput", "useful tokens per CPU second; more is better")
    draw(right, [memory[arm] for arm in order], "Peak memory", "MiB of the process; less is better")
    left.invert_yaxis()  # the best on top; the panels share it
    left.set_yticks(range(len(order)), [NAMES.get(arm, arm) for arm in order], fontsize=9.5, color=INK)
    for label, arm in zip(left.get_yticklabels(), order, strict=True):
        label.set_weight("bold" if arm == "fit" else "normal")
    figure.text(
        0.012,
        0.018,
        "Qwen3's shape, 6.9 M parameters, fp32, one CPU thread; chats of 195 tokens, 44 % of them trained on; "
        "about 2,048 tokens a step. Medians; lines span the rounds.",
        fontsize=8.5,
        color=QUIET,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1), w_pad=2.5)
    figure.savefig(target, dpi=160, facecolor="white")


def main() -> None:
    """Read the figures, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what tools/bench wrote with --json")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    given = parser.parse_args()
    chart(json.loads(given.figures.read_text(encoding="utf-8")), given.picture)


if __name__ == "__main__":
    main()
