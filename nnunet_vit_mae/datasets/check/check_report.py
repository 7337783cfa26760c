"""What `mae3d_check` writes and prints: check.json, check.png, the list of empty labels, and the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunet_vit_mae.datasets.check.across_cases import empty_labels, outliers_by_channel, thickness_histogram
from nnunet_vit_mae.datasets.check.checking import DatasetCheck
from nnunet_vit_mae.datasets.check.figure import check_figure
from nnunet_vit_mae.datasets.check.inspection import CaseSummary, Finding
from nnunet_vit_mae.storage.files import write_file, write_json
from nnunet_vit_mae.storage.readme import write_readme

SHOWN = 10  # cases of each kind that are printed; check.json has all
EMPTY = "empty_labels.txt"
CONTENTS = {
    "check.json": "all errors and warnings, and what was found in each case",
    "check.png": "sizes, spacings, intensities and labels of the cases",
    EMPTY: "cases whose labels are empty, with --list_empty",
}


def write_check(check: DatasetCheck, output: Path, *, list_empty: bool) -> None:
    """Write check.json, check.png and, if asked for, the list of empty labels to the folder `output`."""
    content = {
        "dataset": check.name,
        "errors": [_finding_as_json(finding) for finding in check.errors],
        "warnings": [_finding_as_json(finding) for finding in check.warnings],
        "slice_thickness": thickness_histogram(check.cases),
        "cases": {str(case): _case_as_json(case, check.channels.headings) for case in check.cases},
    }
    write_json(content, output / "check.json")
    write_figure(check, output / "check.png")
    write_readme(output, CONTENTS)
    if list_empty:
        names = empty_labels(check.cases, check.labels)
        write_file("".join(f"{name}\n" for name in names), output / EMPTY)


def write_figure(check: DatasetCheck, file: Path) -> None:
    """Draw the spacings, label volumes and intensities of all cases."""
    from nnunet_vit_mae.plots import save_figure  # `--help` does not wait for matplotlib

    outliers = outliers_by_channel(check.cases, check.channels)
    save_figure(check_figure(check.cases, check.channels, check.labels, outliers), file)


def check_report(check: DatasetCheck, output: Path, *, list_empty: bool) -> str:
    """Return what the command prints: findings, slice thickness, empty labels and the counts."""
    thickness = thickness_histogram(check.cases)
    lines = [check.note] if check.note else []
    lines.append(findings_table(check))
    lines.append("Slice thickness: " + ", ".join(f"{name} in {count}" for name, count in thickness.items()) + ".")
    if list_empty:
        lines.append(empty_label_note(len(empty_labels(check.cases, check.labels)), output / EMPTY))
    lines.append(
        f"Cases: {len(check.cases)}, errors: {len(check.errors)}, warnings: {len(check.warnings)}; check.json and "
        f"check.png are in {output}."
    )
    return "\n".join(lines)


def findings_table(check: DatasetCheck) -> str:
    """List errors, then warnings, by kind, with the first cases of each."""
    lines = []
    for level, findings in (("Error", check.errors), ("Warning", check.warnings)):
        for kind in dict.fromkeys(finding.kind for finding in findings):
            of_kind = [finding for finding in findings if finding.kind == kind]
            lines.append(f"{level}: {kind} ({len(of_kind)})")
            lines += ["  " + f"{finding.case} {finding.text}".lstrip() for finding in of_kind[:SHOWN]]
            if len(of_kind) > SHOWN:
                lines.append(f"  and {len(of_kind) - SHOWN} more in check.json")
    return "\n".join(lines) or "No problems were found."


def empty_label_note(number: int, file: Path) -> str:
    """Explain what empty labels mean for the measures, and how to leave them out."""
    if not number:
        return f"No label in labelsTr is empty, so {file} is an empty list."
    return (
        f"{file} lists the training cases without foreground ({number}). Their Dice is undefined if the prediction is "
        "empty too (nnU-Net leaves such cases out of its mean) and 0 after a single false-positive voxel, so that a "
        "mean Dice says little about them. They teach the network what is normal, and they measure false positives. "
        "mae3d_split --leave_out FILE keeps them out of every fold."
    )


def _finding_as_json(finding: Finding) -> dict[str, str]:
    return {name: value for name, value in asdict(finding).items() if name != "level"}


def _case_as_json(case: CaseSummary, channel_names: Sequence[str]) -> dict[str, Any]:
    return {
        "size": case.geometry and case.geometry.size,
        "spacing_mm": case.geometry and case.geometry.spacing,
        "orientation": case.geometry and case.orientation,
        "intensities": {channel_names[number]: asdict(channel) for number, channel in case.channels.items()},
        "label_mm3": case.volumes,
    }
