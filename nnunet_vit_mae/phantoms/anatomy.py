"""The anatomy of a phantom patient: carotid siphons with plaques in a skull base, drawn analytically in HU.

An anatomy is a formula, not a volume, so that every scan of a patient samples the same body in another pose.

Arrays and coordinates are z y x; z points to superior, y to posterior, x to the patient's left (LPS, as in SimpleITK).
Lengths are mm from the centre of the region, densities Hounsfield units (HU). A "surface" below is an approximate
signed distance in mm, negative inside; "mirrored" points have |x| in place of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy import ndimage

Seed = int | tuple[int, ...]

FINE_MM = 0.5  # isotropic grid on which the body is drawn, before a scanner averages it
VESSEL_WALL_MM, SHEATH_MM = 0.4, 1.4
PLAQUE_COUNT_SHARES = (0.1, 0.15, 0.25, 0.25, 0.15, 0.1)  # shares of patients with 0, 1, ... 5 plaques

# HU of tissues that do not vary between patients. The fluid fills the cisterns around the brain; the sheath is fluid
# and a little fat around the vessel, without which blood would hardly contrast with brain.
AIR, FAT, SHEATH, FLUID, BRAIN, MUSCLE = -1000.0, -85.0, -10.0, 8.0, 36.0, 58.0

# Centre line of the left siphon from the petrous canal upwards; the right one is its mirror image.
SIPHON = np.transpose(
    [
        (-19, -13, -7, -2, -0.5, -0.5, 2.5, 6.5, 8, 9.5, 13, 19),
        (9, 10, 9, 6, 0, -6, -10.5, -9, -4, 0, 2.5, 4),
        (11, 11, 11, 10.8, 10.5, 10.2, 10, 9.8, 9.6, 10, 11.5, 13),
    ]
)


@dataclass(frozen=True, eq=False)
class Waves:
    """A smooth random field of mean 0 and deviation 1, a sum of plane waves, so that no pose needs interpolation."""

    vectors: np.ndarray
    phases: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the values (z y x) of the field at points (3 z y x)."""
        angles = np.tensordot(self.vectors, points, axes=1) + column(self.phases)
        return np.sin(angles).sum(0) * np.float32(np.sqrt(2 / len(self.phases)))


@dataclass(frozen=True)
class Plaque:
    """A crescent in the vessel wall: position along (mm) and around the vessel (radians), half sizes in mm, and HU."""

    position: float
    angle: float
    half_length: float
    half_width: float
    half_thickness: float
    density: float


@dataclass(frozen=True, eq=False)
class Vessel:
    """One siphon: centre line (points, 3) in equal steps of `step` mm, lumen radius in mm, and plaques."""

    line: np.ndarray
    step: float
    radius: float
    plaques: tuple[Plaque, ...]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Everything that varies between patients; lengths in mm, densities in HU."""

    scale: np.ndarray
    warp: tuple[Waves, ...]
    texture: Waves
    sponge: Waves
    sinus_size: float
    septum: float
    cortical: float
    spongy: float
    blood: float
    vessels: tuple[Vessel, ...]


@dataclass(frozen=True, eq=False)
class Rendering:
    """The body on the fine grid (z y x): HU, the shares 0..1 of plaque and bone, and the surface of the lumens."""

    density: np.ndarray
    plaque: np.ndarray
    bone: np.ndarray
    lumen: np.ndarray


def draw_anatomy(patient_seed: Seed, plaque_scale: float = 1.0) -> Anatomy:
    """Draw the anatomy of a patient; `plaque_scale` multiplies the half sizes of the plaques."""
    rng = generator(1, patient_seed)
    knots = SIPHON + rng.normal(0, 0.6, SIPHON.shape)
    burden = rng.lognormal(0.0, 0.3)
    sides = rng.permutation([-1, -1, -1, 1, 1, 1])
    sides = sides[: rng.choice(len(PLAQUE_COUNT_SHARES), p=PLAQUE_COUNT_SHARES)].tolist()
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
        vessels=tuple(
            _draw_vessel(rng, side, knots, radius, sides.count(side), burden, plaque_scale) for side in (-1, 1)
        ),
    )


def generator(stream: int, seed: Seed) -> np.random.Generator:
    """Return the random generator of one purpose, so that equal seeds of patient and scan are independent."""
    return np.random.default_rng([stream, *np.atleast_1d(seed).tolist()])


def _draw_waves(rng: np.random.Generator, count: int, wavelengths: tuple[float, float]) -> Waves:
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = directions * (2 * np.pi / rng.uniform(*wavelengths, (count, 1)))
    return Waves(vectors.astype(np.float32), rng.uniform(0, 2 * np.pi, count).astype(np.float32))


def _draw_vessel(
    rng: np.random.Generator,
    side: int,
    knots: np.ndarray,
    radius: float,
    plaques: int,
    burden: float,
    plaque_scale: float,
) -> Vessel:
    knots = (knots + rng.normal(0, 0.3, knots.shape)) * (1, 1, side)
    along = np.linspace(0, len(knots) - 1, 401)
    rough = np.stack([np.interp(along, np.arange(len(knots)), axis) for axis in knots.T], axis=1)
    smooth = ndimage.gaussian_filter1d(rough, sigma=18, axis=0, mode="nearest")
    arc = np.concatenate([[0], np.linalg.norm(np.diff(smooth, axis=0), axis=1).cumsum()])
    line = np.stack([np.interp(np.linspace(0, arc[-1], 72), arc, axis) for axis in smooth.T], axis=1)
    return Vessel(
        line=line.astype(np.float32),
        step=arc[-1] / 71,
        radius=radius * rng.uniform(0.95, 1.05),
        plaques=tuple(_draw_plaque(rng, arc[-1], burden, plaque_scale) for _ in range(plaques)),
    )


def _draw_plaque(rng: np.random.Generator, vessel_length: float, burden: float, scale: float) -> Plaque:
    half_length = float(np.clip(burden * rng.lognormal(0.5, 0.45), 0.5, 5.0))
    return Plaque(
        position=vessel_length * rng.uniform(0.3, 0.8),  # the cavernous and the clinoid segments
        angle=rng.uniform(-np.pi, np.pi),
        half_length=scale * half_length,
        half_width=scale * min(half_length * rng.uniform(0.6, 1.0), 2.8),
        half_thickness=scale * float(np.clip(0.35 * half_length * rng.uniform(0.7, 1.3), 0.35, 0.8)),
        density=rng.uniform(150, 900),
    )


def render(anatomy: Anatomy, points: np.ndarray) -> Rendering:
    """Sample a patient's body at `points` (3 z y x, mm)."""
    points = points / column(anatomy.scale)
    points = points + np.float32(0.9) * np.stack([waves(points) for waves in anatomy.warp])
    mirrored = np.stack([points[0], points[1], np.abs(points[2])])
    texture = anatomy.texture(points)
    sinus = _ellipsoid(mirrored, (-2.5, -9, 0), tuple(anatomy.sinus_size * np.array((8, 9.5, 7.5))))
    bone = _bones(mirrored, sinus) + np.float32(0.4) * texture
    lumen, plaque, plaque_density = _render_vessels(anatomy, points)

    septum = np.abs(points[2] - anatomy.septum) - 0.45
    throat = np.maximum(_ellipsoid(mirrored, (-19, -6, 0), (6, 9, 6.5)), 2.5 - sinus)
    # 1 mm of wall and bone always separates the vessel from the sinus, as where the carotid bulges into it
    air_share = _share(np.minimum(reduce(np.maximum, (sinus, -septum, 1.0 - lumen)), throat))
    bone_share = _share(bone) * _share(VESSEL_WALL_MM - lumen) * (1 - air_share)
    core = np.clip((-bone - 1.0) / 0.8, 0, 1)  # 0 in the cortical shell, 1 in the spongy inside
    bone_density = anatomy.cortical + core * (anatomy.spongy + 90 * anatomy.sponge(points) - anatomy.cortical)

    density = _soft_tissue(mirrored, texture)
    _paint(density, 0.7 * _share(lumen - SHEATH_MM), SHEATH)
    _paint(density, bone_share, bone_density)
    _paint(density, air_share, AIR)
    _paint(density, _share(lumen), anatomy.blood)
    _paint(density, plaque, plaque_density)
    return Rendering(density, plaque, bone_share * (1 - plaque), lumen)


def _paint(density: np.ndarray, share: np.ndarray, tissue: np.ndarray | float) -> None:
    density += share * (tissue - density)


def _bones(mirrored: np.ndarray, sinus: np.ndarray) -> np.ndarray:
    """Return the surface of the skull base."""
    hollow = mirrored - column((1, 0, 0)) * (0.013 * (mirrored[1] + 3) ** 2)
    parts = [
        sinus - 1.1,  # thin wall of the sphenoid sinus
        _ellipsoid(mirrored, (-6, 1, 0), (8, 10, 8.5)),  # body of the sphenoid
        _rod(mirrored * column((1, 1, 0.4)), (4, 9.5, 0), (-20, 17, 0), 2.9),  # dorsum sellae and clivus
        _sheet(mirrored, 2, (7.5, -9), (9.5, -24), 1.1, (-26, 26)),  # planum and lesser wing
        _rod(mirrored, (9, -16, 14), (8.5, -4, 13.5), 1.9),  # anterior clinoid process
        _sheet(mirrored, 0, (-13, 11), (-19, 26), 1.2, (-12, 10)),  # greater wing, between orbit and temporal lobe
        _sheet(hollow, 1, (-9, 8), (-11, 26), 1.3, (-20, 12)),  # floor of the middle fossa
        _sheet(mirrored, 0, (-5, 8.5), (-13, 8), 1.0, (-20, -8)),  # pterygoid plate
        _rod(mirrored, (-9, 11, 12), (-5, 21, 25), 5.5),  # petrous apex
    ]
    fossa = _ellipsoid(mirrored, (5.5, 2.5, 0), (5.5, 5, 7))  # the sella, which holds the pituitary gland
    return np.maximum(reduce(_blend, parts), -fossa)


