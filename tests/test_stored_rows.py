"""Rows of a compressed array, read side by side."""

import numpy as np
import pytest

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.prediction import open_probabilities
from nnunet_vit_mae.storage import stored_rows
from nnunet_vit_mae.storage.stored_rows import StoredRows

SHAPE = (5, 3, 40, 70)  # compressed, a row takes several pieces


def written(file, *, dtype=np.float32, order="C", save=np.savez_compressed, shape=SHAPE):
    array = np.asarray(np.random.default_rng(0).random(shape), dtype=dtype, order=order)
    save(file, probabilities=array)
    return array


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("size", [1, 997, 8_400, 10**6])
def test_parts_together_are_the_array(tmp_path, monkeypatch, dtype, size):
    monkeypatch.setattr(stored_rows, "PIECE", 1000)
    monkeypatch.setattr(stored_rows, "AT_ONCE", 700)
    shape = (3, 2, 5, 7) if size == 1 else SHAPE
    array = written(tmp_path / "case.npz", dtype=dtype, shape=shape)
    rows = StoredRows(tmp_path / "case.npz", "probabilities")
    for _ in range(2):  # the second time from the places that are kept
        parts = [*rows.parts(size)]
        assert all(part.shape[1] == size for part in parts[:-1])
        assert (np.concatenate(parts, axis=1) == array.reshape(len(array), -1)).all()
    assert (rows.shape, rows.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize(("order", "save"), [("F", np.savez_compressed), ("C", np.savez)])
def test_arrays_that_are_stored_otherwise_are_read_too(tmp_path, order, save):
    array = written(tmp_path / "case.npz", order=order, save=save)
    parts = [*StoredRows(tmp_path / "case.npz", "probabilities").parts(999)]
    assert (np.concatenate(parts, axis=1) == array.reshape(len(array), -1)).all()


def test_every_damage_is_noticed_before_anything_is_used(tmp_path):
    written(tmp_path / "whole.npz")
    content, file = (tmp_path / "whole.npz").read_bytes(), tmp_path / "case.npz"
    for place in range(500, len(content) - 200, 9973):
        file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"case\.npz cannot be read"):
            open_probabilities(file, SHAPE[0])
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"case\.npz cannot be read"):
        open_probabilities(file, SHAPE[0])
