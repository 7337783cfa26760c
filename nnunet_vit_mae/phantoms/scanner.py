"""Phantom scans: pose, reconstruction kernel, slice thickness and noise turn an anatomy into a labelled image.

The four scanners and two kernels are invented, but differ as real ones do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.phantoms.anatomy import FINE_MM, Seed, column, draw_anatomy, generator, render

HU_RANGE = (-1024, 3071)
THRESHOLD_HU = 130
OVERSHOOT_WIDTH_MM = 0.8
REFERENCE_SLICE_MM = 1.25  # the slice thickness at which a scanner's noise is stated
SLICES_MM = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0)
SLICE_SHARES = (0.05, 0.07, 0.1, 0.23, 0.2, 0.1, 0.1, 0.08, 0.04, 0.03)


@dataclass(frozen=True)
class PhantomScanner:
    """A scanner: noise and offset in HU, range of pixel sizes in mm, and share of scans with the bone kernel."""

    noise: float
    offset: float
    pixel_range: tuple[float, float]
    bone_share: float


@dataclass(frozen=True)
class Kernel:
    """An in-plane reconstruction kernel: blur in mm, overshoot at edges, and noise relative to the scanner's."""

    blur: float
    overshoot: float
    noise: float


SCANNERS = {
    "A64": PhantomScanner(noise=7.0, offset=0.0, pixel_range=(0.80, 0.90), bone_share=0.2),
    "B16": PhantomScanner(noise=11.0, offset=4.0, pixel_range=(0.95, 1.10), bone_share=0.1),
    "C128": PhantomScanner(noise=5.0, offset=-3.0, pixel_range=(0.80, 1.00), bone_share=0.5),
    "D32": PhantomScanner(noise=9.0, offset=-6.0, pixel_range=(0.85, 1.05), bone_share=0.3),
}
KERNELS = {"soft": Kernel(blur=0.5, overshoot=0.0, noise=1.0), "bone": Kernel(blur=0.3, overshoot=0.6, noise=3.0)}


@dataclass(frozen=True)
class Examination:
    """How a scan is acquired: scanner, kernel, slice thickness and pixel size in mm, and pose (mm and degrees)."""

    scanner: str
    kernel: str
    slice_thickness: float
    pixel: float
    shift: tuple[float, float, float]
    tilt: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class PhantomScan:
    """A scan: int16 HU image and uint8 label of equal shape (z y x), spacing in mm (z y x), and its acquisition."""

    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]
    scanner: str
    kernel: str
    slice_thickness: float

    @property
    def label_volume(self) -> float:
        """Volume of the label in mm3."""
        return float(self.label.sum() * np.prod(self.spacing))


def make_scan(
    patient_seed: Seed,
    scan_seed: Seed,
    *,
    extent_mm: tuple[float, float, float] = (32.0, 40.0, 40.0),
    scanner: str | None = None,
    kernel: str | None = None,
    slice_thickness: float | None = None,
    plaque_scale: float = 1.0,
) -> PhantomScan:
    """Scan a phantom patient.

    Args:
        patient_seed: Random seed of the anatomy.
        scan_seed: Random seed of pose, scanner, kernel, slice thickness and noise.
        extent_mm: Size of the region covered (z y x, mm).
        scanner: Key of SCANNERS that replaces the drawn one.
        kernel: Key of KERNELS that replaces the drawn one.
        slice_thickness: Slice thickness in mm that replaces the drawn one.
        plaque_scale: Factor of the length, width and thickness of plaques.

    Raises:
        UserError: If an argument is out of range.
    """
    given = {"scanner": scanner, "kernel": kernel, "slice_thickness": slice_thickness}
    given = {name: value for name, value in given.items() if value is not None}
    examination = replace(draw_examination(scan_seed), **given)
    _check_arguments(examination, extent_mm, plaque_scale)

    body = render(draw_anatomy(patient_seed, plaque_scale), fine_points(examination, extent_mm))
    machine, filtering = SCANNERS[examination.scanner], KERNELS[examination.kernel]
    spacing = (examination.slice_thickness, examination.pixel, examination.pixel)
    density, plaque, bone = (
        _in_plane_blur(part, filtering.blur / FINE_MM) for part in (body.density, body.plaque, body.bone)
    )
    density = density + filtering.overshoot * (density - _in_plane_blur(density, OVERSHOOT_WIDTH_MM / FINE_MM))
    image = sample(density, spacing) + machine.offset
    deviation = machine.noise * filtering.noise * np.sqrt(REFERENCE_SLICE_MM / examination.slice_thickness)
    image += deviation * _kernel_noise(generator(3, scan_seed), image.shape, filtering)
    image = np.clip(np.rint(image), *HU_RANGE).astype(np.int16)
    label = _label_plaques(image, sample(plaque, spacing), sample(bone, spacing))
    return PhantomScan(image, label, spacing, examination.scanner, examination.kernel, examination.slice_thickness)


