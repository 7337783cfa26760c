"""A folder to share: the encoder, its settings as JSON, and a model card made from the run, without names or paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nnunet_vit_mae.hub import WEIGHTS
from nnunet_vit_mae.pretraining.run_report import PROGRESS
from nnunet_vit_mae.storage.files import file_hash, without_paths, write_file, write_json
from nnunet_vit_mae.weights import Card, axis_names, encoder_content, read_encoder

CONFIG, README, CURVE = "config.json", "README.md", "loss.png"
UNKNOWN_REPOSITORY = "OWNER/NAME"


def write_model_folder(
    encoder: Path, folder: Path, *, licence: str, repository: str | None = None, case_hashes: bool = False
) -> list[str]:
    """Write an encoder of `mae3d_pretrain` as the hub has it.

    Args:
        encoder: Its file, in the folder of the run.
        folder: Where to write.
        licence: Of the weights, as the hub spells it, such as `cc-by-4.0`.
        repository: `owner/name` on the hub, for the examples in the model card.
        case_hashes: Keep the hashes of the cases' names, by which others who have the same data know which of them the
            encoder has seen, and from which names that are easy to guess can be recovered.

    Returns:
        The names of the files, the weights first.

    Raises:
        UserError: If the file is missing, damaged or not an encoder of ours.
    """
    tensors, card = read_encoder(encoder)
    card = shared_card(card, case_hashes=case_hashes)
    write_file(encoder_content(tensors, card), folder / WEIGHTS)
    files = [WEIGHTS, CONFIG, README]
    curve = encoder.with_name(PROGRESS)
    if curve.is_file():
        write_file(curve.read_bytes(), folder / CURVE)
        files.append(CURVE)
    write_json(_config(card, file_hash(folder / WEIGHTS)), folder / CONFIG)
    page = _model_card(
        card,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        licence=licence,
        repository=repository or UNKNOWN_REPOSITORY,
        curve=CURVE if CURVE in files else None,
    )
    write_file(page, folder / README)
    return files


def shared_card(card: Card, *, case_hashes: bool) -> Card:
    """Return a card without paths, and with numbers in place of the hashes of cases unless they are to stay."""
    numbers = [f"case_{number}" for number in range(1, len(card.cases_seen) + 1)]
    entries = without_paths({field.name: getattr(card, field.name) for field in dataclasses.fields(card)})
    return Card(**entries | {"cases_seen": card.cases_seen if case_hashes else numbers})


def _config(card: Card, sha256: str) -> dict[str, Any]:
    entries = dataclasses.asdict(card)
    del entries["cases_seen"]
    return {"library_name": "nnunet-vit-mae", "weights": WEIGHTS, "sha256": sha256, **entries}


def _model_card(card: Card, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("nnunet_vit_mae.sharing", "."),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "axes": axis_names}
    return environment.get_template("model_card.md.j2").render(card=card, **more)


def _cell(value: Any) -> str:
    """Return a value as text that is one cell of a Markdown table, whatever is in it.

    >>> _cell(["CT", "late | <b>"])
    'CT, late \\\\| &lt;b&gt;'
    """
    if isinstance(value, Mapping):
        value = [f"{name} {entry}" for name, entry in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    for character, escaped in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "'", "[": "\\["}.items():
        text = text.replace(character, escaped)
    return " ".join(text.split()) or "not known"
