"""`examples/features.ipynb` runs, on a folder as `mae3d_demo` leaves it; its outputs are not stored."""

import json
from pathlib import Path

import blosc2
import numpy as np
from conftest import read_voxels
from test_weights import make_card

from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.phantoms.dataset import write_phantom_dataset
from nnunet_vit_mae.weights import save_encoder

NOTEBOOK = Path(__file__).parent.parent / "examples" / "features.ipynb"


def write_demo(folder: Path) -> None:
    """Write what the notebook reads: raw labels, preprocessed volumes, and an encoder."""
    raw = write_phantom_dataset(folder / "raw", labelled=8, unlabelled=0, test=0, extent_mm=(12.0, 16.0, 20.0))
    preprocessed = folder / "preprocessed" / raw.name / "nnUNetPlans_3d_fullres"
    preprocessed.mkdir(parents=True)
    for file in (raw / "imagesTr").iterdir():
        image = read_voxels(file).astype(np.float32)
        volume = ((image - image.mean()) / image.std())[None]
        name = file.name.removesuffix("_0000.nii.gz")
        for ending in ("", "_seg"):
            blosc2.asarray(volume, urlpath=str(preprocessed / f"{name}{ending}.b2nd"), mode="w")
    card = make_card(channel_names=["CT_zscore"], normalization=["ZScoreNormalization"])
    run = folder / "results" / raw.name / "mae3d_pretrain__Quick__3d_fullres" / "fold_all"
    save_encoder(build_encoder(card.settings, 1), card, run / "encoder.safetensors")


def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    write_demo(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)  # our own notebook
    printed = capsys.readouterr().out
    assert "8 cases, 4 of them" in printed
    assert set(names["scores"]) == set(names["found"])
    assert all(len(values) == 30 and 0 <= values.mean() <= 1 for values in names["scores"].values())
    assert len({values.tobytes() for values in names["found"].values()}) == len(names["found"])
