"""Left and right: labels that name a side of the body, and images that are stored as mirror images of one another."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from nnunet_vit_mae.imaging.volumes import Geometry

SIDES = {"left", "right", "links", "rechts", "gauche", "droite"}  # one of them is enough
SHORT_SIDES = (("l", "r"), ("lt", "rt"), ("lh", "rh"))  # two labels must differ in nothing else


def label_with_side(labels: Iterable[str]) -> str | None:
    """Return a label that names a side of the body, if there is any.

    >>> label_with_side(["background", "brainstem", "right_parotid"])
    'right_parotid'
    >>> label_with_side(["background", "kidneyL", "kidneyR"])
    'kidneyL'
    >>> label_with_side(["background", "L", "lesion"])
    """
    words = {label: _words(label) for label in labels}
    short = dict(SHORT_SIDES) | {right: left for left, right in SHORT_SIDES}
    known = set(words.values())
    for label, own in words.items():
        other_side = tuple(short.get(word, word) for word in own)
        if SIDES.intersection(own) or (other_side != own and other_side in known):
            return label
    return None


def is_right_handed(geometry: Geometry) -> bool:
    """Return whether the axes of an image are right-handed, as LPS and RAS are.

    The voxels of a left-handed image (LAS) look like the mirror image of the patient.
    """
    return float(np.linalg.det(geometry.directions)) > 0


def _words(label: str) -> tuple[str, ...]:
    return tuple(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", label).lower()))
