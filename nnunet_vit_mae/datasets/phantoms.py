"""Synthetic CT of the skull base round the carotid siphons, written as an nnU-Net v2 raw data set.

The phantom stands in for the clinical scans of the ViTiac paper (its data section: patches round the cavernous carotid
artery, calcification labelled by circling a plaque, keeping what reaches 130 HU and dropping single voxels).  A patient
is an analytic anatomy, so each of their scans samples the same body in another pose, scanner, kernel and slice
thickness.

Arrays and coordinate triples run z, y, x; z points up, y backwards, x to the patient's left (the LPS frame of NIfTI and
SimpleITK).  Lengths are mm from the centre of the region, densities Hounsfield units (HU).  A "surface" below is an
approximate signed distance in mm, negative inside.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

Array = np.ndarray
Seed = int | tuple[int, ...]

FINE_MM = 0.5  # the isotropic grid on which the anatomy is drawn before the scanner averages it
THRESHOLD_HU = 130
SMALLEST_EXTENT_MM = 10.0
SMALLEST_LABEL_MM3 = 5.0
MOST_REDRAWS = 100
HU_RANGE = (-1024, 3071)
SLICE_RANGE_MM = (0.5, 5.0)
SLICE_SHARES = {0.5: 0.05, 0.625: 0.07, 0.75: 0.1, 1.0: 0.23, 1.25: 0.2, 1.5: 0.1, 2.0: 0.1, 2.5: 0.08, 3.0: 0.04,
                5.0: 0.03}
PLAQUE_COUNT_SHARES = (0.1, 0.15, 0.25, 0.25, 0.15, 0.1)  # of patients with 0, 1, ... 5 plaques
VESSEL_WALL_MM, SHEATH_MM = 0.4, 1.4
IMAGE_FOLDERS = {"labelled": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}
LABEL_FOLDERS = {"labelled": "labelsTr", "test": "labelsTs"}

# HU of tissues that do not vary between patients.  The fluid fills the cisterns round the brain; the sheath is fluid
# and a little fat round the vessel, without which blood would hardly show beside brain.
AIR, FAT, SHEATH, FLUID, BRAIN, MUSCLE = -1000.0, -85.0, -10.0, 8.0, 36.0, 58.0

# Centre line of the left siphon from the petrous canal upwards; the right one is its mirror image.
SIPHON = np.array([(-19, 9, 11), (-13, 10, 11), (-7, 9, 11), (-2, 6, 10.8), (-0.5, 0, 10.5), (-0.5, -6, 10.2),
                   (2.5, -10.5, 10), (6.5, -9, 9.8), (8, -4, 9.6), (9.5, 0, 10), (13, 2.5, 11.5), (19, 4, 13)], float)


@dataclass(frozen=True)
class Scanner:
    """One machine: noise and offset in HU, the range of pixel sizes in mm, how often it uses the bone kernel."""

    noise: float
    offset: float
    pixel_range: tuple[float, float]
    bone_share: float


@dataclass(frozen=True)
class Kernel:
    """In-plane reconstruction filter: blur in mm, then an overshoot at edges; its noise relative to the scanner's."""

    blur: float
    overshoot: float
    noise: float


