"""Count the graphs that torch.compile makes of networks; prints them as JSON.

It runs in a process of its own, for the checks of shapes in other tests cannot be traced.
"""

import json
from collections.abc import Callable
from functools import partial

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.presets import DECODERS, SIZES, Size
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


def finetuning(decoder: str, *, adaptive: bool = False) -> int:
    """Compile forward pass and loss, and call them with two batches."""
    settings = Network(
        size="Tiny", token=TOKEN, decoder=decoder, adaptive=adaptive, taps=(1,) if decoder == "unetr" else ()
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
    SIZES["Tiny"] = Size(24, 2, 2, 12, 1, 2)  # for tracing takes its time
    torch.set_num_threads(1)
    print(json.dumps({name: count() for name, count in CASES.items()}))
