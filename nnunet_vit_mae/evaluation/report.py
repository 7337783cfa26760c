"""The report of an evaluation: figures as PNG and SVG, and one HTML page that contains all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from nnunet_vit_mae.calibration.record import MEANS, CalibrationRecord
from nnunet_vit_mae.evaluation import words
from nnunet_vit_mae.evaluation.by_token import TrainedVit
from nnunet_vit_mae.evaluation.cases import EvaluationSet
from nnunet_vit_mae.evaluation.expected import review_tables
from nnunet_vit_mae.evaluation.overlays import ExampleSlice, choose_examples, read_example
from nnunet_vit_mae.evaluation.pictures import Gallery, draw_label, embed_calibration
from nnunet_vit_mae.evaluation.results import Evaluation
from nnunet_vit_mae.evaluation.tables import agreement_table, bin_table, comparison_table, headline_table, risk_table
from nnunet_vit_mae.storage.files import write_file
from nnunet_vit_mae.storage.readme import write_readme

CONTENTS = {
    "index.html": "the report: open it in a browser, it needs no other file",
    "cases.csv": "a row for each model, case and label",
    "summary.json": "means, tests, agreement, risk groups, settings and versions",
    "figures/": "every figure as PNG and SVG",
}
CALIBRATION_FACTS = ("trainer", "plans", "configuration", "folds", "checkpoint")


def write_report(
    evaluation: Evaluation,
    evaluation_set: EvaluationSet,
    calibrations: Mapping[str, CalibrationRecord],
    output: Path,
    vits: Mapping[str, TrainedVit] | None = None,
) -> list[Path]:
    """Write the report.

    Args:
        evaluation: The results.
        evaluation_set: The files that were evaluated, for the figures of examples.
        calibrations: Calibrations by model.
        output: Folder for `index.html`, `figures/` and `README.txt`.
        vits: What is known of the models' networks, by model, for Dice by token and size.

    Returns:
        The files written, the page first.

    Raises:
        UserError: If a file of an example cannot be read; nothing is written then.
    """
    slices = {label: read_slices(evaluation, evaluation_set, label) for label in evaluation.labels}
    gallery = Gallery(evaluation.labels, output / "figures")
    context = {
        "evaluation": evaluation,
        "labels": [
            _label_context(evaluation, label, slices[label], gallery, vits or {}) for label in evaluation.labels
        ],
        "calibrations": [_calibration_context(name, record, gallery) for name, record in calibrations.items()],
        "cases": evaluation.cases["case"].nunique(),
        "by_patient": "patient" in evaluation.cases,
        "settings": {name: _setting_text(value) for name, value in asdict(evaluation.options).items()},
        "significant": words.SIGNIFICANT,
    }
    write_readme(output, CONTENTS)
    page = output / "index.html"
    template = template_environment("nnunet_vit_mae.evaluation").get_template("report.html.j2")
    write_file(template.render(context), page)
    return [page, *gallery.written]


def read_slices(evaluation: Evaluation, evaluation_set: EvaluationSet, label: str) -> list[list[ExampleSlice]]:
    """Read the examples of a label, for each model that has any."""
    return [
        [read_example(example, evaluation_set) for example in examples]
        for examples in choose_examples(evaluation, label)
    ]


def _label_context(
    evaluation: Evaluation,
    label: str,
    slices: Sequence[Sequence[ExampleSlice]],
    gallery: Gallery,
    vits: Mapping[str, TrainedVit],
) -> dict[str, Any]:
    risks = evaluation.risks_of(label)
    return {
        "name": label,
        "highlights": words.highlights(evaluation, label),
        "headline": headline_table(evaluation, label),
        "tests": comparison_table(evaluation, label),
        "agreements": agreement_table(evaluation, label),
        "risks": risk_table(risks),
        "groups": words.groups_in_words(risks[0]) if risks else [],
        "bins": [bin_table(evaluation, label, *pair) for pair in evaluation.bin_pairs(label)],
        "reviews": review_tables(evaluation, label),
        "pictures": draw_label(evaluation, label, slices, gallery, vits),
    }


def _calibration_context(name: str, record: CalibrationRecord, gallery: Gallery) -> dict[str, Any]:
    content = record.content
    rows = [_threshold_row(content, label, threshold) for label, threshold in content["thresholds"].items()]
    versions = content.get("versions")
    return {
        "name": name,
        "rows": rows,
        "facts": {key: _setting_text(content[key]) for key in CALIBRATION_FACTS if key in content},
        "objective": content.get("objective"),
        "n": _number_of_cases(content.get("cases")),
        "versions": versions if isinstance(versions, dict) else {},
        "pictures": embed_calibration(name, record, gallery),
    }


def _threshold_row(content: Mapping[str, Any], label: str, threshold: float) -> dict[str, Any]:
    means = [content.get(when, {}).get(label, {}) for when in MEANS]

    def texts(column: str) -> list[str]:
        return words.format_values(column, *(_number_or_nan(each.get(column)) for each in means))

    return {
        "label": label,
        "threshold": f"{threshold:.3g}",
        "difference": texts("absolute_difference_mm3"),
        "dice": texts("dice"),
    }


def _number_of_cases(cases: object) -> int:
    """Count the cases of a calibration, which have a row for each label."""
    if not isinstance(cases, list):
        return 0
    return len({str(case.get("case")) for case in cases if isinstance(case, dict)})


def _number_or_nan(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _setting_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting_text(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_setting_text, value))
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else str(value)


def template_environment(*packages: str) -> Environment:
    """Return jinja2's environment for pages whose templates lie in these packages."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in packages]),
        autoescape=True,  # names come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