SCANNERS = {
    "A64": Scanner(noise=7.0, offset=0.0, pixel_range=(0.80, 0.90), bone_share=0.2),
    "B16": Scanner(noise=11.0, offset=4.0, pixel_range=(0.95, 1.10), bone_share=0.1),
    "C128": Scanner(noise=5.0, offset=-3.0, pixel_range=(0.80, 1.00), bone_share=0.5),
    "D32": Scanner(noise=9.0, offset=-6.0, pixel_range=(0.85, 1.05), bone_share=0.3),
}
KERNELS = {"soft": Kernel(blur=0.5, overshoot=0.0, noise=1.0), "bone": Kernel(blur=0.3, overshoot=0.6, noise=3.0)}
OVERSHOOT_WIDTH_MM = 0.8
REFERENCE_SLICE_MM = 1.25  # the slice thickness at which a scanner's noise is stated


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan: int16 HU image and uint8 label of equal shape (z y x), spacing in mm (z y x), and how it was taken."""

    image: Array
    label: Array
    spacing: tuple[float, float, float]
    patient: str
    scanner: str
    kernel: str
    slice_thickness: float

    @property
    def label_volume(self) -> float:
        """Volume of the label in mm3."""
        return float(self.label.sum() * np.prod(self.spacing))


@dataclass(frozen=True, eq=False)
class Waves:
    """A smooth random field of mean 0 and deviation 1: plane waves, which any pose samples without interpolation."""

    vectors: Array
    phases: Array

    def __call__(self, points: Array) -> Array:
        """Values (z y x) of the field at points (3, z, y, x)."""
        angles = np.tensordot(self.vectors, points, axes=1) + _column(self.phases)
        return np.sin(angles, out=angles).sum(0) * np.float32(np.sqrt(2 / len(self.phases)))


@dataclass(frozen=True)
class Plaque:
    """A crescent in the vessel wall: where along the vessel (mm) and round it (radians), half sizes in mm, and HU."""

    position: float
    angle: float
    half_length: float
    half_width: float
    half_thickness: float
    density: float


@dataclass(frozen=True, eq=False)
class Vessel:
    """One siphon: centre line (points, 3) at equal steps of `step` mm, lumen radius in mm, and its plaques."""

    line: Array
    step: float
    radius: float
    plaques: tuple[Plaque, ...]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """All that is particular to one patient; lengths in mm, densities in HU."""

    scale: Array
    warp: tuple[Waves, ...]
    texture: Waves
    sponge: Waves
    sinus_size: float
    septum: float
    cortical: float
    spongy: float
    blood: float
    vessels: tuple[Vessel, ...]


@dataclass(frozen=True)
class Examination:
    """How one scan is taken: names of scanner and kernel, slice and pixel size in mm, and the pose of the head."""

    scanner: str
    kernel: str
    slice_thickness: float
    pixel: float
    shift: tuple[float, float, float]
    tilt: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Rendering:
    """The body on the fine grid (z y x): HU, the shares 0..1 of plaque and bone, and mm to the nearest lumen edge."""

    density: Array
    plaque: Array
    bone: Array
    lumen: Array


def _column(values: Array | tuple) -> Array:
    return np.float32(values)[:, None, None, None]


def _generator(stream: int, seed: Seed) -> np.random.Generator:
    return np.random.default_rng([stream, *np.atleast_1d(seed).tolist()])


# ---------- drawing a patient


def draw_anatomy(patient_seed: Seed) -> Anatomy:
    """The anatomy that `patient_seed` stands for."""
    rng = _generator(1, patient_seed)
    common = rng.normal(0, 0.6, SIPHON.shape)
    burden = rng.lognormal(0.0, 0.3)
    sides = rng.permutation([side for side in (-1, 1) for _ in range(3)])
    sides = sides[: rng.choice(len(PLAQUE_COUNT_SHARES), p=PLAQUE_COUNT_SHARES)]
    radius = rng.uniform(2.0, 2.5)
    return Anatomy(
        scale=rng.uniform(0.94, 1.08, 3),
        warp=tuple(_draw_waves(rng, 3, (15, 40)) for _ in range(3)),
        texture=_draw_waves(rng, 5, (8, 20)),
        sponge=_draw_waves(rng, 5, (2.5, 4.5)),
        sinus_size=rng.uniform(0.8, 1.05),
        septum=rng.uniform(-2.5, 2.5),
        cortical=rng.uniform(800, 1350),
        spongy=rng.uniform(180, 320),
        blood=rng.uniform(48, 60),
        vessels=tuple(_draw_vessel(rng, side, common, radius, burden, int((sides == side).sum())) for side in (-1, 1)),
    )


def _draw_waves(rng: np.random.Generator, count: int, wavelengths: tuple[float, float]) -> Waves:
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = directions * (2 * np.pi / rng.uniform(*wavelengths, (count, 1)))
    return Waves(vectors.astype(np.float32), rng.uniform(0, 2 * np.pi, count).astype(np.float32))


def _draw_vessel(rng: np.random.Generator, side: int, common: Array, radius: float, burden: float,
                 plaques: int) -> Vessel:
    knots = (SIPHON + common + rng.normal(0, 0.3, SIPHON.shape)) * (1, 1, side)
    along = np.linspace(0, len(knots) - 1, 401)
    rough = np.stack([np.interp(along, np.arange(len(knots)), axis) for axis in knots.T], axis=1)
    smooth = ndimage.gaussian_filter1d(rough, sigma=18, axis=0, mode="nearest")
    arc = np.concatenate([[0], np.linalg.norm(np.diff(smooth, axis=0), axis=1).cumsum()])
    line = np.stack([np.interp(np.linspace(0, arc[-1], 72), arc, axis) for axis in smooth.T], axis=1)
    return Vessel(line.astype(np.float32), arc[-1] / 71, radius * rng.uniform(0.95, 1.05),
                  tuple(_draw_plaque(rng, arc[-1], burden) for _ in range(plaques)))


def _draw_plaque(rng: np.random.Generator, vessel_length: float, burden: float) -> Plaque:
    half_length = float(np.clip(burden * rng.lognormal(0.5, 0.45), 0.5, 5.0))
    return Plaque(
        position=vessel_length * rng.uniform(0.3, 0.8),  # the cavernous and the clinoid segments
        angle=rng.uniform(-np.pi, np.pi),
        half_length=half_length,
        half_width=min(half_length * rng.uniform(0.6, 1.0), 2.8),
        half_thickness=float(np.clip(0.35 * half_length * rng.uniform(0.7, 1.3), 0.35, 0.8)),
        density=rng.uniform(150, 900),
    )


# ---------- surfaces in mm


def _ellipsoid(points: Array, centre: tuple, radii: tuple) -> Array:
    squares = sum(((axis - middle) / radius) ** 2 for axis, middle, radius in zip(points, centre, radii, strict=True))
    return (np.sqrt(squares) - 1) * min(radii)


def _rod(points: Array, start: tuple, end: tuple, radius: float) -> Array:
    """A rod with round ends, in as many dimensions as `start` has."""
    start, span = np.float32(start), np.float32(end) - np.float32(start)
    offsets = [axis - middle for axis, middle in zip(points, start, strict=True)]
    along = sum(offset * part for offset, part in zip(offsets, span, strict=True)) / (span @ span)
    np.clip(along, 0, 1, out=along)
    return np.sqrt(sum((offset - along * part) ** 2 for offset, part in zip(offsets, span, strict=True))) - radius


def _sheet(points: Array, axis: int, start: tuple, end: tuple, radius: float, reach: tuple[float, float]) -> Array:
    """A plate: a two-dimensional rod across `axis`, drawn out along it from reach[0] to reach[1]."""
    middle, half = sum(reach) / 2, (reach[1] - reach[0]) / 2
    across = _rod(np.delete(points, axis, axis=0), start, end, radius)
    return np.maximum(across, np.abs(points[axis] - middle) - half)


def _blend(first: Array, second: Array, width: float = 2.0) -> Array:
    """Union of two surfaces with the crease between them filled."""
    crease = np.maximum(width - np.abs(first - second), 0) / width
    return np.minimum(first, second) - crease**2 * (width / 4)


def _share(surface: Array) -> Array:
    """Share of each fine voxel that lies inside a surface."""
    return np.clip(0.5 - surface / np.float32(FINE_MM), 0, 1)


def _bones(mirrored: Array, sinus: Array) -> Array:
    """Surface of the skull base; `mirrored` are the points with |x| in place of x."""
    hollow = mirrored - _column((1, 0, 0)) * (0.013 * (mirrored[1] + 3) ** 2)
    parts = [
        sinus - 1.1,  # thin wall of the sphenoid sinus
        _ellipsoid(mirrored, (-6, 1, 0), (8, 10, 8.5)),  # body of the sphenoid
        _rod(mirrored * _column((1, 1, 0.4)), (4, 9.5, 0), (-20, 17, 0), 2.9),  # dorsum sellae and clivus
        _sheet(mirrored, 2, (7.5, -9), (9.5, -24), 1.1, (-26, 26)),  # planum and lesser wing
        _rod(mirrored, (9, -16, 14), (8.5, -4, 13.5), 1.9),  # anterior clinoid process
        _sheet(mirrored, 0, (-13, 11), (-19, 26), 1.2, (-12, 10)),  # greater wing, between orbit and temporal lobe
        _sheet(hollow, 1, (-9, 8), (-11, 26), 1.3, (-20, 12)),  # floor of the middle fossa
        _sheet(mirrored, 0, (-5, 8.5), (-13, 8), 1.0, (-20, -8)),  # pterygoid plate
        _rod(mirrored, (-9, 11, 12), (-5, 21, 25), 5.5),  # petrous apex
    ]
    fossa = _ellipsoid(mirrored, (5.5, 2.5, 0), (5.5, 5, 7))  # the sella, which holds the pituitary gland
    return np.maximum(reduce(_blend, parts), -fossa)


def _soft_tissue(points: Array, mirrored: Array, texture: Array) -> Array:
    """HU of everything but bone, air and vessels."""
    z, y, _ = mirrored
    before_clivus = (y - 11.5) + 0.32 * z
    below_base = np.maximum(z + 11, before_clivus)
    cisterns = np.minimum(_ellipsoid(mirrored, (13, 1, 0), (6, 10, 13)), np.abs(before_clivus - 4.5) - 3)
    density = BRAIN + 3 * texture
    regions = [
        (cisterns, FLUID),
        (_ellipsoid(mirrored, (5, 2.5, 0), (4, 4.5, 6)), 50.0),  # pituitary gland
        (below_base, MUSCLE),
        (np.maximum(below_base, 1.2 - 2 * texture), FAT),  # between the muscles
        (_ellipsoid(mirrored, (0, -22, 17), (7, 7.5, 7.5)), FAT),  # apex of the orbit
        (_rod(mirrored, (3, -24, 16.5), (4.5, -12, 12), 1.6), 45.0),  # optic nerve
    ]
    for surface, tissue in regions:
        _paint(density, _share(surface), tissue)
    return density


def _paint(density: Array, share: Array, tissue: Array | float) -> None:
    density += share * (tissue - density)


def _vessel_coordinates(points: Array, vessel: Vessel) -> tuple[Array, Array, Array]:
    """Per point (3, n): mm from the centre line, mm along it, and the angle round it (0 is the patient's left)."""
    line = vessel.line
    nearest = np.argmin((line**2).sum(1)[:, None] - 2 * (line @ points), axis=0)
    tangents = np.gradient(line, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    lateral = np.float32((0, 0, 1)) - tangents[:, 2:] * tangents  # the siphon bends in planes of nearly constant x
    lateral /= np.linalg.norm(lateral, axis=1, keepdims=True)
    offset = points.T - line[nearest]
    ahead = (offset * tangents[nearest]).sum(1)
    angle = np.arctan2((offset * np.cross(tangents, lateral)[nearest]).sum(1), (offset * lateral[nearest]).sum(1))
    return np.linalg.norm(offset, axis=1), nearest * vessel.step + ahead, angle


def _plaque_share(plaque: Plaque, radius: float, distance: Array, along: Array, angle: Array) -> Array:
    turn = np.abs((angle - plaque.angle + np.pi) % (2 * np.pi) - np.pi)
    squares = (((along - plaque.position) / plaque.half_length) ** 2 + (turn * radius / plaque.half_width) ** 2
               + ((distance - radius) / plaque.half_thickness) ** 2)
    return _share((np.sqrt(squares) - 1) * plaque.half_thickness)


# ---------- taking one scan


def fine_points(examination: Examination, extent_mm: tuple[float, float, float]) -> Array:
    """Patient coordinates in mm, (3, z, y, x) float32, of the fine voxels under the pose of an examination."""
    axes = [(np.arange(round(extent / FINE_MM)) + 0.5) * FINE_MM - extent / 2 for extent in extent_mm]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    turn = np.eye(3) + np.cross(np.eye(3), np.deg2rad(examination.tilt))  # to first order, enough for a few degrees
    return np.tensordot(np.float32(turn), grid, axes=1) + _column(examination.shift)


def render(anatomy: Anatomy, points: Array) -> Rendering:
    """Draw a patient at `points` (3, z, y, x), mm."""
    points = points / _column(anatomy.scale)
    points = points + np.float32(0.9) * np.stack([waves(points) for waves in anatomy.warp])
    mirrored = np.stack([points[0], points[1], np.abs(points[2])])
    texture = anatomy.texture(points)
    sinus = _ellipsoid(mirrored, (-2.5, -9, 0), tuple(anatomy.sinus_size * np.array((8, 9.5, 7.5))))
    bone = _bones(mirrored, sinus) + np.float32(0.4) * texture
    lumen, plaque, plaque_density = _render_vessels(anatomy, points)

    septum = np.abs(points[2] - anatomy.septum) - 0.45
    throat = np.maximum(_ellipsoid(mirrored, (-19, -6, 0), (6, 9, 6.5)), 2.5 - sinus)
    # A millimetre of wall and bone always parts the vessel from the sinus, as where the carotid bulges into it.
    air_share = _share(np.minimum(reduce(np.maximum, (sinus, -septum, 1.0 - lumen)), throat))
    bone_share = _share(bone) * _share(VESSEL_WALL_MM - lumen) * (1 - air_share)
    core = np.clip((-bone - 1.0) / 0.8, 0, 1)  # 0 in the cortical shell, 1 in the spongy inside
    bone_density = anatomy.cortical + core * (anatomy.spongy + 90 * anatomy.sponge(points) - anatomy.cortical)

    density = _soft_tissue(points, mirrored, texture)
    _paint(density, 0.7 * _share(lumen - SHEATH_MM), SHEATH)
    _paint(density, bone_share, bone_density)
    _paint(density, air_share, AIR)
    _paint(density, _share(lumen), anatomy.blood)
    _paint(density, plaque, plaque_density)
    return Rendering(density, plaque, bone_share * (1 - plaque), lumen)


def _render_vessels(anatomy: Anatomy, points: Array) -> tuple[Array, Array, Array]:
    """Surface of the lumens, share of plaque and HU of plaque, each (z y x)."""
    margin = 5.0
    lumen = np.full(points.shape[1:], margin, np.float32)
    plaque, density = np.zeros_like(lumen), np.zeros_like(lumen)
    for vessel in anatomy.vessels:
        low, high = vessel.line.min(0) - margin, vessel.line.max(0) + margin
        near = reduce(np.logical_and, ((axis > a) & (axis < b) for axis, a, b in zip(points, low, high, strict=True)))
        distance, along, angle = _vessel_coordinates(points[:, near], vessel)
        lumen[near] = np.minimum(lumen[near], distance - vessel.radius)
        for one in vessel.plaques:
            share = _plaque_share(one, vessel.radius, distance, along, angle)
            density[near] = np.where(share > plaque[near], one.density, density[near])
            plaque[near] = np.maximum(plaque[near], share)
    return lumen, plaque, density


def draw_examination(scan_seed: Seed) -> Examination:
    """The examination that `scan_seed` stands for."""
    rng = _generator(2, scan_seed)
    scanner = str(rng.choice(list(SCANNERS)))
    return Examination(
        scanner=scanner,
        kernel="bone" if rng.random() < SCANNERS[scanner].bone_share else "soft",
        slice_thickness=float(rng.choice(list(SLICE_SHARES), p=list(SLICE_SHARES.values()))),
        pixel=round(rng.uniform(*SCANNERS[scanner].pixel_range), 3),
        shift=tuple(rng.uniform(-1.5, 1.5, 3)),
        tilt=tuple(rng.uniform(-4, 4, 3)),
    )


def sample(fine: Array, spacing: tuple[float, float, float]) -> Array:
    """Average a fine volume over voxels of `spacing` mm, as many as fit, centred in the region."""
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


def _in_plane_blur(volume: Array, sigma: float) -> Array:
    return ndimage.gaussian_filter(volume, (0, sigma, sigma), mode="nearest", truncate=3)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], kernel: Kernel) -> Array:
    """Noise of deviation 1 in the grain of a kernel: coarse where it blurs, fine where it sharpens."""
    white = rng.normal(size=shape)
    coarse = _in_plane_blur(white, 0.7)
    grain = white - coarse if kernel.overshoot else coarse
    return grain / grain.std()


