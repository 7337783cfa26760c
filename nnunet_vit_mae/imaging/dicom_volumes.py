"""Several volumes in one DICOM series, such as the b-values of a diffusion series or two echoes, taken apart.

Scanners and archives often store them together. A file with many frames goes to one of them as a whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations

from nnunet_vit_mae.imaging.dicom import DicomSeries, SeriesError, SeveralVolumesError, checked_stack, header_problem
from nnunet_vit_mae.imaging.dicom_header import TRAITS, DicomHeader


def volumes_of(series: DicomSeries) -> list[DicomSeries]:
    """Divide a series by one tag, or two, into volumes that `read_series` accepts; if none does it, return it whole.

    The description of a volume says what tells it from the others, e.g. "ep2d_diff (b-value 1000)".
    """
    try:
        checked_stack(series)
    except SeveralVolumesError:
        return _divided(series) or [series]
    except SeriesError:
        return [series]
    return [series]


def _divided(series: DicomSeries) -> list[DicomSeries]:
    traits = [dict(file.frames[0].traits) for file in series.files]
    within: set[str] = set()  # what differs among the frames of one file, which stay together
    for file in series.files:
        within |= {keyword for frame in file.frames for keyword, _ in {*frame.traits} ^ {*file.frames[0].traits}}
    values_of = {keyword: {of_file.get(keyword) for of_file in traits} for keyword in TRAITS if keyword not in within}
    differing = [keyword for keyword, values in values_of.items() if len(values) > 1]
    for keywords in chain(combinations(differing, 1), combinations(differing, 2)):
        files: dict[tuple[str, ...], list[DicomHeader]] = defaultdict(list)
        for file, of_file in zip(series.files, traits, strict=True):
            files[tuple(of_file.get(keyword, "") for keyword in keywords)].append(file)
        values = sorted(files, key=lambda several: [*map(_number, several), *several])
        volumes = [replace(series, files=files[key], volume=_in_words(keywords, key)) for key in values]
        if len(volumes) > 1 and not any(map(header_problem, volumes)):
            return volumes
    return []


def _in_words(keywords: Sequence[str], values: Sequence[str]) -> str:
    """Return the values of tags as a user would write them, without the signs of patterns."""
    texts = [f"{_number(value):g}" if _number(value) < math.inf else value.replace("\\", "/") for value in values]
    return ", ".join(f"{TRAITS[keyword]} {text or 'none'}" for keyword, text in zip(keywords, texts, strict=True))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf
