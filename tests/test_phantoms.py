"""The phantom scans and the nnU-Net raw dataset made of them."""

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import read_voxels
from scipy import ndimage

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.dicom import find_series, read_series
from nnunet_vit_mae.phantoms import dataset as phantoms
from nnunet_vit_mae.phantoms.anatomy import draw_anatomy, render
from nnunet_vit_mae.phantoms.dataset import draw_scans, plan_scans, write_phantom_dataset
from nnunet_vit_mae.phantoms.dicom import EXTENT_MM, PLAQUE_SCALE, write_phantom_studies
from nnunet_vit_mae.phantoms.scanner import (
    KERNELS,
    SCANNERS,
    PhantomScan,
    draw_examination,
    fine_points,
    make_scan,
    sample,
)

TOUCHING = np.ones((3, 3, 3))
EXTENT = (26.0, 30.0, 32.0)  # mm, less than the default and so faster to draw
LABELLED, UNLABELLED, TEST = 2, 4, 1
IMAGE_FOLDERS = {"labelled": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}


@pytest.fixture(scope="module")
def scans() -> list[PhantomScan]:
    return [make_scan(patient, 100 + patient, extent_mm=EXTENT) for patient in range(10)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    return write_phantom_dataset(folder, labelled=LABELLED, unlabelled=UNLABELLED, test=TEST, extent_mm=EXTENT)


@pytest.fixture(scope="module")
def table(dataset) -> list[dict[str, str]]:
    with (dataset / "scans.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def patients(table: list[dict[str, str]], set_name: str) -> list[str]:
    return [row["patient"] for row in table if row["set"] == set_name]


def read(path: Path) -> sitk.Image:
    return sitk.ReadImage(str(path))


# ---------- single scans


def test_equal_seeds_make_equal_scans_and_other_seeds_do_not(scans):
    first, again, other = scans[1], make_scan(1, 101, extent_mm=EXTENT), make_scan(1, 3, extent_mm=EXTENT)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_scan_arrays_and_spacing(scans):
    for scan in scans:
        assert scan.image.dtype == np.int16
        assert scan.label.dtype == np.uint8
        assert scan.image.shape == scan.label.shape
        assert scan.image.min() >= -1024
        covered = np.array(scan.image.shape) * scan.spacing
        assert np.all(covered <= EXTENT)
        assert np.all(covered > np.array(EXTENT) - scan.spacing)
        assert scan.spacing[0] == scan.slice_thickness
        assert 0.5 <= scan.slice_thickness <= 5
        assert scan.spacing[1] == scan.spacing[2]
        assert 0.8 <= scan.spacing[1] <= 1.1


def test_scan_holds_air_bone_and_soft_tissue(scans):
    for scan in scans:
        assert np.mean(scan.image < -700) > 0.01
        assert np.mean(scan.image > 400) > 0.02
        assert np.mean(np.abs(scan.image) < 150) > 0.4


def test_label_follows_the_threshold_and_has_no_single_voxels(scans):
    assert sum(scan.label.any() for scan in scans) >= 5
    for scan in scans:
        assert scan.image[scan.label > 0].min(initial=10_000) >= 130
        pieces, count = ndimage.label(scan.label, TOUCHING)
        assert np.all(np.bincount(pieces.ravel(), minlength=count + 1)[1:] > 1)


def test_label_volumes_grow_with_the_plaque_scale(scans):
    labelled = [patient for patient, scan in enumerate(scans) if scan.label.any()][:2]
    volumes = [scans[patient].label_volume for patient in labelled]
    for scale in (1.5, 2.0):
        larger = [
            make_scan(patient, 100 + patient, plaque_scale=scale, extent_mm=EXTENT).label_volume for patient in labelled
        ]
        assert np.all(np.array(larger) > 1.3 * np.array(volumes))
        volumes = larger


def test_label_lies_at_the_vessel_wall(scans):
    labelled = [patient for patient, scan in enumerate(scans) if scan.label.any()][:3]
    for patient in labelled:
        scan = make_scan(patient, patient, kernel="bone", slice_thickness=1.0, extent_mm=EXTENT)
        points = fine_points(draw_examination(patient), EXTENT)
        lumen = render(draw_anatomy(patient), points).lumen
        distance = np.abs(sample(lumen, scan.spacing))
        assert distance[scan.label > 0].max() < 2.2  # the half thickness of a plaque and a voxel diagonal


def test_scans_of_one_patient_resemble_each_other_more_than_two_patients():
    def coarse(patient: int, scan: int) -> np.ndarray:
        image = np.clip(make_scan(patient, scan, kernel="soft", extent_mm=EXTENT).image, -300, 600).astype(float)
        return ndimage.zoom(image, np.array((12, 20, 20)) / image.shape, order=1).ravel()

    images = [[coarse(patient, scan) for scan in (10 * patient, 10 * patient + 1)] for patient in range(3)]
    within = [np.corrcoef(first, second)[0, 1] for first, second in images]
    between = [np.corrcoef(images[a][0], images[b][1])[0, 1] for a in range(3) for b in range(3) if a != b]
    assert np.mean(within) > np.mean(between) + 0.05
    assert np.mean(between) > 0.3  # patients share a layout, which is what pre-training learns


def test_left_and_right_mirror_each_other_nearly():
    halves = [
        make_scan(patient, patient, kernel="soft", slice_thickness=1.25, extent_mm=EXTENT).image.astype(float)
        for patient in range(3)
    ]
    mirrored = [np.corrcoef(image.ravel(), image[:, :, ::-1].ravel())[0, 1] for image in halves]
    assert np.mean(mirrored) > 0.5


def test_slice_thickness_is_mostly_thin():
    drawn = [draw_examination(seed).slice_thickness for seed in range(400)]
    assert min(drawn) == 0.5
    assert max(drawn) == 5.0
    assert np.median(drawn) == 1.25


def test_sampling_averages_and_keeps_the_mean():
    ramp = np.broadcast_to(np.arange(20.0)[:, None, None], (20, 6, 6))
    sampled = sample(ramp, (2.5, 1.0, 1.5))
    assert sampled.shape == (4, 3, 2)
    assert np.allclose(sampled[:, 0, 0], [2, 7, 12, 17])


@pytest.mark.parametrize(
    "argument",
    [
        {"scanner": "Z1"},
        {"kernel": "lung"},
        {"slice_thickness": 7.0},
        {"slice_thickness": 0.0},
        {"extent_mm": (1.0, 40.0, 40.0)},
        {"plaque_scale": 0.0},
        {"plaque_scale": 4.0},
    ],
)
def test_impossible_arguments_are_refused(argument):
    with pytest.raises(UserError, match=next(iter(argument)).split("_")[0]):
        make_scan(0, 0, **argument)


# ---------- dataset


def test_dataset_layout(dataset, table):
    assert dataset.name == "Dataset900_CarotidPhantom"
    assert [path.name for path in dataset.parent.iterdir()] == [dataset.name]
    description = json.loads((dataset / "dataset.json").read_text())
    assert description == {
        "channel_names": {"0": "CT_zscore"},
        "labels": {"background": 0, "calcification": 1},
        "numTraining": LABELLED,
        "file_ending": ".nii.gz",
    }
    for set_name, images, labels, count in (
        ("labelled", "imagesTr", "labelsTr", LABELLED),
        ("test", "imagesTs", "labelsTs", TEST),
        ("unlabelled", "imagesUn", None, UNLABELLED),
    ):
        cases = {row["case"] for row in table if row["set"] == set_name}
        assert len(cases) == count
        assert {path.name for path in (dataset / images).iterdir()} == {f"{case}_0000.nii.gz" for case in cases}
        if labels:
            assert {path.name for path in (dataset / labels).iterdir()} == {f"{case}.nii.gz" for case in cases}
    assert not (dataset / "labelsUn").exists()


def test_images_and_labels_share_their_geometry_and_labels_are_not_empty(dataset):
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")):
        for path in sorted((dataset / labels).iterdir()):
            label, image = read(path), read(dataset / images / path.name.replace(".nii.gz", "_0000.nii.gz"))
            assert image.GetSize() == label.GetSize()
            assert image.GetSpacing() == label.GetSpacing()
            assert image.GetOrigin() == label.GetOrigin()
            assert image.GetDirection() == label.GetDirection() == tuple(np.eye(3).ravel())
            voxels = sitk.GetArrayFromImage(label)
            assert set(np.unique(voxels)) == {0, 1}
            assert voxels.sum() * np.prod(label.GetSpacing()) >= 4.99
            assert sitk.GetArrayFromImage(image)[voxels > 0].min() >= 130


def test_table_agrees_with_the_images(dataset, table):
    for row in table:
        image = read(dataset / IMAGE_FOLDERS[row["set"]] / f"{row['case']}_0000.nii.gz")
        assert image.GetSpacing()[2] == pytest.approx(float(row["slice_thickness_mm"]))
        assert row["scanner"] in SCANNERS
        assert row["kernel"] in KERNELS
        assert row["case"].startswith(f"phantom_{row['patient']}_s")


def test_patients_do_not_leak_between_sets(table):
    train, test, unlabelled = (patients(table, name) for name in ("labelled", "test", "unlabelled"))
    assert len(set(train)) == LABELLED
    assert len(set(test)) == TEST
    assert not set(test) & (set(train) | set(unlabelled))
    assert set(train) & set(unlabelled)
    assert len(set(unlabelled)) < len(unlabelled)  # several scans of one patient


def test_dataset_is_deterministic_and_refuses_to_overwrite(tmp_path):
    first, second = (
        write_phantom_dataset(tmp_path / name, labelled=1, unlabelled=1, test=0, extent_mm=EXTENT) for name in "ab"
    )
    for path in sorted(first.rglob("*.nii.gz")):
        again = read(second / path.relative_to(first))
        assert np.array_equal(sitk.GetArrayFromImage(read(path)), sitk.GetArrayFromImage(again))
    assert (first / "scans.csv").read_text() == (second / "scans.csv").read_text()
    with pytest.raises(UserError, match="already exists"):
        write_phantom_dataset(tmp_path / "a")


def test_dataset_takes_the_plaque_scale(tmp_path):
    sets = [
        write_phantom_dataset(
            tmp_path / str(scale), labelled=1, unlabelled=0, test=0, plaque_scale=scale, extent_mm=EXTENT
        )
        for scale in (1.0, 2.0)
    ]
    usual, larger = (sitk.GetArrayFromImage(read(next(folder.glob("labelsTr/*")))) for folder in sets)
    assert larger.sum() > usual.sum()


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(phantoms, "SMALLEST_LABEL_MM3", np.inf)
    monkeypatch.setattr(phantoms, "MOST_REDRAWS", 1)
    with pytest.raises(UserError, match="plaque_scale"):
        write_phantom_dataset(tmp_path, labelled=1, unlabelled=0, test=0, extent_mm=EXTENT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("counts", [{"labelled": 0}, {"unlabelled": -1}, {"test": -1}, {"dataset_id": 1000}])
def test_impossible_counts_are_refused(tmp_path, counts):
    with pytest.raises(UserError, match=next(iter(counts))):
        write_phantom_dataset(tmp_path, **counts)
    assert not list(tmp_path.iterdir())


def test_a_smaller_extent_gives_smaller_volumes(tmp_path):
    folder = write_phantom_dataset(tmp_path, labelled=1, unlabelled=0, test=0, extent_mm=(20.0, 30.0, 24.0))
    image = read(next((folder / "imagesTr").iterdir()))
    sides = [n * step for n, step in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    assert sides == pytest.approx([24, 30, 20], abs=max(image.GetSpacing()))


def test_studies_in_dicom_hold_the_scans(tmp_path):
    write_phantom_studies(tmp_path / "archive", labelled=1, seed=3)
    found, damaged = find_series(tmp_path)
    series = {one.description: read_series(one) for one in found}
    ((_, scan),) = draw_scans(plan_scans(1, 0, 0), 3, EXTENT_MM, PLAQUE_SCALE)
    assert damaged == 0
    assert series.keys() == {f"head {scan.kernel}", "calcification label"}
    for description, voxels in ((f"head {scan.kernel}", scan.image), ("calcification label", scan.label)):
        assert np.array_equal(sitk.GetArrayFromImage(series[description]), voxels)
        assert series[description].GetSpacing() == pytest.approx(scan.spacing[::-1])
    with pytest.raises(UserError, match="already exists"):
        write_phantom_studies(tmp_path / "archive", labelled=1)


# ---------- studies of stroke, for the claims of AMAE

STROKE_PHANTOMS = Path(__file__).parent.parent / "examples" / "studies" / "stroke_phantoms.py"


def test_studies_of_stroke_lack_t2_except_in_the_test_set(tmp_path, monkeypatch):
    def write(raw):
        call = f"{STROKE_PHANTOMS} {raw} --labelled 6 --test 2 --unlabelled 1 --seed 1"
        monkeypatch.setattr("sys.argv", call.split())
        runpy.run_path(str(STROKE_PHANTOMS), run_name="__main__")
        return raw / "Dataset910_StrokePhantom"

    folder, again = write(tmp_path), write(tmp_path / "again")
    t2 = {name: len(list((folder / f"images{name}").glob("*_0002.nii.gz"))) for name in ("Tr", "Un", "Ts")}
    assert t2["Tr"] in range(1, 6)
    assert t2["Ts"] == 2
    for file in sorted((folder / "labelsTr").iterdir()):
        infarct = read_voxels(file).astype(bool)
        adc, trace = (read_voxels(folder / "imagesTr" / file.name.replace(".nii", f"_000{n}.nii")) for n in (0, 1))
        head = ndimage.binary_erosion(adc > 0.4, iterations=2)
        assert trace[infarct].mean() > 1.3 * trace[head & ~infarct].mean()
        assert adc[infarct].mean() < 0.8 * adc[head & ~infarct].mean()
        assert np.array_equal(infarct, read_voxels(again / "labelsTr" / file.name))
    with pytest.raises(UserError, match="already exists: remove it first"):
        write(tmp_path)
