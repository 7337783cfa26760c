"""A synthetic head whose place in space is known, for tests of registration, cropping and conversion."""

from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.crop.region import physical_points
from nnunet_vit_mae.imaging.registration import map_points

SIZE, SPACING = (44, 52, 30), (2.0, 1.8, 3.0)  # x y z: three unequal sides, 88 x 94 x 90 mm
COARSE_GRID = {"size": (22, 26, 18), "spacing": (4.0, 3.6, 5.0)}  # enough where accuracy does not matter
CORNERS = np.array(list(product((-14, 14), (-6, 22), (-12, 12))), float)  # of the region, in mm


def head(points: np.ndarray) -> np.ndarray:
    """Grey values at points (n, 3; x y z in mm): a skull, a brain with texture, and unequal dark and bright parts."""

    def inside(centre, axes):
        return (((points - centre) / axes) ** 2).sum(1) < 1

    x, y, z = points.T
    texture = 12 * np.sin(x / 5) * np.cos(y / 7 + 1) + 10 * np.sin(z / 6 + x / 9)
    values = np.zeros(len(points))
    values[inside((0, 0, 0), (36, 42, 38))] = 200
    brain = inside((0, 0, 0), (32, 38, 34))
    values[brain] = (100 + texture)[brain]
    values[inside((0, 8, 0), (8, 13, 9))] = 30
    values[inside((16, -16, 6), (7, 6, 9))] = 160
    values[inside((-12, -10, -14), (9, 5, 5))] = 60
    return values


def grid(size=SIZE, spacing=SPACING, turn=(0.0, 0.0, 0.0), flip=(1, 1, 1), centre=(0.0, 0.0, 0.0)) -> sitk.Image:
    """An empty image around `centre`, its axes rotated and flipped."""
    image = sitk.Image(size, sitk.sitkFloat32)
    image.SetSpacing(spacing)
    rotation = sitk.Euler3DTransform()
    rotation.SetRotation(*turn)
    image.SetDirection((np.array(rotation.GetMatrix()).reshape(3, 3) * np.array(flip)).ravel().tolist())
    middle = physical_points(image, (np.array([size], float) - 1) / 2)[0]
    image.SetOrigin((np.array(centre) - middle).tolist())
    return image


def voxel_points(image: sitk.Image) -> np.ndarray:
    index = np.indices(image.GetSize()[::-1]).reshape(3, -1).T[:, ::-1]
    return physical_points(image, index.astype(float))


def filled(image: sitk.Image, values: np.ndarray) -> sitk.Image:
    result = sitk.GetImageFromArray(values.reshape(image.GetSize()[::-1]))
    result.CopyInformation(image)
    return result


def scan(to_scan: sitk.Transform, noise: int = 0, **geometry) -> tuple[sitk.Image, sitk.Image]:
    """The head where `to_scan` takes it, in a grid around it, and a label: the dark part in its middle."""
    centre = to_scan.TransformPoint((0.0, 0.0, 0.0))
    image = grid(**{"centre": centre} | geometry)
    points = map_points(to_scan.GetInverse(), voxel_points(image))
    values = head(points) + np.random.default_rng(noise).normal(0, 3, len(points))
    label = (((points - (0, 8, 0)) / (8, 13, 9)) ** 2).sum(1) < 1
    return filled(image, values.astype(np.float32)), filled(image, label.astype(np.uint8))


def moved(turn=(0.0, 0.0, 0.0), shift=(0.0, 0.0, 0.0), scales=(1.0, 1.0, 1.0)) -> sitk.AffineTransform:
    rotation = sitk.Euler3DTransform()
    rotation.SetRotation(*turn)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((np.array(rotation.GetMatrix()).reshape(3, 3) * scales).ravel().tolist())
    transform.SetTranslation(shift)
    return transform


def tell_two_places(file: Path) -> None:
    """Give a NIfTI file a qform 50 mm away from its sform."""
    image: Any = nibabel.load(file)
    elsewhere = image.affine.copy()
    elsewhere[:3, 3] += 50
    image.set_qform(elsewhere, 1)
    image.set_sform(image.affine, 1)
    nibabel.save(image, file)


def write_template(folder: Path, **geometry) -> tuple[Path, Path]:
    """A template and the region on it, a box."""
    image = scan(moved(), noise=99, **geometry)[0]
    points = voxel_points(image)
    region = np.all((points >= CORNERS.min(0)) & (points <= CORNERS.max(0)), axis=1)
    sitk.WriteImage(image, str(folder / "young.nii.gz"))
    sitk.WriteImage(filled(image, region.astype(np.uint8)), str(folder / "region.nii.gz"))
    return folder / "young.nii.gz", folder / "region.nii.gz"
