"""Default settings from what nnU-Net planned, and what follows from a change of some of them.

Pure functions, so that plans without a `vit_mae` block work too: nnU-Net rebuilds the network at prediction from the
plans alone, so the answer depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.settings import Finetuning, Network, Pretraining, Settings, Triple, count_visible, token_grid
from nnunet_vit_mae.units import size_text

TOKEN_BUDGET = 4096  # 64^3 voxels at token 4, the paper's setting; a 128^3 patch at token 8
SLACK = 1.25
THIN_TOKEN = 2
SMALLEST_BATCH = 2  # as in nnU-Net
SETS_TAPS = ("size", "token", "decoder", "adaptive")  # of a network: what its taps are chosen for
CHEAP_DECODER = Pretraining(decoder="cross", rebuilt_share=0.25)  # half the time or less


def default_settings(
    patch_size: Sequence[int], spacing: Sequence[float], unet_batch_size: int, *, contrasts: int | None = None
) -> Settings:
    """Return the settings for a patch (z y x, voxels) at a spacing (z y x, mm).

    With `contrasts` they are those of an adaptive network (AMAE) for this many, which share the budget of tokens.
    Fine-tuning has nnU-Net's own batch, so that it sees as many samples as the U-Net. Raises `UserError` when the
    configuration is not 3D.
    """
    if len(patch_size) != 3:
        raise UserError(
            f"This configuration has a {len(patch_size)}D patch {list(patch_size)}, but the ViT is 3D: "
            "choose a 3D configuration such as 3d_fullres."
        )
    adaptive = contrasts is not None
    token = default_token(patch_size, spacing, TOKEN_BUDGET // (contrasts or 1))
    decoder = default_decoder(adaptive=adaptive)
    return Settings(
        network=Network(token=token, decoder=decoder, adaptive=adaptive),
        pretraining=default_protocol(adaptive=adaptive),
        finetuning=Finetuning(batch_size=unet_batch_size, lr=default_rate(decoder)),
    )


def refuse_useless_masks(network: Network, protocol: Pretraining, patch_size: Sequence[int]) -> None:
    """Raise `UserError` when a crop has no token to hide; at least one is always visible."""
    tokens = math.prod(token_grid(patch_size, network.token))
    if count_visible(tokens, protocol.mask_ratio) == tokens:
        crop, token = (" x ".join(map(str, sides)) for sides in (patch_size, network.token))
        raise UserError(
            f"A mask ratio of {protocol.mask_ratio:g} hides none of the {tokens} tokens of {token} voxels in a patch "
            f"of {crop}, so that there is nothing to learn: choose a smaller token, or a larger mask ratio."
        )


def default_token(patch_size: Sequence[int], spacing: Sequence[float], budget: int = TOKEN_BUDGET) -> Triple:
    """Return the smallest token whose grid stays inside the budget (ViTiac, section 3.1: small tokens are better).

    The budget is soft: a grid may exceed it by a quarter, so that a patch that is a little too large does not lose half
    of its tokens.
    """
    steps = token_steps(patch_size, spacing)
    within = [token for token in steps if math.prod(token_grid(patch_size, token)) <= SLACK * budget]
    return within[0] if within else steps[-1]


def token_steps(patch_size: Sequence[int], spacing: Sequence[float]) -> list[Triple]:
    """Return the tokens to choose from, small to large: each is twice as long as the one before it, along one axis.

    They begin at 4 voxels and end at 16. Along an axis of thick slices a token spans fewer voxels, so that it is about
    as long in mm as along the others. The axis to grow is the one along which the token is shortest in mm, and of
    equals the one with most tokens.

    Args:
        patch_size: Voxels along z y x.
        spacing: mm along z y x.

    >>> token_steps((96, 96, 96), (1.0, 1.0, 1.0))[:4]
    [(4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)]
    """
    thicknesses = [axis_spacing / min(spacing) for axis_spacing in spacing]
    token, largest = ([_side_along(side, thickness) for thickness in thicknesses] for side in (4, 16))
    steps = [tuple(token)]
    while token != largest:
        growing = [axis for axis in range(3) if token[axis] < largest[axis]]
        axis = min(growing, key=lambda axis: (token[axis] * spacing[axis], -patch_size[axis] / token[axis], -axis))
        token[axis] *= 2
        steps.append(tuple(token))
    return [(z, y, x) for z, y, x in steps]


def _side_along(side: int, thickness: float) -> int:
    """Halve a side for each whole factor of two in `thickness`; a token thinner than two voxels gains nothing."""
    return max(THIN_TOKEN, side >> math.floor(math.log2(thickness)))


def default_decoder(*, adaptive: bool) -> str:
    """Return the decoder: nnU-Net's own U-Net, which no other was above with few labels (docs/evidence.md).

    AMAE has UNETR.
    """
    return "unetr" if adaptive else "unet"


def default_protocol(*, adaptive: bool) -> Pretraining:
    """Return the protocol of pre-training; AMAE has its own mask ratio and a plain L2 loss (section 2.4)."""
    return Pretraining(mask_ratio=0.7, norm_pix=False) if adaptive else CHEAP_DECODER


def default_rate(decoder: str) -> float:
    """Return the peak rate of fine-tuning: a U-Net learns by AdamW at a higher one than a ViT (docs/evidence.md)."""
    return 1e-3 if decoder == "unet" else Finetuning().lr


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return settings with changes (a partial block).

    A network of another size, token or decoder, or one that is adaptive where the other was not or the reverse, brings
    its default taps; the latter also its default decoder and protocol of pre-training, and another decoder its default
    rate. What is given too is kept, and so is what is not the default in rate and protocol.

    Raises:
        UserError: If the changes are not valid.
    """
    network = changes.get("network", {})
    if isinstance(network, Mapping) and network:
        adaptive = network.get("adaptive", settings.network.adaptive)
        if adaptive != settings.network.adaptive:
            network = {"decoder": default_decoder(adaptive=adaptive), **network}
        changes = {**changes, "network": network}
    now = settings.updated({"network": {"taps": ()}}).updated(changes)
    same_blocks = all(getattr(settings.network, name) == getattr(now.network, name) for name in SETS_TAPS)
    if "taps" not in network and same_blocks:
        now = now.updated({"network": {"taps": settings.network.taps}})
    had_default = settings.finetuning.lr == default_rate(settings.network.decoder)
    if had_default and "lr" not in changes.get("finetuning", {}):
        now = now.updated({"finetuning": {"lr": default_rate(now.network.decoder)}})
    return _with_protocol_of_its_kind(now, settings, given=changes.get("pretraining", {}))


