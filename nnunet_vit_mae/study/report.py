"""The report of a study: one HTML page with its figures, and `comparisons.csv` beside `results.csv`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_vit_mae.errors import abbreviated
from nnunet_vit_mae.evaluation.by_token import DiceOfVit, read_trained_vit, trains_vit
from nnunet_vit_mae.evaluation.pictures import Gallery, Picture, draw_by_token
from nnunet_vit_mae.evaluation.report import template_environment
from nnunet_vit_mae.evaluation.summary import REPORTED_PACKAGES
from nnunet_vit_mae.evaluation.words import format_values, interval_text, p_text, title_with_unit
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.settings import Settings
from nnunet_vit_mae.storage.csv_tables import write_frame
from nnunet_vit_mae.storage.files import write_file
from nnunet_vit_mae.storage.layout import PLANS
from nnunet_vit_mae.study.comparisons import (
    COMPARED,
    OPTIONS,
    PairedDifference,
    Question,
    SeriesPoint,
    Variant,
    distinct,
    limits_of_study,
    point_of,
    sentence_of,
    verdict_of,
)
from nnunet_vit_mae.study.costs import Cost
from nnunet_vit_mae.study.design import StudyDesign, StudyModel
from nnunet_vit_mae.study.figures import differences_figure, learning_curves, pretraining_figure, training_figure
from nnunet_vit_mae.study.training import pretraining_curves, training_curves

PAGE = "index.html"
MODEL_NAMES_SHOWN = 12  # of those that are missing
PACKAGES = (*REPORTED_PACKAGES, "nnunetv2", "torch", "snakemake")
CURVES = (
    "Mean over the test cases by number of labelled training patients. Lines and bands: mean over seeds of each case, "
    "and its 95% bootstrap interval over cases, or over patients if several cases are of one. Small dots: seeds."
)
PRETRAINING = (
    "Loss of each pre-training by epoch. Where it starts with the plain loss, a dotted line marks where norm-pix takes "
    "over; the two do not compare, nor do those of different tokens."
)
TRAINING = (
    "Training loss and Dice on validation crops (smoothed) by epoch, as nnU-Net logs them, a line for each seed. "
    "Losses of different networks do not compare, for a U-Net sums them over resolutions."
)
DIFFERENCES = (
    "Paired differences (diamonds) with 95% bootstrap intervals over cases or patients (bars); small dots: seeds. "
    "Blue: significant after Holm's correction. Right of zero is better for Dice, left of it for the volume difference."
)


def write_study_report(
    study: StudyDesign,
    table: pd.DataFrame,
    answers: Mapping[Question, Sequence[PairedDifference]],
    missing: Sequence[StudyModel],
    costs: Sequence[Cost],
) -> Path:
    """Write the page, its figures and the table of comparisons.

    Args:
        study: The study.
        table: The results, as in `results.csv`.
        answers: What `answers_of` finds in them.
        missing: Models without results.
        costs: What each arm costs.

    Returns:
        The page.
    """
    output = Path(study.output)
    labels = distinct(table, "label")
    _write_comparisons(answers, output / "comparisons.csv")
    gallery = Gallery(labels, output / "figures")
    context = {
        "study": study,
        "cases": len(distinct(table, "case")),
        "labels": [_label_context(study, table, label, answers, gallery) for label in labels],
        "training": _training_pictures(study, gallery),
        "limits": [*_limits(study, table, answers), *_missing(missing)],
        "measures": list(map(title_with_unit, COMPARED)),
        "costs": costs,
        "evaluations": [few for few in study.few if (output / "evaluations" / f"{few}_labels" / PAGE).is_file()],
        "by_patient": "patient" in table,
        "resamples": OPTIONS.resamples,
        "versions": package_versions(PACKAGES),
    }
    page = output / PAGE
    environment = template_environment("nnunet_vit_mae.study", "nnunet_vit_mae.evaluation")
    write_file(environment.get_template("study.html.j2").render(context), page)
    return page


def _training_pictures(study: StudyDesign, gallery: Gallery) -> list[Picture]:
    """Draw how the models learned, as far as they are there."""
    pictures = []
    if curves := pretraining_curves(study):
        figure, alt = pretraining_figure(curves), "Loss of pre-training by epoch."
        pictures.append(gallery.add(figure, "pretraining", None, PRETRAINING, alt))
    if curves := training_curves(study):
        figure, alt = training_figure(curves), "Training loss and validation Dice by epoch."
        pictures.append(gallery.add(figure, "training", None, TRAINING, alt))
    return pictures


def _limits(
    study: StudyDesign, table: pd.DataFrame, answers: Mapping[Question, Sequence[PairedDifference]]
) -> Iterator[str]:
    finetuning = Settings.from_dict(study.recipe).finetuning
    return limits_of_study(
        [paired for found in answers.values() for paired in found],
        study.arms,
        iterations=finetuning.epochs * finetuning.iterations,
        seeds=len(distinct(table, "seed")),
        cases=len(distinct(table, "case")),
        patients=len(distinct(table, "patient" if "patient" in table else "case")),
        by_patient=bool(study.csv) or "patient" in table,
    )


def _missing(missing: Sequence[StudyModel]) -> list[str]:
    if not missing:
        return []
    names = abbreviated((model.name for model in missing), MODEL_NAMES_SHOWN)
    return [f"{len(missing)} models have no results, because a step failed or has not run yet: {names}."]


def _label_context(
    study: StudyDesign,
    table: pd.DataFrame,
    label: str,
    answers: Mapping[Question, Sequence[PairedDifference]],
    gallery: Gallery,
) -> dict[str, Any]:
    curves = gallery.add(
        learning_curves(table, list(study.arms), label),
        "learning_curves",
        label,
        CURVES,
        f"Learning curves of {label}.",
    )
    by_token = draw_by_token(_dice_of_vits(study, table, label), label, gallery)
    numbers, questions = count(1), []
    for question, found in answers.items():
        chosen = [paired for paired in found if paired.label == label]
        if chosen:
            name, alt = f"differences_{next(numbers)}", f"{question.title}, {label}."
            picture = gallery.add(differences_figure(chosen), name, label, f"{question.title}. {DIFFERENCES}", alt)
            rows = [_row(paired) for paired in chosen]
            sentences = [sentence_of(paired) for paired in chosen if paired.measure == "dice" or paired.significant]
            questions.append({"title": question.title, "rows": rows, "picture": picture, "sentences": sentences})
    means = _means(study, table, label)
    return {"name": label, "curves": curves, "by_token": by_token, "questions": questions, "means": means}


def _dice_of_vits(study: StudyDesign, table: pd.DataFrame, label: str) -> list[DiceOfVit]:
    """Return Dice of each ViT as trained, with the largest number of labels."""
    results = []
    for arm, entry in study.trained.items():
        folder = study.model_folder(arm, 0)
        point = point_of(table, Variant(arm, calibrated=False), max(study.few), label, "dice")
        if point and trains_vit(entry.trainer) and (folder / PLANS).is_file():
            results.append(DiceOfVit(read_trained_vit(folder), point.mean, point.low, point.high))
    return results


def _means(study: StudyDesign, table: pd.DataFrame, label: str) -> list[dict[str, Any]]:
    """Return a row for each arm and number of labels, with the mean and interval of each measure."""
    variants = [Variant(name, calibrated) for name in study.arms for calibrated in (False, True)]
    rows = []
    for few in study.few:
        for variant in variants:
            points = [point_of(table, variant, few, label, measure) for measure in COMPARED]
            if any(points):
                cells = [_cell(measure, point) for measure, point in zip(COMPARED, points, strict=True)]
                rows.append({"few": few, "variant": str(variant), "cells": cells})
    return rows


def _cell(measure: str, point: SeriesPoint | None) -> dict[str, str]:
    if point is None:
        return {"mean": "", "interval": "", "seeds": ""}
    mean, low, high, *seeds = format_values(measure, point.mean, point.low, point.high, *point.seeds)
    return {"mean": mean, "interval": interval_text(low, high), "seeds": ", ".join(seeds)}


def _row(paired: PairedDifference) -> dict[str, Any]:
    first, second = format_values(paired.measure, paired.first_mean, paired.second_mean)
    difference, low, high = format_values(paired.measure, paired.difference, paired.low, paired.high, sign=True)
    return {
        "few": paired.few,
        "first": str(paired.first),
        "second": str(paired.second),
        "measure": title_with_unit(paired.measure),
        "means": (first, second),
        "difference": difference,
        "interval": interval_text(low, high),
        "cases": paired.cases,
        "p": p_text(paired.p),
        "p_holm": p_text(paired.p_holm),
        "verdict": verdict_of(paired),
        "significant": paired.significant,
    }


def _write_comparisons(answers: Mapping[Question, Sequence[PairedDifference]], file: Path) -> None:
    rows = [
        {
            "question": question.title,
            **asdict(paired),
            "first": str(paired.first),
            "second": str(paired.second),
            "seed_differences": " ".join(f"{value:.6g}" for value in paired.seed_differences),
            "sentence": sentence_of(paired),
        }
        for question, found in answers.items()
        for paired in found
    ]
    write_frame(pd.DataFrame(rows), file)