def _label(image: Array, plaque: Array, bone: Array) -> Array:
    """The reader's rule: inside the circle round a plaque, at least 130 HU, and no single voxels."""
    label = (image >= THRESHOLD_HU) & (plaque >= 0.1) & (plaque >= bone)
    pieces, _ = ndimage.label(label, np.ones((3, 3, 3)))
    return (label & (np.bincount(pieces.ravel())[pieces] > 1)).astype(np.uint8)


def make_scan(patient_seed: Seed, scan_seed: Seed, *, extent_mm: tuple[float, float, float] = (32.0, 40.0, 40.0),
              patient: str = "", scanner: str | None = None, kernel: str | None = None,
              slice_thickness: float | None = None) -> Scan:
    """Scan a patient: equal `patient_seed` is equal anatomy, equal `scan_seed` equal pose, scanner and noise.

    `extent_mm` (z y x) is the region covered, and `patient` the name to carry along.  `scanner`, `kernel` (keys of
    SCANNERS and KERNELS) and `slice_thickness` (mm) replace what `scan_seed` would draw; pose and pixel size stay.

    Raises ValueError for an unknown scanner or kernel, a slice thickness outside 0.5 to 5 mm, or a side under 10 mm.
    """
    wishes = {"scanner": scanner, "kernel": kernel, "slice_thickness": slice_thickness}
    wishes = {name: value for name, value in wishes.items() if value is not None}
    examination = replace(draw_examination(scan_seed), **wishes)
    if examination.scanner not in SCANNERS or examination.kernel not in KERNELS:
        raise ValueError(f"No scanner {scanner!r} or no kernel {kernel!r}: choose from {[*SCANNERS]} and {[*KERNELS]}.")
    if not SLICE_RANGE_MM[0] <= examination.slice_thickness <= SLICE_RANGE_MM[1]:
        raise ValueError(f"Slice thickness {slice_thickness} mm is outside {SLICE_RANGE_MM}.")
    if min(extent_mm) < SMALLEST_EXTENT_MM:
        raise ValueError(f"A region of {extent_mm} mm is too small: every side needs {SMALLEST_EXTENT_MM} mm.")

    body = render(draw_anatomy(patient_seed), fine_points(examination, extent_mm))
    machine, filtering = SCANNERS[examination.scanner], KERNELS[examination.kernel]
    spacing = (examination.slice_thickness, examination.pixel, examination.pixel)
    density, plaque, bone = (_in_plane_blur(part, filtering.blur / FINE_MM)
                             for part in (body.density, body.plaque, body.bone))
    density = density + filtering.overshoot * (density - _in_plane_blur(density, OVERSHOOT_WIDTH_MM / FINE_MM))
    image = sample(density, spacing) + machine.offset
    deviation = machine.noise * filtering.noise * np.sqrt(REFERENCE_SLICE_MM / examination.slice_thickness)
    image += deviation * _noise(_generator(3, scan_seed), image.shape, filtering)
    image = np.clip(np.rint(image), *HU_RANGE).astype(np.int16)
    return Scan(image, _label(image, sample(plaque, spacing), sample(bone, spacing)), spacing, patient,
                examination.scanner, examination.kernel, examination.slice_thickness)