def _with_protocol_of_its_kind(now: Settings, before: Settings, *, given: Collection[str]) -> Settings:
    """Return settings with the default protocol of an adaptive network, or the other one, where `before` has not."""
    there, here = (vars(default_protocol(adaptive=settings.network.adaptive)) for settings in (before, now))
    own = {
        name: value
        for name, value in here.items()
        if name not in given and value != there[name] == getattr(before.pretraining, name)
    }
    if now.pretraining.plain_share:
        own.pop("norm_pix", None)  # a plain loss in the first epochs is only for a norm-pix one in the others
    return now.updated({"pretraining": own})


@dataclass(frozen=True)
class Memory:
    """Estimated peak bytes of a training step."""

    finetuning: int
    pretraining: int  # 0 where plans start from an encoder that is trained already


def fit_to_memory(
    settings: Settings,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    *,
    fixed: Collection[tuple[str, str]],
    target: int,
    estimate: Callable[[Settings], Memory],
) -> Settings:
    """Return settings whose training steps stay within `target` bytes.

    First the batches of fine-tuning and pre-training are halved, down to 2; where that is not enough, the token grows.
    `fixed` are the entries (section, key) that a person has chosen, which stay, but taps only with their token. More
    memory buys smaller tokens, never larger batches than the defaults, because an epoch's time grows with the batch.

    Raises `UserError` when nothing fits.
    """
    candidate, larger = settings, []
    if ("network", "token") not in fixed:
        own = settings.network.token
        larger = [
            token
            for token in token_steps(patch_size, spacing)
            if token != own and all(a >= b for a, b in zip(token, own, strict=True))
        ]
    while True:
        for section in ("finetuning", "pretraining"):
            candidate = _with_largest_batch(candidate, section, fixed=fixed, target=target, estimate=estimate)
        needed = estimate(candidate)
        if max(needed.finetuning, needed.pretraining) <= target:
            return candidate
        if not larger:
            break
        candidate = settings.updated({"network": {"token": larger.pop(0), "taps": ()}})
    steps = f"{size_text(needed.finetuning)} (fine-tuning, batch {candidate.finetuning.batch_size})"
    if needed.pretraining:
        steps += f" and {size_text(needed.pretraining)} (pre-training, batch {candidate.pretraining.batch_size})"
    raise UserError(
        f"With token {list(candidate.network.token)} a training step needs about {steps}, more than the "
        f"{size_text(target)} that -gpu_memory_target leaves: choose a smaller --size, a larger --token, another "
        "--decoder, or more memory."
    )


def _with_largest_batch(
    settings: Settings,
    section: str,
    *,
    fixed: Collection[tuple[str, str]],
    target: int,
    estimate: Callable[[Settings], Memory],
) -> Settings:
    """Halve the batch until the section's step fits, or until it is 2, or the least that its reads allow."""
    unit = settings.pretraining.samples_per_read if section == "pretraining" else 1
    smallest = unit * math.ceil(SMALLEST_BATCH / unit)
    while (
        (section, "batch_size") not in fixed
        and getattr(settings, section).batch_size > smallest
        and getattr(estimate(settings), section) > target
    ):
        half = max(smallest, getattr(settings, section).batch_size // 2 // unit * unit)
        settings = settings.updated({section: {"batch_size": half}})
    return settings
