"""Test that the loss of pre-training falls on real CT, if the data lies beside the repository."""

import json
from pathlib import Path

import pytest
from conftest import Workspace

RAW = Path(__file__).parent.parent.parent / "shared" / "data" / "Dataset505_MandibleCT"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RAW.is_dir(), reason=f"the real dataset {RAW.name} is not beside the repository"),
]


def test_pretraining_learns_from_real_ct(tmp_path):
    workspace = Workspace(tmp_path)
    raw = tmp_path / "raw" / RAW.name
    for folder, count in (("imagesTr", 5), ("labelsTr", 5), ("imagesUn", 3)):
        (raw / folder).mkdir(parents=True)
        for file in sorted((RAW / folder).iterdir())[:count]:
            (raw / folder / file.name).symlink_to(file)
    description = json.loads((RAW / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": 5}))

    workspace.call(*"nnUNetv2_plan_and_preprocess -d 505 -c 3d_fullres -np 2 -npfp 2".split())
    workspace.call(*"mae3d_preprocess -d 505 -np 2".split())
    workspace.call(*"mae3d_plan -d 505 -o Real --recipe quick --token 4 8 8".split())
    workspace.call(*"mae3d_pretrain -d 505 -p Real --epochs 40 --batch_size 4 -device cpu".split())

    folder = workspace.root / "results" / RAW.name / "mae3d_pretrain__Real__3d_fullres" / "fold_all"
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in (folder / "log.txt").read_text().splitlines()
        if "epoch " in line
    ]
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
