"""Does nnU-Net's normalisation of CT lose the soft tissue? Foreseen from raw images, before anything is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_vit_mae.imaging.ct_clipping import LOWER_PERCENTILE, clipping_warning, loses_soft_tissue

SHARES = np.linspace(0, 1, 1001)
SAMPLE = 1_000_000  # voxels used for percentiles: enough for three digits


@dataclass(frozen=True)
class CTIntensities:
    """Evenly spaced quantiles of a CT image (HU): of all its voxels, and of its labelled ones, if there are any."""

    whole: tuple[float, ...]
    labelled: tuple[float, ...]

    @classmethod
    def of(cls, image: np.ndarray, label: np.ndarray) -> CTIntensities:
        """Summarise an image; arrays are (z y x), and any label but 0 counts, as it does for nnU-Net."""
        labelled = image[label > 0]
        whole = np.quantile(image.ravel()[:: max(1, image.size // SAMPLE)], SHARES)
        return cls(tuple(whole.tolist()), tuple(np.quantile(labelled, SHARES).tolist()) if labelled.size else ())


def clipping_of(cases: Sequence[CTIntensities], channel: str) -> str | None:
    """Return a warning if the soft tissue in a CT channel becomes one constant, else None.

    Each case has the same weight in the lower clip, whatever its volume, as in nnU-Net's fingerprint.
    """
    labelled = [case.labelled for case in cases if case.labelled]
    if not labelled:
        return None
    lowest = float(np.percentile(labelled, LOWER_PERCENTILE))
    if not loses_soft_tissue(lowest):
        return None
    clipped = float(np.mean([np.mean(np.array(case.whole) <= lowest) for case in cases]))
    return clipping_warning(channel, lowest, clipped, "all labelled cases")
