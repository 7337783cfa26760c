"""nnU-Net clips CT at percentiles of the labelled voxels: what that leaves of the soft tissue.

Where all labels are dense, such as calcifications, everything darker becomes one value, for the U-Net and the ViT
alike. nnU-Net normalises a channel so if its name is CT.
"""

from __future__ import annotations

SOFT_TISSUE_HU = 20.0  # blood, muscle and organs begin about there
LOWER_PERCENTILE = 0.5  # of the labelled voxels of all training cases, each with equal weight


def is_ct(channel_name: str) -> bool:
    """Return whether nnU-Net clips and scales a channel of this name as CT."""
    return channel_name.casefold() == "ct"


def loses_soft_tissue(lowest: float) -> bool:
    """Return whether a lower clip (HU) makes soft tissue one constant."""
    return lowest >= SOFT_TISSUE_HU


def clipping_warning(channel: str, lowest: float, clipped: float | None, of: str) -> str:
    """Return what a lower clip that loses soft tissue means, and what to do.

    Args:
        channel: Name of the channel.
        lowest: The lower clip in HU.
        clipped: The share of voxels that become one constant, if it is known.
        of: What that is a share of, such as "all cases".
    """
    measured = "" if clipped is None else f" ({clipped:.0%} of the voxels of {of})"
    return (
        f"nnU-Net clips the channel {channel} below {lowest:.0f} HU, as hardly any labelled voxel is darker: all soft "
        f"tissue becomes one constant{measured}. Name the channel CT_zscore in dataset.json and plan again to keep it."
    )
