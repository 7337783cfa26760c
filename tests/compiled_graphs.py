"""Count the graphs that torch.compile makes of networks, and pre-train with it; prints what comes out as JSON.

It runs in a process of its own, for the checks of shapes in other tests cannot be traced.
"""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import blosc2
import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.presets import DECODERS, SIZES, Size
from nnunet_vit_mae.pretraining import loss
from nnunet_vit_mae.pretraining import run as loop
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.loss import PretrainingLoss
from nnunet_vit_mae.pretraining.run_report import RunReport
from nnunet_vit_mae.pretraining.saved_state import save_state
from nnunet_vit_mae.settings import Network, Pretraining

SIDES, TOKEN, B, C = (7, 8, 9), (4, 4, 4), 2, 3  # tokens reach beyond the volume
TOKENS = 2 * 2 * 3
MIXED = [[0, 1, 2], [1]]


def pretraining(network: dict, protocol: dict) -> int:
    """Compile forward pass and loss, and call them with two batches that have different masks."""
    settings, options = Network(size="Tiny", token=TOKEN, **network), Pretraining(**protocol)
    model = build_autoencoder(settings, C, options)
    masking = Masking(mask_ratio=0.6, rebuilt_share=options.rebuilt_share)
    samples = sum(map(len, MIXED)) if settings.adaptive else B
    batches = [(torch.randn(B, C, *SIDES), masking.rounds(masking.draw(torch.rand(samples, TOKENS)))[0]) for _ in "ab"]
    return graphs(lambda volume, masks: reconstruction_loss(model(volume, masks, MIXED), norm_pix=True), batches)


def token_numbers() -> int:
    """Compile the loss of a run, and call it with batches that differ in their numbers of tokens."""
    loss_of = PretrainingLoss(build_autoencoder(Network(size="Tiny", token=TOKEN), C, Pretraining()))
    masking = Masking(mask_ratio=0.6)
    batches = []
    for some in range(TOKENS, 4, -2):
        taking_part = torch.arange(TOKENS).expand(B, -1) < some
        batches.append((torch.randn(B, C, *SIDES), masking.draw(torch.rand(B, TOKENS), taking_part)))
    return graphs(lambda volume, masks: loss_of(volume, masks, norm_pix=True)[0], batches)


def runs() -> dict[str, dict[str, Any]]:
    """Pre-train eager, compiled after an eager beginning that was interrupted, and without a compiler."""
    loss.COMPILER = {"backend": "aot_eager"}
    loop.SAVE_EVERY_SECONDS = 0.0
    shapes = [(9, 8, 9), (4, 9, 9), (8, 4, 12), (7, 9, 5)]  # of which not all fill a crop
    with TemporaryDirectory() as name, patch.object(RunReport, "draw"):
        folder, random = Path(name), np.random.default_rng(0)
        files = [folder / f"case_{number}.b2nd" for number in range(4)]
        for file, shape in zip(files, shapes, strict=True):
            blosc2.asarray(random.normal(size=(C, *shape)).astype(np.float32), urlpath=str(file), mode="w")
        with contextlib.suppress(KeyboardInterrupt), patch.object(loop, "save_state", saved_once):
            pretrained(files, folder / "resumed", "off")
        done = {
            "eager": pretrained(files, folder / "eager", "off"),
            "resumed": pretrained(files, folder / "resumed", "on"),
        }
        loss.COMPILER = {"backend": missing}
        try:
            pretrained(files, folder / "refused", "on")
        except UserError as error:
            done["refused"] = {"error": str(error)}
        with patch.object(loss, "_pays", return_value=True):  # as on a GPU
            return done | {"without a compiler": pretrained(files, folder / "without", "auto")}


def missing(*_: Any) -> Callable:
    """Compile nothing, as where triton is missing."""
    raise RuntimeError("Cannot find a compiler.\nMore can be found elsewhere.")


def saved_once(*state: Any) -> None:
    """Save a run, and interrupt it."""
    save_state(*state)
    raise KeyboardInterrupt


def pretrained(files: list[Path], output: Path, kind: str) -> dict[str, Any]:
    """Pre-train, or go on with it, and return what became of it."""
    job = PretrainingJob(
        files=files,
        channel_names=["a", "b", "c"],
        patch_size=SIDES,
        spacing=(1.0, 1.0, 1.0),
        network=Network(size="Tiny", token=TOKEN),
        protocol=Pretraining(epochs=2, batch_size=2, base_lr=0.1, compile=kind),
    )
    torch._dynamo.reset()
    counters.clear()
    done = loop.run(job, output, device=torch.device("cpu"), resume=True)
    saved = torch.load(output / "state.pt", weights_only=True)["network"]
    return {
        "losses": done.losses,
        "names": sorted(saved),
        "graphs": counters["stats"]["unique_graphs"],
        "log": (output / "log.txt").read_text(),
    }