# ---------- writing a data set


@dataclass(frozen=True)
class PlannedScan:
    """A place in the data set: number of the patient, number of their scan, and the set it goes to."""

    patient: int
    number: int
    set_name: str

    @property
    def case(self) -> str:
        """Name of the case in the data set."""
        return f"phantom_p{self.patient:03d}_s{self.number}"


def _plan(labelled: int, unlabelled: int, test: int) -> list[PlannedScan]:
    """One labelled scan for each training patient, one for each test patient, and the unlabelled ones.

    A third of the unlabelled scans are second scans of training patients; the rest are one to three of new patients.
    """
    plan = [PlannedScan(patient, 0, "labelled") for patient in range(labelled)]
    plan += [PlannedScan(labelled + patient, 0, "test") for patient in range(test)]
    seconds = min(labelled, unlabelled // 3)
    plan += [PlannedScan(patient, 1, "unlabelled") for patient in range(seconds)]
    patient = labelled + test
    while unlabelled > seconds:
        scans = min(1 + patient % 3, unlabelled - seconds)
        plan += [PlannedScan(patient, number, "unlabelled") for number in range(scans)]
        unlabelled, patient = unlabelled - scans, patient + 1
    return plan


def _scans(plan: list[PlannedScan], seed: int) -> Iterator[tuple[PlannedScan, Scan]]:
    """Take the planned scans; a patient whose labelled scan shows too little plaque is drawn anew."""
    attempts: dict[int, int] = {}  # by which attempt each patient was accepted
    for place in plan:
        for attempt in range(attempts.get(place.patient, 0), MOST_REDRAWS):
            scan = make_scan((seed, place.patient, attempt), (seed, place.patient, place.number, attempt),
                             patient=f"p{place.patient:03d}")
            if place.set_name == "unlabelled" or scan.label_volume >= SMALLEST_LABEL_MM3:
                break
        else:
            raise RuntimeError(f"No plaque large enough for {place.case} in {MOST_REDRAWS} attempts.")
        attempts[place.patient] = attempt
        yield place, scan


def _write_volume(path: Path, volume: Array, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin([-step * (count - 1) / 2 for step, count in zip(spacing[::-1], volume.shape[::-1], strict=True)])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def write_phantom_dataset(folder: Path, *, dataset_id: int = 900, labelled: int = 16, unlabelled: int = 48,
                          test: int = 8, seed: int = 0) -> Path:
    """Write an nnU-Net v2 raw data set of phantoms and return its folder, `folder`/Dataset900_CarotidPhantom.

    It holds imagesTr with labelsTr, imagesTs with labelsTs, imagesUn (no labels), dataset.json, and scans.csv (case,
    patient, set, scanner, kernel, slice_thickness in mm).  Labelled and test scans are of one patient each and show
    plaque; unlabelled scans are never of test patients.  The folder appears only once it is complete.

    Raises ValueError if that data set already exists, or for a number of scans below 0 (labelled: 1) or an id outside
    1 to 999.
    """
    if labelled < 1 or unlabelled < 0 or test < 0 or not 1 <= dataset_id <= 999:
        raise ValueError(f"Cannot write {labelled} labelled, {unlabelled} unlabelled and {test} test scans "
                         f"as data set {dataset_id}.")
    target = Path(folder) / f"Dataset{dataset_id:03d}_CarotidPhantom"
    if target.exists():
        raise ValueError(f"The data set {target} already exists; remove it or choose another dataset_id.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".phantom_") as partial:
        growing = Path(partial) / target.name
        growing.mkdir()
        rows = []
        for place, scan in _scans(_plan(labelled, unlabelled, test), seed):
            images, labels = IMAGE_FOLDERS[place.set_name], LABEL_FOLDERS.get(place.set_name)
            _write_volume(growing / images / f"{place.case}_0000.nii.gz", scan.image, scan.spacing)
            if labels:
                _write_volume(growing / labels / f"{place.case}.nii.gz", scan.label, scan.spacing)
            rows.append((place.case, scan.patient, place.set_name, scan.scanner, scan.kernel, scan.slice_thickness))
        _write_tables(growing, rows, labelled)
        growing.rename(target)
    return target


def _write_tables(folder: Path, rows: list[tuple], labelled: int) -> None:
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "calcification": 1},
                   "numTraining": labelled, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    with open(folder / "scans.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("case", "patient", "set", "scanner", "kernel", "slice_thickness"))
        writer.writerows(rows)
