"""The choices of `mae3d_plan`: settings from flags, recipe, encoder and memory, each with its reason.

`planning.py` has the rules behind the defaults, `plans.py` reads and writes the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.hub import is_address
from nnunet_vit_mae.imaging.ct_clipping import clipping_warning, loses_soft_tissue
from nnunet_vit_mae.networks.memory import finetuning_memory, pretraining_memory
from nnunet_vit_mae.nnunet.capacity import LARGEST_DEVICE, refuse_step_beyond
from nnunet_vit_mae.nnunet.encoders import Start, find_encoder
from nnunet_vit_mae.nnunet.mirroring import mirroring_of
from nnunet_vit_mae.nnunet.plans import Plan, build_unet, destination, settings_of
from nnunet_vit_mae.planning import TOKEN_BUDGET, Memory, changed, fit_to_memory, refuse_useless_masks
from nnunet_vit_mae.presets import DECODERS, UPSAMPLINGS
from nnunet_vit_mae.pretraining.volumes import open_volume
from nnunet_vit_mae.settings import Network, Settings, token_grid
from nnunet_vit_mae.transfer import adapt_encoder
from nnunet_vit_mae.units import GIB, size_text

FEW_CASES = 5
RESERVED = 1 * GIB  # of a GPU: CUDA itself, workspaces of convolutions, fragmentation


@dataclass(frozen=True)
class Choice:
    """A row of the table that `mae3d_plan` prints."""

    name: str
    value: str
    reason: str


def choose_settings(
    source: Plan,
    changes: Mapping[str, Any],
    *,
    encoder: Start | None = None,
    memory_target: float | None = None,
) -> tuple[Settings, list[Choice]]:
    """Return the source's settings with `changes` (a partial block), for an encoder and a GPU memory (GiB) if given.

    An encoder that the source names is taken as if it were given. Raises `UserError` for bad changes, for an encoder
    that does not fit, or when nothing fits the memory.
    """
    start = encoder or find_encoder(source, None)
    network = dict(changes.get("network", {}))
    if start is not None:
        card = start.card
        own = {"size": card.size, "token": card.token, "adaptive": card.adaptive} | card.network
        if card.adaptive:
            own["modality_vectors"] = card.modality_vectors
        network = own | network
    contrasts = len(source.channel_names) if network.get("adaptive") else None
    origins = {("network", key): "as the encoder" for key in network}
    origins |= {(section, key): "as given" for section, values in changes.items() for key in values}

    settings = changed(settings_of(source.configuration, contrasts=contrasts), {**changes, "network": network})
    choices = []
    if start is not None:
        settings, choices = _starting_from(source, settings, start)
    estimate, fitted = _estimator(source, settings), settings
    if memory_target is not None:
        fitted = fit_to_memory(
            settings,
            source.patch_size,
            source.configuration.spacing,
            fixed=origins,
            target=max(0, int(memory_target * GIB) - RESERVED),
            estimate=estimate,
        )
    if not fitted.encoder.file:
        refuse_useless_masks(fitted.network, fitted.pretraining, source.patch_size)
    _refuse_impossible(source, fitted, estimate)
    choices = _explain(source, fitted, settings, origins, estimate(fitted)) + choices
    return fitted, choices + [Choice("", "", warning) for warning in clipping_warnings(source)]


def _refuse_impossible(source: Plan, settings: Settings, estimate: Callable[[Settings], Memory]) -> None:
    """Raise `UserError` for plans whose training step no device can hold."""
    for section in ("finetuning",) if settings.encoder.file else ("finetuning", "pretraining"):
        refuse_step_beyond(
            LARGEST_DEVICE,
            "no device",
            shape=(getattr(settings, section).batch_size, len(source.channel_names), *source.patch_size),
            estimate=lambda section=section: getattr(estimate(settings), section),
            advice=f"correct patch_size in {source.plans_name}, or give a smaller batch",
        )


def clipping_warnings(plan: Plan) -> list[str]:
    """Return a sentence for each CT channel whose soft tissue nnU-Net's normalisation makes one constant.

    The share of such voxels is measured on a few preprocessed cases, if there are any.
    """
    warnings = []
    for channel, scheme in enumerate(plan.configuration.normalization_schemes):
        if scheme != "CTNormalization":
            continue
        intensities = plan.plans.foreground_intensity_properties_per_channel[str(channel)]
        lowest = intensities["percentile_00_5"]
        if loses_soft_tissue(lowest):
            clipped = _share_below(plan, channel, (lowest - intensities["mean"]) / max(intensities["std"], 1e-8))
            warnings.append(clipping_warning(plan.channel_names[channel], lowest, clipped, "a few cases"))
    return warnings


def _share_below(plan: Plan, channel: int, lowest: float) -> float | None:
    files = [file for file in plan.preprocessed_folder.glob("[!.]*.b2nd") if not file.name.endswith("_seg.b2nd")]
    shares = [(open_volume(file)[channel] <= lowest + 1e-3).mean() for file in sorted(files)[:FEW_CASES]]
    return float(np.mean(shares)) if shares else None


def _starting_from(source: Plan, settings: Settings, start: Start) -> tuple[Settings, list[Choice]]:
    """Return the settings with a foreign encoder in them, if it fits."""
    place, tensors, card = start.place, start.tensors, start.card
    here = destination(settings.network, source.plans, source.configuration, source.dataset_json)
    try:
        _, notes = adapt_encoder(tensors, card, here)
    except UserError as error:
        raise UserError(
            f"The encoder {place} does not fit here ({error}): change these settings, or choose another encoder."
        ) from None
    name = place if is_address(place) else Path(place).name
    settings = settings.updated({"encoder": {"file": place, "sha256": start.sha256}})
    notes = card.notes + notes
    return settings, [Choice("encoder", name, card.origin), *(Choice("", "", note) for note in notes)]


def _estimator(source: Plan, settings: Settings) -> Callable[[Settings], Memory]:
    """Return a function that estimates the memory of a step; each network and batch is rehearsed once."""
    patch, channels = source.patch_size, len(source.channel_names)

    @cache
    def finetuning(network: Network, batch: int) -> int:
        return finetuning_memory(network, patch, channels, source.outputs, batch, unet=partial(build_unet, source))

    @cache
    def pretraining(network: Network, batch: int) -> int:
        return pretraining_memory(network, settings.pretraining, patch, channels, batch)

    def estimate(chosen: Settings) -> Memory:
        network = chosen.network
        step = finetuning(network, chosen.finetuning.batch_size)
        return Memory(step, 0 if chosen.encoder.file else pretraining(network, chosen.pretraining.batch_size))

    return estimate


def _explain(
    source: Plan, settings: Settings, unfitted: Settings, origins: Mapping[tuple[str, str], str], memory: Memory
) -> list[Choice]:
    network, before = settings.network, unfitted.network

    def origin(section: str, key: str) -> str:
        default = f"as in {source.plans_name}" if source.has_block else "default"
        return origins.get((section, key), default)

    def batch(section: str) -> str:
        chosen, first = getattr(settings, section).batch_size, getattr(unfitted, section).batch_size
        return origin(section, "batch_size") if chosen == first else f"{first} halved to fit the memory"

    tokens = f"{math.prod(token_grid(source.patch_size, network.token))} tokens in a patch of {_by(source.patch_size)}"
    if network.adaptive:
        tokens += f", for each of up to {len(source.channel_names)} contrasts"
    token_origin = origin("network", "token")
    if network.token != before.token:
        token_origin = "the smallest that fits the memory"
    elif token_origin == "default":
        token_origin = f"the smallest of 4 to 16 (fewer in thick slices) within about {TOKEN_BUDGET} tokens"
    upsampling = (
        UPSAMPLINGS[network.upsampling] if network.decoder not in ("mae", "unet") else "not used by this decoder"
    )
    mirroring = mirroring_of(settings.finetuning.mirroring, source.dataset_json["labels"])
    choices = [
        Choice("size", network.size, origin("network", "size")),
        Choice("token", _by(network.token), f"{token_origin}: {tokens}"),
        Choice("decoder", network.decoder, DECODERS[network.decoder]),
        Choice("upsampling", network.upsampling, upsampling),
        Choice("batch, fine-tuning", str(settings.finetuning.batch_size), batch("finetuning")),
        Choice("batch, pre-training", str(settings.pretraining.batch_size), batch("pretraining")),
        Choice("mirroring", mirroring.axes or "none", mirroring.reason),
    ]
    if network.tapped_blocks:
        choices.insert(4, Choice("taps", _by(network.tapped_blocks, ", "), "blocks whose output the decoder takes too"))
    why = "estimated peak of a step on a GPU, beside about 1 GiB for CUDA itself"
    choices += [
        Choice("memory, fine-tuning", size_text(memory.finetuning), why),
        Choice("memory, pre-training", size_text(memory.pretraining), why),
    ]
    return [choice for choice in choices if not (settings.encoder.file and "pre-training" in choice.name)]


def _by(numbers: tuple[int, ...], separator: str = " x ") -> str:
    return separator.join(map(str, numbers))
