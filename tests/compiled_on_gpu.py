"""Compare compiled steps and runs on a GPU with eager ones; prints JSON. Without the type checks of the tests' imports.

Those cannot be compiled, which is why this is a script of its own.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import blosc2
import numpy as np
import torch
from torch import Tensor, nn

from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.pretraining import run as loop
from nnunet_vit_mae.pretraining.loss import COMPILER, PretrainingLoss
from nnunet_vit_mae.pretraining.volumes import DeviceCache
from nnunet_vit_mae.settings import Network, Pretraining

GPU = torch.device("cuda")
BATCHES = (2, 2, 2, 2, 3)  # a graph is prepared, recorded and repeated; then a batch has another size
PATCH = (8, 12, 10)


def main() -> None:
    """Print how far compiled steps are from eager ones, and the losses of both kinds of runs."""
    steps = {decoder: apart_in_steps(decoder) for decoder in ("self", "cross")}
    with tempfile.TemporaryDirectory() as folder:
        runs = {kind: run(Path(folder) / kind, kind) for kind in ("off", "on")}
    print(json.dumps({"steps": steps, "runs": runs}))


def apart_in_steps(decoder: str) -> list[tuple[float, float]]:
    """Return the distances of the losses and of all gradients, for each batch."""
    torch.manual_seed(0)
    network, protocol = Network(size="XS", token=(4, 4, 4), positions="both"), Pretraining(decoder=decoder)
    eager = PretrainingLoss(build_autoencoder(network, 1, protocol).to(GPU))
    other, found = copy.deepcopy(eager), []
    compiled = torch.compile(other, fullgraph=True, **COMPILER)
    for batch in BATCHES:
        volume = torch.randn(batch, 1, 16, 24, 20).to(GPU)
        masks = Masking(mask_ratio=0.75).draw(torch.rand(batch, 120)).to(GPU)
        results = []
        for module, call in ((other, compiled), (eager, eager)):
            module.zero_grad(set_to_none=True)
            loss = call(volume, masks, norm_pix=True)[0]
            loss.backward()
            results.append((loss.detach().clone(), gradients_of(module)))
        found.append((apart(results[0][0], results[1][0]), apart(results[0][1], results[1][1])))
    return found


def gradients_of(module: nn.Module) -> Tensor:
    """Return the gradients of all parameters in one vector."""
    return torch.cat([part.grad.flatten() for part in module.parameters() if part.grad is not None])


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def write_volumes(folder: Path) -> list[Path]:
    """Write preprocessed volumes of two channels, which are at least as large as a crop."""
    random, files = np.random.default_rng(0), []
    for number, shape in enumerate([(9, 15, 11), (12, 13, 10), PATCH]):
        files.append(folder / f"case_{number}.b2nd")
        blosc2.asarray(random.normal(size=(2, *shape)).astype(np.float32), urlpath=str(files[-1]), mode="w")
    return files


def run(folder: Path, kind: str) -> dict[str, object]:
    """Pre-train for a few steps, compiled and with volumes on the GPU, or neither; returns losses and log."""
    folder.mkdir()
    files = write_volumes(folder)
    job = loop.PretrainingJob(
        files=files,
        channel_names=["T1", "FLAIR"],
        patch_size=PATCH,
        spacing=(1.5, 1.0, 1.0),
        network=Network(size="XS", token=(4, 4, 4)),
        protocol=Pretraining(seed=3, epochs=4, batch_size=2, mask_ratio=0.6, base_lr=0.1, compile=kind),
        cache=DeviceCache(files, GPU) if kind == "on" else None,
    )
    losses = loop.run(job, folder / "run", device=GPU, resume=False).losses
    return {"losses": losses, "log": (folder / "run" / "log.txt").read_text()}


if __name__ == "__main__":
    main()
