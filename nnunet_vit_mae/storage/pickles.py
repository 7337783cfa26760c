"""Pickles that nnU-Net writes (checkpoints, properties of cases), read without running any code in them.

A pickle can call any function that it names. Only the names below are looked up: numbers and arrays of numpy.
"""

from __future__ import annotations

import codecs
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_vit_mae.errors import UserError, first_line


def _allowed() -> dict[str, Any]:
    """Return what a pickle may name, by the names that numpy 1 and numpy 2 give it."""
    of_multiarray = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    of_numeric = {"_frombuffer": np.zeros(1).__reduce_ex__(5)[0]}
    named: dict[str, Any] = {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray, "_codecs.encode": codecs.encode}
    for core in ("numpy.core", "numpy._core"):
        named |= {f"{core}.multiarray.{name}": function for name, function in of_multiarray.items()}
        named |= {f"{core}.numeric.{name}": function for name, function in of_numeric.items()}
    kinds = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "SU"}
    return named | {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}


ALLOWED = _allowed()


def read_trained(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net on the CPU.

    Args:
        file: The checkpoint.
        mmap: Leave the weights on the disk until they are used.

    Raises:
        UserError: If the file is damaged, holds anything but weights and plain values, or has no weights.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                    raise pickle.UnpicklingError("it is compressed, as no checkpoint of nnU-Net is")
        with torch.serialization.safe_globals([(value, name) for name, value in ALLOWED.items()]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (torch raises many kinds for damaged files)
        raise UserError(
            f"{file} cannot be read ({first_line(error)}), because only weights and plain values are unpickled: train "
            "again, or name another checkpoint."
        ) from None
    weights = checkpoint.get("network_weights") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(map(_is_weight, weights, weights.values())):
        raise UserError(f"{file} is not a checkpoint of nnU-Net: train again, or name another file.")
    return checkpoint


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def read_properties(file: Path) -> dict[str, Any]:
    """Read the properties that nnU-Net writes beside an image (`.pkl`).

    Raises:
        UserError: If the file is missing, damaged, or holds anything but plain values and arrays.
    """
    try:
        with file.open("rb") as stream:
            properties = _PlainUnpickler(stream).load()
        if not isinstance(properties, dict):
            raise pickle.UnpicklingError("it is not a dictionary")
    except FileNotFoundError:
        raise UserError(f"{file} is missing: make it again with nnU-Net.") from None
    except Exception as error:  # noqa: BLE001 (damaged pickles raise many kinds, also MemoryError for a damaged length)
        raise UserError(
            f"{file} cannot be read ({first_line(error)}), because only plain values and arrays are unpickled: make it "
            "again with nnU-Net."
        ) from None
    return properties


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {name}")
        return ALLOWED[name]
