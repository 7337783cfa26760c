"""Check a raw data set before training: files, labels, copies, outliers and leaks, in a table, a JSON and a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_vit_mae.cli.arguments import add_patient_arguments, parser_for, positive_int, table_file
from nnunet_vit_mae.errors import abbreviated, exit_on_user_error

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.check.inspection import CaseSummary, Finding

SHOWN = 10  # cases of each kind that are printed; check.json has all
LEVELS = ("error", "warning")
EMPTY = "empty_labels.txt"


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_check`; the exit code is 2 when there are errors."""
    parser = parser_for("mae3d_check", __doc__)
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="data set number or name, e.g. 501")
    add("-o", dest="output", type=Path, metavar="FOLDER", help="for the results, else DATASET_check here")
    add_patient_arguments(parser)
    add("--list_empty", action="store_true", help=f"name empty labels in {EMPTY}, which mae3d_split can leave out")
    add("-np", dest="processes", type=positive_int, default=4, metavar="N", help="processes")
    args = parser.parse_args(argv)

    from tqdm import tqdm

    from nnunet_vit_mae.datasets.check.across_cases import empty_labels, findings_across_cases, thickness_histogram
    from nnunet_vit_mae.datasets.check.inspection import find_tasks, inspect_all
    from nnunet_vit_mae.files import make_folder, replacing, write_json
    from nnunet_vit_mae.nnunet.folders import find_dataset

    dataset = find_dataset(args.dataset)
    output = args.output or Path(f"{dataset.name}_check")
    make_folder(output)
    tasks, channels, labels, findings = find_tasks(dataset.raw)
    csv_file = table_file(args.csv, dataset.raw)
    patients = _patients(csv_file, args.case, args.patient, [task.name for task in tasks], dataset.preprocessed)
    found = tqdm(inspect_all(tasks, labels, args.processes), total=len(tasks), unit="case", desc="looking")
    looks = sorted(found, key=lambda look: (look.folder, look.name))
    findings += [finding for look in looks for finding in look.findings]
    findings += findings_across_cases(looks, channels, labels, patients)
    errors, warnings = ([finding for finding in findings if finding.level == level] for level in LEVELS)
    thickness = thickness_histogram(looks)
    content = {
        "dataset": dataset.name,
        "errors": [_json(finding) for finding in errors],
        "warnings": [_json(finding) for finding in warnings],
        "slice_thickness": thickness,
        "cases": {str(look): _case(look, channels.names) for look in looks},
    }
    write_json(content, output / "check.json")
    _picture(looks, channels, labels, output / "check.png")
    print(findings_table(findings))
    print("Slice thickness: " + ", ".join(f"{name} in {count}" for name, count in thickness.items()) + ".")
    if args.list_empty:
        empty = empty_labels(looks, labels)
        with replacing(output / EMPTY) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in empty), encoding="utf-8")
        print(empty_note(len(empty), output / EMPTY))
    print(
        f"Cases: {len(looks)}, errors: {len(errors)}, warnings: {len(warnings)}; check.json and check.png are in "
        f"{output}."
    )
    if errors:
        sys.exit(2)


def findings_table(findings: Iterable[Finding]) -> str:
    """Errors, then warnings, by kind, with the first cases of each."""
    lines = []
    listed = list(findings)
    for level in LEVELS:
        kinds = dict.fromkeys(finding.kind for finding in listed if finding.level == level)
        for kind in kinds:
            same = [finding for finding in listed if (finding.level, finding.kind) == (level, kind)]
            lines.append(f"{level.capitalize()}: {kind} ({len(same)})")
            lines += [f"  {finding.case} {finding.text}".replace("   ", "  ") for finding in same[:SHOWN]]
            lines += [f"  and {len(same) - SHOWN} more in check.json"] if len(same) > SHOWN else []
    return "\n".join(lines) or "Nothing stands out."


def empty_note(number: int, file: Path) -> str:
    """What empty labels do to the measures, and how to leave them out."""
    if not number:
        return f"No label in labelsTr is empty; {file} is."
    return (
        f"{file} names the training cases without foreground ({number}). Their Dice is undefined for an empty "
        "prediction (nnU-Net leaves such cases out of its mean) and 0 for a single wrong voxel, so that a mean says "
        "little of them: they teach where nothing is and measure false alarms. mae3d_split --leave_out FILE keeps them "
        "out of every fold."
    )


def _patients(
    csv_file: Path | None, case: str | None, patient: str, cases: Sequence[str], preprocessed: Path
) -> dict[str, str]:
    """Of the table, or of `mae3d_split`; empty when nobody has said who is who."""
    from nnunet_vit_mae.datasets.split.patients import PATIENTS, read_patients
    from nnunet_vit_mae.datasets.tables import read_case_table

    if csv_file is None:
        file = preprocessed / PATIENTS
        return read_patients(file) if file.is_file() else {}
    patients = read_case_table(csv_file, case, cases).patients(patient)
    if unknown := [name for name in cases if name not in patients]:
        print(f"{csv_file} has no row for {abbreviated(unknown)}: nobody knows whose they are.")
    return patients


def _json(finding: Finding) -> dict[str, str]:
    return {name: value for name, value in asdict(finding).items() if name != "level"}


def _case(look: CaseSummary, names: Sequence[str]) -> dict[str, Any]:
    return {
        "size": look.geometry and look.geometry.size,
        "spacing_mm": look.geometry and look.geometry.spacing,
        "orientation": look.geometry and look.orientation,
        "intensities": {names[number]: asdict(channel) for number, channel in look.channels.items()},
        "label_mm3": look.volumes,
    }


def _picture(looks: Sequence[CaseSummary], channels: Any, labels: Any, file: Path) -> None:
    from nnunet_vit_mae.datasets.check.across_cases import outliers_by_channel
    from nnunet_vit_mae.datasets.check.figure import draw
    from nnunet_vit_mae.plots import save_figure

    save_figure(draw(looks, channels, labels, outliers_by_channel(looks, channels)), file)
