"""The results of an evaluation, as data: written to `cases.csv` and `summary.json`, drawn in figures and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Measure:
    """A measure of segmentation quality, averaged over cases."""

    column: str  # in cases.csv
    title: str
    unit: str = ""
    higher_is_better: bool | None = None  # None: neither direction is better


MEASURES = (
    Measure("dice", "Dice", higher_is_better=True),
    Measure("precision", "Precision", higher_is_better=True),
    Measure("recall", "Recall", higher_is_better=True),
    Measure("difference_mm3", "Volume difference (predicted - reference)", "mm³"),
    Measure("absolute_difference_mm3", "Absolute volume difference", "mm³", higher_is_better=False),
    Measure("relative_difference", "Absolute relative volume difference", higher_is_better=False),
    Measure("hd95_mm", "95th percentile Hausdorff distance", "mm", higher_is_better=False),
    Measure("surface_dice", "Surface Dice", higher_is_better=True),
    Measure("lesion_recall", "Lesion recall", higher_is_better=True),
    Measure("lesion_precision", "Lesion precision", higher_is_better=True),
    Measure("lesion_f1", "Lesion F1", higher_is_better=True),
)


@dataclass(frozen=True)
class EvaluationOptions:
    """The user's choices, which the report states."""

    tolerance_mm: float = 1.0  # of the surface Dice
    min_lesion_voxels: int = 1  # smaller components are not lesions
    cutoffs_mm3: tuple[float, ...] | None = None  # None: quartiles of the reference volumes
    thickness_bins_mm: tuple[float, ...] | None = None  # None: quartiles of the slice thicknesses
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    @property
    def confidence_text(self) -> str:
        """The confidence level, such as "95%"."""
        return f"{100 * self.confidence:g}%"

    @property
    def bootstrap(self) -> dict[str, Any]:
        """How `mean_interval` draws cases."""
        return {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}


@dataclass(frozen=True)
class Mean:
    """Mean of a measure of one model and label over the cases in which it is defined; NaN when there are none."""

    model: str
    label: str
    measure: str  # column
    mean: float
    low: float  # of the bootstrap interval
    high: float
    n: int  # cases
    left_out: int  # cases in which the measure is not defined


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two models on the cases in which both have a value."""

    first: str
    second: str
    label: str
    measure: str
    first_mean: float
    second_mean: float
    difference: float  # mean of second minus first
    n: int  # cases, or patients if several cases are of one patient: their means are tested
    changed: int  # those that differ: the test ignores the others
    p: float | None  # two-sided Wilcoxon signed-rank test; None when no case differs
    p_holm: float | None  # corrected for all pairs of models and labels of this measure
    direction: int  # of the test's ranks: 1 if the second tends to be larger, -1 if smaller


@dataclass(frozen=True)
class Agreement:
    """Bland-Altman agreement of predicted and reference volumes, in mm3."""

    model: str
    label: str
    n: int  # cases
    bias: float  # mean of predicted minus reference volume
    lower: float  # 95% limits of agreement: bias ± 1.96 standard deviations
    upper: float


@dataclass(frozen=True)
class RiskGroups:
    """Cases grouped by reference volume and by predicted volume (ViTiac, section 3.2)."""

    model: str
    label: str
    cutoffs: tuple[float, ...]  # mm3, ascending: a volume belongs to the first group whose cutoff it does not exceed
    groups: tuple[str, ...]  # names, one more than cutoffs
    confusion: tuple[tuple[int, ...], ...]  # rows: by reference volume, columns: by predicted volume
    n: int  # cases
    correct: int  # cases in the right group
    kappa: float | None  # Cohen's, with linear weights; None when all volumes are in a single group


@dataclass(frozen=True)
class Bin:
    """A measure in the cases whose `quantity` lies in a range (ViTiac, supplementary figure 2)."""

    model: str
    label: str
    measure: str  # column
    quantity: str  # slice_thickness_mm or reference_mm3
    low: float  # of the range: only the lowest bin includes it
    high: float
    n: int  # cases
    mean: float
    median: float


@dataclass(frozen=True)
class Evaluation:
    """All results of `mae3d_evaluate`."""

    models: tuple[str, ...]
    labels: tuple[str, ...]
    cases: pd.DataFrame  # a row for each model, case and label; columns in docs/reference.md
    means: tuple[Mean, ...]
    tests: tuple[PairedTest, ...]
    agreements: tuple[Agreement, ...]
    risks: tuple[RiskGroups, ...]
    bins: tuple[Bin, ...]
    options: EvaluationOptions
    versions: Mapping[str, str] = field(default_factory=dict)  # of packages
    notes: tuple[str, ...] = ()  # sentences for the reader, e.g. how many cases were left out and why

    def rows_of(self, label: str, model: str | None = None) -> pd.DataFrame:
        """Return the cases of a label, of one model or of all."""
        chosen = self.cases["label"] == label
        if model is not None:
            chosen &= self.cases["model"] == model
        return self.cases.loc[chosen]

    def means_of(self, label: str, measure: str) -> list[Mean]:
        """Return the mean of a measure (column) of each model."""
        return [mean for mean in self.means if (mean.label, mean.measure) == (label, measure)]

    def tests_of(self, label: str, measure: str) -> list[PairedTest]:
        """Return the comparisons of a measure (column)."""
        return [test for test in self.tests if (test.label, test.measure) == (label, measure)]

    def agreements_of(self, label: str) -> list[Agreement]:
        """Return the agreement of each model."""
        return [agreement for agreement in self.agreements if agreement.label == label]

    def risks_of(self, label: str) -> list[RiskGroups]:
        """Return the risk groups of each model."""
        return [risk for risk in self.risks if risk.label == label]

    def bins_of(self, label: str, measure: str, quantity: str) -> list[Bin]:
        """Return the bins of a measure by a quantity (columns) of each model."""
        return [bin_ for bin_ in self.bins if (bin_.label, bin_.measure, bin_.quantity) == (label, measure, quantity)]

    def bin_pairs(self, label: str) -> list[tuple[str, str]]:
        """Return the pairs (measure, quantity) of which there are bins."""
        return list(dict.fromkeys((bin_.measure, bin_.quantity) for bin_ in self.bins if bin_.label == label))

    def volumes_of(self, label: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the reference and the predicted volume (mm3) of each case, by model."""
        volumes = {}
        for model in self.models:
            rows = self.rows_of(label, model)
            pair = rows[["reference_mm3", "predicted_mm3"]].dropna().to_numpy(dtype=float)
            volumes[model] = (pair[:, 0], pair[:, 1])
        return volumes
