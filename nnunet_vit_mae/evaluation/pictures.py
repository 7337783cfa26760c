"""The figures of the report page, with captions and alternative texts, written as files and embedded in the page."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from matplotlib.figure import Figure

from nnunet_vit_mae.calibration.record import CalibrationRecord
from nnunet_vit_mae.evaluation import figures, words
from nnunet_vit_mae.evaluation.bland_altman import bland_altman_figure
from nnunet_vit_mae.evaluation.by_token import DiceOfVit, TrainedVit, differ_in_network, token_figure
from nnunet_vit_mae.evaluation.drawing import WIDTH, save_both
from nnunet_vit_mae.evaluation.overlays import ExampleSlice, overlays_figure
from nnunet_vit_mae.evaluation.results import Evaluation

CALIBRATION_FIGURES = {  # captions by file name; with several labels there is a Bland-Altman plot for each
    "calibration_curve.png": "Absolute volume difference and Dice on the calibration cases by threshold.",
    "calibration_reliability.png": "Share of voxels in a class by their probability, on the calibration cases.",
    "calibration_bland_altman*.png": "Agreement of volumes on the calibration cases, before and after calibration.",
}
MIME = {".png": "image/png", ".svg": "image/svg+xml"}
BOXES = (
    "Boxes show quartiles and median, diamonds the mean, and whiskers reach to the furthest case within 1.5 times the "
    "interquartile range. Groups of fewer than five cases have points only."
)


@dataclass(frozen=True)
class Picture:
    """A figure in the page."""

    number: int
    source: str  # the file as a data URI
    caption: str
    alt: str
    inches: float  # width


@dataclass
class Gallery:
    """Writes figures, numbers them in the order of the page and lists their files."""

    labels: Sequence[str]
    folder: Path
    written: list[Path] = field(default_factory=list)
    numbers: count = field(default_factory=lambda: count(1))

    def add(
        self, figure: Figure, name: str, label: str | None, caption: str, alt: str, suffix: str = ".svg"
    ) -> Picture:
        """Write a figure, of a label or of the whole, and embed its file with the suffix."""
        stem = name
        if label is not None and len(self.labels) > 1:
            # with a number, because two labels may differ only in characters that a file name cannot have
            stem = f"{name}_{self.labels.index(label) + 1}_{slug(label)}"
        self.written += save_both(figure, self.folder / stem)
        return self.embed(self.folder / f"{stem}{suffix}", caption, alt, figure.get_figwidth())

    def embed(self, file: Path, caption: str, alt: str, inches: float = WIDTH) -> Picture:
        """Embed a file."""
        data = base64.b64encode(file.read_bytes()).decode()
        return Picture(next(self.numbers), f"data:{MIME[file.suffix]};base64,{data}", caption, alt, inches)


def slug(name: str) -> str:
    """Turn a name into a part of a file name.

    >>> slug("lacune & bleed")
    'lacune_bleed'
    """
    return re.sub(r"[^\w-]+", "_", name).strip("_")[:40] or "label"


def draw_label(
    evaluation: Evaluation,
    label: str,
    slices: Sequence[Sequence[ExampleSlice]],
    gallery: Gallery,
    vits: Mapping[str, TrainedVit],
) -> dict[str, Picture | None]:
    """Draw all figures of a label.

    Args:
        evaluation: The results.
        label: The label.
        slices: Its examples, by model.
        gallery: Where to add the figures.
        vits: What is known of the models' networks, by model.

    Returns:
        The figures by name; None where there is nothing to draw.
    """
    # in the order of the page, which numbers them
    return {
        "measures": _draw_measures(evaluation, label, gallery),
        "scatter": _draw_scatter(evaluation, label, gallery),
        "bland_altman": _draw_bland_altman(evaluation, label, gallery),
        "risk": _draw_risk(evaluation, label, gallery),
        "bins": _draw_bins(evaluation, label, gallery),
        "by_token": _draw_by_token(evaluation, label, gallery, vits),
        "overlays": _draw_overlays(label, slices, gallery),
    }


def embed_calibration(name: str, record: CalibrationRecord, gallery: Gallery) -> list[Picture]:
    """Embed the figures that mae3d_calibrate wrote for the model of that name."""
    return [
        gallery.embed(file, f"{name}: {caption}", f"{name}: {caption}")
        for pattern, caption in CALIBRATION_FIGURES.items()
        for file in sorted(record.folder.glob(pattern))
    ]


def _draw_measures(evaluation: Evaluation, label: str, gallery: Gallery) -> Picture:
    caption = (
        "Dice and absolute volume difference of every case. Points are cases; lines join the same case in "
        f"neighbouring models. {BOXES}"
    )
    alt = f"Box plots of Dice and absolute volume difference of {label} for each model."
    return gallery.add(figures.measures_figure(evaluation, label), "measures", label, caption, alt)


def _draw_scatter(evaluation: Evaluation, label: str, gallery: Gallery) -> Picture:
    caption = (
        "Predicted against reference volume. The line marks equal volumes; points below it are underestimated volumes."
    )
    if evaluation.risks_of(label):
        caption += " Dotted lines are cutoffs of risk groups; in a grey square both volumes are in the same group."
    alt = f"Predicted against reference volumes of {label}."
    return gallery.add(figures.scatter_figure(evaluation, label), "volumes", label, caption, alt)


def _draw_bland_altman(evaluation: Evaluation, label: str, gallery: Gallery) -> Picture:
    caption = (
        "Bland-Altman plots: predicted minus reference volume over the mean of both. Solid line: bias; dashed lines: "
        "95% limits of agreement (bias ± 1.96 standard deviations). All values are in mm³, and all axes are the same."
    )
    agreements = evaluation.agreements_of(label)
    described = "; ".join(f"{entry.model}: {words.agreement_in_words(entry)}" for entry in agreements)
    alt = f"Bland-Altman plots of {label}: {described}."
    return gallery.add(bland_altman_figure(evaluation.volumes_of(label)), "bland_altman", label, caption, alt)


def _draw_risk(evaluation: Evaluation, label: str, gallery: Gallery) -> Picture | None:
    risks = evaluation.risks_of(label)
    if not risks:
        return None
    caption = (
        "Number of cases by the group of their reference volume (rows) and of their predicted volume (columns). The "
        "groups agree on the diagonal. Darker cells hold a larger share of their row."
    )
    described = "; ".join(f"{risk.model}: {words.correct_in_words(risk)}" for risk in risks)
    alt = f"Confusion matrices of risk groups of {label}: {described}."
    return gallery.add(figures.risk_figure(evaluation, label), "risk_groups", label, caption, alt)


def _draw_bins(evaluation: Evaluation, label: str, gallery: Gallery) -> Picture | None:
    pairs = evaluation.bin_pairs(label)
    if not pairs:
        return None
    titles = [words.measure_by_quantity(*pair) for pair in pairs]
    caption = f"{'; '.join(titles)}. n: cases in which the measure is defined. {BOXES}"
    alt = f"Box plots of {label}: {' and '.join(titles)}."
    return gallery.add(figures.bins_figure(evaluation, label), "bins", label, caption, alt)


def _draw_by_token(
    evaluation: Evaluation, label: str, gallery: Gallery, vits: Mapping[str, TrainedVit]
) -> Picture | None:
    means = {mean.model: mean for mean in evaluation.means_of(label, "dice") if mean.n}
    known = [(vit, means[name]) for name, vit in vits.items() if name in means]
    results = [DiceOfVit(vit, mean.mean, mean.low, mean.high) for vit, mean in known]
    return draw_by_token(results, label, gallery)


def draw_by_token(results: Sequence[DiceOfVit], label: str, gallery: Gallery) -> Picture | None:
    """Draw Dice by token and model size, if the models differ in them."""
    if not differ_in_network([result.vit for result in results]):
        return None
    caption = "Mean Dice by token and model size, a panel for each decoder. Bars: 95% bootstrap intervals over cases."
    return gallery.add(token_figure(results), "by_token", label, caption, f"Dice of {label} by token and model size.")


def _draw_overlays(label: str, slices: Sequence[Sequence[ExampleSlice]], gallery: Gallery) -> Picture | None:
    if not slices:
        return None
    entries = [entry for row in slices for entry in row]
    caption = (
        "The cases with the lowest, the median and the highest Dice of each model, in the slice with most reference "
        f"and predicted voxels. Wide green line: reference; thin red line: prediction. {_note_on_images(entries)}"
    )
    examples = [entry.example for entry in entries]
    described = "; ".join(f"{e.model}, {e.rank} ({e.case}, Dice {e.dice:.2f})" for e in examples)
    alt = f"Outlines of {label} over image slices: {described}."
    return gallery.add(overlays_figure(slices), "examples", label, caption, alt, suffix=".png")


def _note_on_images(entries: Sequence[ExampleSlice]) -> str:
    cases = {entry.example.case for entry in entries}
    without = sorted({entry.example.case for entry in entries if entry.image is None})
    if not without:
        return "Axial slices are in radiological view: the patient's right is on the left."
    listed = "all cases" if len(without) == len(cases) else ", ".join(without)
    return f"Without an image: {listed}; there, the reference is light grey."
