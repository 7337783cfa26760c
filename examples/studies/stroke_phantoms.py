"""Write synthetic MR of acute stroke as an nnU-Net raw dataset, in which many studies lack T2, as in the AMAE paper.

    python examples/studies/stroke_phantoms.py "$nnUNet_raw"
    mae3d_fill_contrasts -d 910

An acute infarct is bright on trace-weighted images and dark on ADC. Two kinds of lesions have to be told from it: old
infarcts, bright on ADC and T2, and lesions that are bright on trace-weighted images by their T2 alone (shine-through).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.storage.files import write_json

NAME = "Dataset910_StrokePhantom"
CONTRASTS = ("ADC", "Trace", "T2")
SHAPE, SPACING = (24, 40, 32), 4.0  # voxels (z y x) and mm
WITHOUT_T2 = 0.4  # share of studies; none of the test studies

# ADC in um2/ms, and signal on T2-weighted images; signals on trace-weighted images follow from both
AIR, FLUID, WHITE, GREY = (0.0, 0.0), (3.0, 1.0), (0.8, 0.5), (0.9, 0.6)
ACUTE, OLD, SHINING = (0.5, 0.7), (1.6, 0.9), (0.85, 0.95)
B_VALUE = 1.0  # ms/um2
MOST_LESIONS = {ACUTE: 3, OLD: 3, SHINING: 3}  # a study has one acute infarct at least
RADIUS = (0.1, 0.25)  # of a lesion; half of the head is 1
NOISE = 0.04


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="folder of nnU-Net's raw datasets")
    for flag, number in (("--labelled", 40), ("--unlabelled", 160), ("--test", 30), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=number)
    arguments = parser.parse_args()
    folder = arguments.raw / NAME
    if folder.exists():
        raise UserError(f"{folder} already exists: remove it first.")
    random = np.random.default_rng(arguments.seed)
    for name, count in (("Tr", arguments.labelled), ("Un", arguments.unlabelled), ("Ts", arguments.test)):
        for number in range(count):
            images, label = draw_study(random)
            if name != "Ts" and random.random() < WITHOUT_T2:
                del images["T2"]
            case = f"stroke_{name}_{number:03d}"
            for contrast, image in images.items():
                write(image, folder / f"images{name}" / f"{case}_{CONTRASTS.index(contrast):04d}.nii.gz")
            if name != "Un":
                write(label, folder / f"labels{name}" / f"{case}.nii.gz")
    description = {
        "channel_names": {str(channel): contrast for channel, contrast in enumerate(CONTRASTS)},
        "labels": {"background": 0, "infarct": 1},
        "numTraining": arguments.labelled,
        "file_ending": ".nii.gz",
    }
    write_json(description, folder / "dataset.json")
    print(f"Wrote {folder}.")


def draw_study(random: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the images (z y x) of a study by contrast, and the label of its acute infarcts."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij")
    points = np.array([axis + 0.08 * smooth(random) for axis in axes])
    distance = np.linalg.norm(points / random.uniform(0.8, 0.95, (3, 1, 1, 1)), axis=0)
    adc, t2 = (np.select([distance > 1, distance > 0.9], [AIR[part], FLUID[part]], WHITE[part]) for part in (0, 1))
    cortex = (distance < 0.9) & ((distance > 0.7) | (smooth(random) > 1.2))
    mirrored = np.array([points[0], points[1], np.abs(points[2])])
    ventricles = ellipsoid(mirrored, (0.1, 0.0, 0.2), np.array([0.25, 0.4, 0.1]) * random.uniform(0.7, 1.4))
    infarct = np.zeros(SHAPE, bool)
    for (own_adc, own_t2), inside in (
        (GREY, cortex),
        *((kind, lesion) for kind in (OLD, SHINING, ACUTE) for lesion in lesions(random, kind, points, distance < 0.9)),
        (FLUID, ventricles),
    ):
        adc, t2 = np.where(inside, own_adc, adc), np.where(inside, own_t2, t2)
        infarct = (infarct | inside) if (own_adc, own_t2) == ACUTE else infarct & ~inside
    adc, t2 = (part * (1 + 0.05 * smooth(random)) for part in (adc, t2))
    images = {"ADC": adc, "Trace": t2 * np.exp(-B_VALUE * adc), "T2": t2}
    return {name: scanned(image, random, field=name != "ADC") for name, image in images.items()}, infarct


def lesions(
    random: np.random.Generator, kind: tuple[float, float], points: np.ndarray, brain: np.ndarray
) -> list[np.ndarray]:
    """Return the voxels of each lesion of a kind."""
    found = []
    for _ in range(random.integers(kind == ACUTE, MOST_LESIONS[kind] + 1)):
        centre = points[:, *random.choice(np.argwhere(brain))]
        found.append(ellipsoid(points + 0.05 * smooth(random), centre, random.uniform(*RADIUS, 3)) & brain)
    return found


def ellipsoid(points: np.ndarray, centre: np.ndarray | tuple[float, ...], radii: np.ndarray) -> np.ndarray:
    """Return which points (3 z y x) lie inside."""
    return (((points - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))) ** 2).sum(axis=0) < 1


def smooth(random: np.random.Generator) -> np.ndarray:
    """Return a smooth random field of deviation 1."""
    field = ndimage.gaussian_filter(random.normal(size=SHAPE), 3)
    return field / field.std()


def scanned(image: np.ndarray, random: np.random.Generator, *, field: bool) -> np.ndarray:
    """Return an image with noise and, unless it is a map of physical units, an unknown gain and an uneven coil."""
    if field:
        image = image * np.exp(0.1 * smooth(random)) * random.uniform(300, 900)
    return (image + random.normal(scale=NOISE * image.max(), size=SHAPE)).astype(np.float32)


def write(volume: np.ndarray, file: Path) -> None:
    """Write an image or a label."""
    image = sitk.GetImageFromArray(volume.astype(np.uint8) if volume.dtype == bool else volume)
    image.SetSpacing([SPACING] * 3)
    write_image(image, file)


if __name__ == "__main__":
    main()
