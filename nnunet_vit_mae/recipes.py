"""Recipes: partial `vit_mae` blocks, of ours or in a file, of which later ones win over earlier ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.files import read_json


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """Return a partial `vit_mae` block: one of ours by name (`quick`), or a JSON file.

    Raises `UserError` if it is neither.
    """
    ours = {
        Path(entry.name).stem: entry
        for entry in files("nnunet_vit_mae.plans").iterdir()
        if entry.name.endswith(".json")
    }
    if name_or_file in ours:
        return json.loads(ours[name_or_file].read_text(encoding="utf-8"))
    if not Path(name_or_file).is_file():
        raise UserError(f"There is no recipe {name_or_file}: name one of {', '.join(sorted(ours))}, or a JSON file.")
    recipe = read_json(Path(name_or_file))
    if not isinstance(recipe, dict) or not all(isinstance(values, dict) for values in recipe.values()):
        raise UserError(f"The recipe {name_or_file} must be an object of objects, such as {{'network': {{...}}}}.")
    if "encoder" in recipe:
        raise UserError(f"The recipe {name_or_file} names an encoder: give its file with --encoder, to be checked.")
    return recipe


def merged(*recipes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge partial blocks; later ones win.

    >>> merged({"network": {"size": "XS"}}, {"network": {"decoder": "unet"}})
    {'network': {'size': 'XS', 'decoder': 'unet'}}
    """
    block: dict[str, Any] = {}
    for recipe in recipes:
        for section, values in recipe.items():
            block[section] = {**block.get(section, {}), **values}
    return block