def _soft_tissue(mirrored: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Return the HU of everything but bone, air and vessels."""
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


def _render_vessels(anatomy: Anatomy, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the surface of the lumens, the share of plaque and its HU, each (z y x)."""
    margin = 5.0
    lumen = np.full(points.shape[1:], margin, np.float32)
    shares, density = np.zeros_like(lumen), np.zeros_like(lumen)
    for vessel in anatomy.vessels:
        low, high = column(vessel.line.min(0) - margin), column(vessel.line.max(0) + margin)
        near = ((points > low) & (points < high)).all(0)
        distance, along, angle = _vessel_coordinates(points[:, near], vessel)
        lumen[near] = np.minimum(lumen[near], distance - vessel.radius)
        for plaque in vessel.plaques:
            share = _plaque_share(plaque, vessel.radius, distance, along, angle)
            density[near] = np.where(share > shares[near], plaque.density, density[near])
            shares[near] = np.maximum(shares[near], share)
    return lumen, shares, density


def _vessel_coordinates(points: np.ndarray, vessel: Vessel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mm from the centre line, mm along it, and the angle around it (0 is left) for points (3, n)."""
    line = vessel.line
    nearest = np.argmin((line**2).sum(1)[:, None] - 2 * (line @ points), axis=0)
    tangents = np.gradient(line, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    # the siphon bends in planes of nearly constant x
    lateral = np.array((0, 0, 1), np.float32) - tangents[:, 2:] * tangents
    lateral /= np.linalg.norm(lateral, axis=1, keepdims=True)
    offset = points.T - line[nearest]
    ahead = (offset * tangents[nearest]).sum(1)
    angle = np.arctan2((offset * np.cross(tangents, lateral)[nearest]).sum(1), (offset * lateral[nearest]).sum(1))
    return np.linalg.norm(offset, axis=1), nearest * vessel.step + ahead, angle


def _plaque_share(
    plaque: Plaque, radius: float, distance: np.ndarray, along: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    turn = np.abs((angle - plaque.angle + np.pi) % (2 * np.pi) - np.pi)
    length = (along - plaque.position) / plaque.half_length
    width = turn * radius / plaque.half_width
    thickness = (distance - radius) / plaque.half_thickness
    return _share((np.sqrt(length**2 + width**2 + thickness**2) - 1) * plaque.half_thickness)


def _share(surface: np.ndarray) -> np.ndarray:
    """Return the share of each fine voxel that lies inside a surface."""
    return np.clip(0.5 - surface / np.float32(FINE_MM), 0, 1)


def _blend(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Unite two surfaces and fill the crease between them."""
    width = 2.0
    crease = np.maximum(width - np.abs(first - second), 0) / width
    return np.minimum(first, second) - crease**2 * (width / 4)


def _ellipsoid(points: np.ndarray, centre: tuple, radii: tuple) -> np.ndarray:
    squares = sum(((axis - middle) / radius) ** 2 for axis, middle, radius in zip(points, centre, radii, strict=True))
    return (np.sqrt(squares) - 1) * min(radii)


def _rod(points: np.ndarray, start: tuple, end: tuple, radius: float) -> np.ndarray:
    """Return the surface of a rod with round ends, in the dimensions of `start`."""
    first, last = np.array([start, end], np.float32)
    span = last - first
    offsets = [axis - middle for axis, middle in zip(points, first, strict=True)]
    along = sum(offset * part for offset, part in zip(offsets, span, strict=True)) / (span @ span)
    along = np.clip(along, 0, 1)
    return np.sqrt(sum((offset - along * part) ** 2 for offset, part in zip(offsets, span, strict=True))) - radius


def _sheet(
    points: np.ndarray, axis: int, start: tuple, end: tuple, radius: float, reach: tuple[float, float]
) -> np.ndarray:
    """Return the surface of a plate: a 2D rod across `axis`, extruded along it from reach[0] to reach[1]."""
    middle, half = sum(reach) / 2, (reach[1] - reach[0]) / 2
    across = _rod(np.delete(points, axis, axis=0), start, end, radius)
    return np.maximum(across, np.abs(points[axis] - middle) - half)


def column(values: np.ndarray | tuple) -> np.ndarray:
    """Reshape one number per component to broadcast with points (3 z y x)."""
    return np.asarray(values, np.float32)[:, None, None, None]
