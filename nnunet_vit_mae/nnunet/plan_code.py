"""Names in plans that nnU-Net turns into code, limited to those of networks.

nnU-Net imports and calls what plans name, with arguments that stand there too: plans with the network class `os.system`
run a command. Plans come from other people, in a model or by mail, so only names of networks and their parts pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nnunet_vit_mae.errors import UserError

# a module and one name in it: a longer path could lead through a module to whatever that imports
NETWORK = r"dynamic_network_architectures\.architectures\.[a-z]\w*\.[A-Z]\w*"
PART = r"torch\.nn\.(modules\.[a-z]\w*\.)?[A-Z]\w*|dynamic_network_architectures\.building_blocks\.[a-z]\w*\.[A-Z]\w*"
NAMES = {  # by entry; what nnU-Net looks for among its own classes and functions
    "UNet_class_name": r"PlainConvUNet|ResidualEncoderUNet",
    "preprocessor_name": r"\w*Preprocessor\w*",
    "resampling_fn_data": r"(no_)?resampl\w+",
    "resampling_fn_seg": r"(no_)?resampl\w+",
    "resampling_fn_probabilities": r"(no_)?resampl\w+",
    "normalization_schemes": r"\w*Normalization\w*",
    "image_reader_writer": r"\w+IO\w*",
    "label_manager": r"\w*LabelManager\w*",
}
LARGEST = 2**14  # of any number in an architecture, features of a stage or voxels of a patch
MOST_BLOCKS = 256  # convolutions or blocks of a stage


def refuse_other_code(plans: Mapping[str, Any], source: str) -> None:
    """Check that plans name only networks, and those of a size that can be built.

    Args:
        plans: The content of plans, whose configurations are dictionaries.
        source: What errors call the plans.

    Raises:
        UserError: If an entry names anything else, or a number in an architecture is out of all proportion.
    """
    for entry, name, pattern in _names_in(plans):
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            raise UserError(
                f"{source} names {name!r} as {entry}, which is not a part of any network: nnU-Net would run it, so do "
                "not use these plans unless you trust their origin, and correct the entry."
            )
    for architecture in _architectures_in(plans):
        _refuse_out_of_proportion(architecture.get("arch_kwargs"), source)


def _names_in(plans: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Return entry, name and the pattern of names that may stand there."""
    for content in (plans, *plans["configurations"].values()):
        for entry, pattern in NAMES.items():
            value = content.get(entry)
            for name in value if isinstance(value, list) else [] if value is None else [value]:
                yield entry, name, pattern
    for architecture in _architectures_in(plans):
        yield "network_class_name", architecture.get("network_class_name"), NETWORK
        arguments, imported = architecture.get("arch_kwargs"), architecture.get("_kw_requires_import")
        if isinstance(arguments, Mapping) and isinstance(imported, list):
            for argument in imported:
                if (name := arguments.get(str(argument))) is not None:
                    yield str(argument), name, PART


def _architectures_in(plans: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = [configuration.get("architecture") for configuration in plans["configurations"].values()]
    return [architecture for architecture in found if isinstance(architecture, Mapping)]


def _refuse_out_of_proportion(value: Any, source: str, entry: str = "arch_kwargs") -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_out_of_proportion(inner, source, str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_out_of_proportion(inner, source, entry)
    elif isinstance(value, int):
        largest = MOST_BLOCKS if entry.startswith(("n_blocks", "n_conv", "n_stages")) else LARGEST
        if abs(value) > largest:
            raise UserError(
                f"{source} has {value} as {entry}, but the largest that makes sense is {largest}: correct it."
            )
