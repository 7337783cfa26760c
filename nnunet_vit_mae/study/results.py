"""The measures of all models of a study on its test cases, as one table: `results.csv`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nnunet_vit_mae.datasets.acquisition import find_scans_table, read_scans_table, slice_thickness
from nnunet_vit_mae.datasets.split.patients import patient_of, recorded_patients
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation.cases import find_evaluation_set, measure_cases
from nnunet_vit_mae.evaluation.results import EvaluationOptions
from nnunet_vit_mae.storage.csv_tables import read_frame, write_frame
from nnunet_vit_mae.study.design import StudyDesign, StudyModel
from nnunet_vit_mae.study.references import note_references
from nnunet_vit_mae.study.steps import prediction_marker

RESULTS = "results.csv"
KEY = ["arm", "few", "seed", "calibrated", "case", "label"]


def measure_study(study: StudyDesign) -> tuple[pd.DataFrame, list[StudyModel]]:
    """Measure the predictions of all models that are done.

    Args:
        study: The study.

    Returns:
        A row for each arm, number of labels, seed, calibration, case and label, with a column of patients if several
        cases are of one; and the models that are not done.

    Raises:
        UserError: If no model is done, or a prediction cannot be read.
    """
    done = [model for model in study.models() if (Path(study.output) / prediction_marker(study, model)).is_file()]
    if not done:
        raise UserError(f"No model of {study.output} has been tested yet, so there is nothing to report.")
    references = note_references(study)
    table = pd.concat([_measured(study, model, references) for model in done], ignore_index=True)
    known = recorded_patients(Path(study.preprocessed_folder))
    patients = {case: patient_of(case, known) for case in set(table["case"])}
    if len({*patients.values()}) < len(patients):
        table["patient"] = [patients[case] for case in table["case"]]
    write_frame(table, Path(study.output) / RESULTS)
    return table, [model for model in study.models() if model not in done]


def _measured(study: StudyDesign, model: StudyModel, references: Path) -> pd.DataFrame:
    """Measure a model, or read what was measured since it predicted and since the references were last noted."""
    file = Path(study.output) / "measures" / f"{model.name}.csv"
    sources = [Path(study.output) / prediction_marker(study, model), references]
    if not file.is_file() or file.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        evaluation_set = find_evaluation_set(study.test_labels, {model.name: study.predictions(model)})
        names = [case.name for case in evaluation_set.cases]
        if table := find_scans_table([Path(study.raw)]):
            thickness = slice_thickness(read_scans_table(table, names))
            evaluation_set = evaluation_set.with_slice_thickness(thickness, table)
        measures, _ = measure_cases(evaluation_set, EvaluationOptions())
        write_frame(measures.drop(columns="model"), file)
    measures = read_frame(file, dtype={"case": str, "label": str})
    key = {"arm": model.arm, "few": model.few, "seed": model.seed, "calibrated": model.calibrated}
    others = [column for column in measures if column not in KEY]
    return measures.assign(**key).reindex(columns=[*KEY, *others])