def finetuning(decoder: str, *, adaptive: bool = False, size: str = "Tiny") -> int:
    """Compile forward pass and loss, and call them with two batches."""
    settings = Network(
        size=size, token=TOKEN, decoder=decoder, adaptive=adaptive, taps=(1,) if decoder == "unetr" else ()
    )
    model = build_segmenter(settings, C, 2, drop_path=0.1, unet=unet)
    batches = [(torch.randn(B, C, *SIDES), torch.randint(2, (B, *SIDES))) for _ in "ab"]
    present = MIXED if adaptive else None
    return graphs(lambda volume, target: segmentation_loss(model.logits(volume, present), target), batches)


def on_a_gpu() -> int:
    """Compile what asks a GPU whether it has bf16."""

    def product(values: Tensor) -> Tensor:
        with autocast(torch.device("cuda")):
            return values @ values

    return graphs(product, [(torch.ones(2, 2),)])


def on_the_host() -> list[str]:
    """Return what a compiled step of pre-training on a GPU, here one without values, computes on the CPU."""
    found: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Callable:
        for node in module.graph.nodes:
            for part in tree_iter(node.meta.get("example_value")):
                if isinstance(part, Tensor) and part.device.type == "cpu":
                    found.append(str(node.target))
        return module.forward

    torch._dynamo.reset()
    gpu = torch.device("cuda")
    settings = Network(size="Tiny", token=TOKEN, tokenizer="convolutional", register_tokens=2, blocks="modern")
    masks = Masking(mask_ratio=0.6).draw(torch.rand(B, TOKENS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with gpu:
            step = PretrainingLoss(build_autoencoder(settings, C, Pretraining(decoder="cross")))
            volume = torch.empty(B, C, *SIDES)
        torch.compile(step, fullgraph=True, backend=look)(volume, masks.to(gpu), norm_pix=True)
    return found


def branching() -> int:
    """Compile what no single graph can hold."""
    return graphs(lambda values: values if values.sum() > 0 else -values, [(torch.ones(2),)])


CASES: dict[str, Callable[[], int]] = {
    "self": partial(pretraining, {"positions": "sine_cosine"}, {}),
    "rotary": partial(pretraining, {"positions": "rotary"}, {}),
    "cross": partial(pretraining, {"blocks": "modern"}, {"decoder": "cross", "rebuilt_share": 0.5}),
    "convolutional tokenizer": partial(pretraining, {"tokenizer": "convolutional", "register_tokens": 2}, {}),
    "adaptive": partial(pretraining, {"adaptive": True}, {}),
    "adaptive, cross": partial(
        pretraining, {"adaptive": True, "modality_vectors": "learned"}, {"decoder": "cross", "rebuilt_share": 0.5}
    ),
    **{decoder: partial(finetuning, decoder) for decoder in DECODERS},
    "branches left out at random": partial(finetuning, "mae", size="Two blocks"),  # never those of a single block
    "numbers of tokens": token_numbers,
    "adaptive unetr": partial(finetuning, "unetr", adaptive=True),
    "on a GPU": on_a_gpu,
    "branching": branching,
}


def graphs(function: Callable[..., Tensor], batches: list[tuple]) -> int:
    """Return how many graphs all batches of one shape take, 0 if one graph cannot hold the function."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for batch in batches:
        torch.manual_seed(0)
        try:
            result = compiled(*batch)
        except Unsupported:
            return 0
        torch.manual_seed(0)
        torch.testing.assert_close(result, function(*batch))
    return counter.frame_count


def unet() -> nn.Module:
    """Build nnU-Net's own U-Net."""
    return PlainConvUNet(
        C, 2, (4, 6), nn.Conv3d, 3, (1, 1), 1, 2, 1, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
    )  # fmt: skip


if __name__ == "__main__":
    SIZES |= {"Tiny": Size(24, 1, 2, 12, 1, 2), "Two blocks": Size(24, 2, 2, 12, 1, 2)}  # for tracing takes its time
    torch.set_num_threads(1)
    graphs_of = {name: count() for name, count in CASES.items()}
    print(json.dumps({"graphs": graphs_of, "on the host": on_the_host(), "runs": runs()}))
