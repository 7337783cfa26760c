"""Dice by token and model size (ViTiac, figure 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation.drawing import (
    draw_legend,
    label_y_axis,
    make_panels,
    model_styles,
    range_with_margin,
    styled,
)
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import BLOCK, Network, Settings, Triple
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.layout import PLANS

VIT_TRAINERS = ("ViT", "AMAE")  # parts of the names of our trainers that train a ViT


@dataclass(frozen=True)
class _Plans:
    """What is read of nnU-Net's plans."""

    configurations: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TrainedVit:
    """What figure 5 compares: the network of a model, and whether its encoder was pre-trained."""

    network: Network
    pretrained: bool

    @property
    def series(self) -> str:
        """Name of the line that the model belongs to."""
        return f"{self.network.size}, {'pre-trained' if self.pretrained else 'random weights'}"


@dataclass(frozen=True)
class DiceOfVit:
    """Mean Dice of a model with its interval."""

    vit: TrainedVit
    mean: float
    low: float
    high: float


def read_trained_vit(folder: Path) -> TrainedVit:
    """Read what a model is from nnU-Net's folder of it, TRAINER__PLANS__CONFIGURATION.

    Raises `UserError` if the folder is another one, or the model has no ViT.
    """
    trainer, *others = folder.resolve().name.split("__")
    file = folder / PLANS
    if len(others) != 2 or not file.is_file():
        raise UserError(f"{folder} is not the folder of a model: give nnU-Net's, TRAINER__PLANS__CONFIGURATION.")
    if not trains_vit(trainer):
        raise UserError(f"{folder}: the trainer {trainer} trains no ViT, so there is no token: leave the model out.")
    plans = read_entries(_Plans, file, "give the folder of a model that nnUNetv2_train wrote")
    configuration = plans.configurations.get(others[1], {})
    if BLOCK not in configuration:
        raise UserError(f"{file} does not give the ViT's token: write plans with mae3d_plan, and train with these.")
    settings = Settings.from_dict(configuration[BLOCK])
    return TrainedVit(settings.network, pretrained=not trainer.endswith("Scratch"))


def trains_vit(trainer: str) -> bool:
    """Return whether a trainer of this name takes its network from the `vit_mae` block of the plans."""
    return any(part in trainer for part in VIT_TRAINERS)


def differ_in_network(vits: Sequence[TrainedVit]) -> bool:
    """Return whether models differ in token or size, so that there is something to draw."""
    return len({(vit.network.token, vit.network.size) for vit in vits}) > 1


@styled
def token_figure(results: Sequence[DiceOfVit]) -> Figure:
    """Draw mean Dice with its interval by token, a panel for each decoder, and a line for each size."""
    decoders = list(dict.fromkeys(result.vit.network.decoder for result in results))
    order = [*SIZES]
    series = sorted({(order.index(r.vit.network.size), not r.vit.pretrained, r.vit.series) for r in results})
    styles = model_styles(name for *_, name in series)
    tokens = sorted({result.vit.network.token for result in results}, key=lambda token: (math.prod(token), token))
    places = {token: place for place, token in enumerate(tokens)}
    figure, panels = make_panels(decoders, height=3.0)
    for axes, decoder in zip(panels, decoders, strict=True):
        for name, style in styles.items():
            own = [r for r in results if (r.vit.network.decoder, r.vit.series) == (decoder, name)]
            own.sort(key=lambda result: places[result.vit.network.token])
            if not own:
                continue
            at = [places[result.vit.network.token] for result in own]
            axes.plot(at, [r.mean for r in own], color=style.colour, marker=style.marker, linewidth=1.2, label=name)
            axes.vlines(at, [r.low for r in own], [r.high for r in own], color=style.colour, alpha=0.4, linewidth=2)
        axes.set_title(decoder, fontweight="bold")
        axes.set_xticks([*places.values()], [_token_text(token) for token in places])
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.set_xlabel("Token (voxels)")
        axes.grid(axis="y")
        label_y_axis(axes, "dice", None)
        axes.set_ylim(*range_with_margin(end for result in results for end in (result.low, result.high)))
    draw_legend(figure, panels, styles, columns=3)
    return figure


def _token_text(token: Triple) -> str:
    return str(token[0]) if len(set(token)) == 1 else " x ".join(map(str, token))
