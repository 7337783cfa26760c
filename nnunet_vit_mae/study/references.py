"""The references of a study, and when they last changed: what was measured with others is measured again."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_vit_mae.storage.files import read_json, write_json
from nnunet_vit_mae.study.design import StudyDesign

REFERENCES = "references.json"


def note_references(study: StudyDesign) -> Path:
    """Note size and date of each reference if they have changed, and return the note.

    The note is as old as the last change, which the files do not tell: a corrected reference may be of an older date
    than the one before, or may be gone. The first note has the date of the newest reference.
    """
    file = Path(study.output, REFERENCES)
    if not file.is_file():
        write_json(_references_of(study), file)
        if dates := [date for _, date in _references_of(study).values()]:
            os.utime(file, ns=(max(dates), max(dates)))
    elif references_have_changed(study):
        write_json(_references_of(study), file)
    return file


def references_have_changed(study: StudyDesign) -> bool:
    """Return whether the references are others than those of the note, if there is one."""
    file = Path(study.output, REFERENCES)
    return file.is_file() and read_json(file) != _references_of(study)


def _references_of(study: StudyDesign) -> dict[str, list[int]]:
    states = {file.name: file.stat() for file in study.references}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
