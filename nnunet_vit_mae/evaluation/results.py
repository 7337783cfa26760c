"""What an evaluation finds, as data: `cases.csv` and `summary.json` hold it, figures and the report draw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measure:
    """A column of `cases.csv` that is averaged over cases."""

    column: str
    title: str
    unit: str = ""
    higher_is_better: bool | None = None  # None: neither


MEASURES = (
    Measure("dice", "Dice", higher_is_better=True),
    Measure("precision", "Precision", higher_is_better=True),
    Measure("recall", "Recall", higher_is_better=True),
    Measure("difference_mm3", "Volume difference (predicted - annotated)", "mm³"),
    Measure("absolute_difference_mm3", "Absolute volume difference", "mm³", higher_is_better=False),
    Measure("relative_difference", "Absolute volume difference / annotated volume", higher_is_better=False),
    Measure("hd95_mm", "95th percentile of the Hausdorff distance", "mm", higher_is_better=False),
    Measure("surface_dice", "Surface Dice", higher_is_better=True),
    Measure("lesion_recall", "Lesions found", higher_is_better=True),
    Measure("lesion_precision", "Predicted lesions that are true", higher_is_better=True),
    Measure("lesion_f1", "F1 of lesions", higher_is_better=True),
)


@dataclass(frozen=True)
class Options:
    """What can be chosen; the report states it."""

    tolerance_mm: float = 1.0  # of the surface Dice
    min_lesion_voxels: int = 1
    cutoffs_mm3: tuple[float, ...] | None = None  # None: quartiles of the annotated volumes
    thickness_bins_mm: tuple[float, ...] | None = None  # None: quartiles
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Mean:
    """A measure of one model and label over the cases in which it is defined; NaN when there are none."""

    model: str
    label: str
    measure: str  # a column
    mean: float
    low: float  # bootstrap interval
    high: float
    n: int
    left_out: int  # cases in which it is not defined


@dataclass(frozen=True)
class PairedTest:
    """Two models on the cases in which both have a value; `difference` is second minus first."""

    first: str
    second: str
    label: str
    measure: str
    first_mean: float
    second_mean: float
    difference: float
    n: int
    changed: int  # cases that differ: the only ones that the test looks at
    p: float | None  # two-sided Wilcoxon signed-rank; None when no case differs
    p_holm: float | None  # corrected for all pairs of models and labels of this measure


@dataclass(frozen=True)
class Agreement:
    """Bland-Altman: bias (predicted - annotated, mm3) and 95% limits of agreement, bias ± 1.96 standard deviations."""

    model: str
    label: str
    n: int
    bias: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Risk:
    """Cases grouped by annotated and by predicted volume (ViTiac, section 3.2)."""

    model: str
    label: str
    cutoffs: tuple[float, ...]  # mm3, ascending: a volume belongs to the first group whose cut-off it does not exceed
    groups: tuple[str, ...]  # one more than cut-offs
    confusion: tuple[tuple[int, ...], ...]  # rows: by annotated volume, columns: by predicted volume
    n: int
    correct: int
    kappa: float | None  # with linear weights; None when all cases are in one group twice


@dataclass(frozen=True)
class Bin:
    """A measure in the cases whose `quantity` (a column) lies in a range (ViTiac, supplementary figure 2)."""

    model: str
    label: str
    measure: str
    quantity: str  # slice_thickness_mm or reference_mm3
    low: float  # of the range: the lowest bin has it, all others begin above it
    high: float
    n: int
    mean: float
    median: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that `mae3d_evaluate` found."""

    models: tuple[str, ...]
    labels: tuple[str, ...]
    cases: pd.DataFrame  # a row for each model, case and label; columns in docs/reference.md
    means: tuple[Mean, ...]
    tests: tuple[PairedTest, ...]
    agreements: tuple[Agreement, ...]
    risks: tuple[Risk, ...]
    bins: tuple[Bin, ...]
    settings: Mapping[str, object]  # resamples, confidence, seed, tolerance_mm, min_lesion_voxels ...
    versions: Mapping[str, str] = field(default_factory=dict)  # packages
    notes: tuple[str, ...] = ()  # sentences that a reader has to know, e.g. how many cases were left out and why