def draw_examination(scan_seed: Seed) -> Examination:
    """Draw the acquisition of a scan."""
    rng = generator(2, scan_seed)
    scanner = str(rng.choice(list(SCANNERS)))
    return Examination(
        scanner=scanner,
        kernel="bone" if rng.random() < SCANNERS[scanner].bone_share else "soft",
        slice_thickness=float(rng.choice(SLICES_MM, p=SLICE_SHARES)),
        pixel=round(rng.uniform(*SCANNERS[scanner].pixel_range), 3),
        shift=tuple(rng.uniform(-1.5, 1.5, 3)),
        tilt=tuple(rng.uniform(-4, 4, 3)),
    )


def _check_arguments(examination: Examination, extent_mm: tuple[float, float, float], plaque_scale: float) -> None:
    if examination.scanner not in SCANNERS:
        raise UserError(f"There is no phantom scanner {examination.scanner!r}: choose from {', '.join(SCANNERS)}.")
    if examination.kernel not in KERNELS:
        raise UserError(f"There is no phantom kernel {examination.kernel!r}: choose from {', '.join(KERNELS)}.")
    if not 0.5 <= examination.slice_thickness <= 5:
        raise UserError(f"slice_thickness is {examination.slice_thickness} mm, but must be between 0.5 and 5 mm.")
    if min(extent_mm) < 10:
        raise UserError(f"extent_mm is {extent_mm}, but every side must be at least 10 mm.")
    if not 0 < plaque_scale <= 3:
        raise UserError(f"plaque_scale is {plaque_scale}, but must be above 0 and at most 3.")


def fine_points(examination: Examination, extent_mm: tuple[float, float, float]) -> np.ndarray:
    """Return the patient coordinates of the fine voxels in the pose of an examination (3 z y x, mm, float32)."""
    axes = [(np.arange(round(extent / FINE_MM)) + 0.5) * FINE_MM - extent / 2 for extent in extent_mm]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    turn = np.eye(3) + np.cross(np.eye(3), np.deg2rad(examination.tilt))  # to first order, enough for a few degrees
    return np.tensordot(np.float32(turn), grid, axes=1) + column(examination.shift)


def _in_plane_blur(volume: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(volume, (0, sigma, sigma), mode="nearest", truncate=3)


def sample(fine: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Average a fine volume (z y x) over voxels of `spacing` mm (z y x); as many as fit, centred in the region."""
    for axis, step in enumerate(spacing):
        size = fine.shape[axis] * FINE_MM
        count = int(size / step + 1e-6)
        edges = ((size - count * step) / 2 + np.arange(count + 1) * step) / FINE_MM
        total = np.moveaxis(np.cumsum(fine, axis=axis, dtype=np.float64), axis, 0)
        total = np.concatenate([np.zeros_like(total[:1]), total])
        whole = np.minimum(edges.astype(int), len(total) - 2)
        part = (edges - whole)[:, None, None]
        integral = total[whole] * (1 - part) + total[whole + 1] * part
        fine = np.moveaxis(np.diff(integral, axis=0), 0, axis) * (FINE_MM / step)
    return fine


def _kernel_noise(rng: np.random.Generator, shape: tuple[int, ...], kernel: Kernel) -> np.ndarray:
    """Return noise of standard deviation 1 with the texture of a kernel: coarse if it blurs, fine if it sharpens."""
    white = rng.normal(size=shape)
    coarse = _in_plane_blur(white, 0.7)
    grain = white - coarse if kernel.overshoot else coarse
    return grain / grain.std()


def _label_plaques(image: np.ndarray, plaque: np.ndarray, bone: np.ndarray) -> np.ndarray:
    """Label as a reader does: inside the circle around a plaque, at least 130 HU, and no single voxels."""
    label = (image >= THRESHOLD_HU) & (plaque >= 0.1) & (plaque >= bone)
    pieces = np.zeros(label.shape, np.int32)
    ndimage.label(label, np.ones((3, 3, 3)), output=pieces)
    return (label & (np.bincount(pieces.ravel())[pieces] > 1)).astype(np.uint8)
