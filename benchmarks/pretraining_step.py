"""One step of masked autoencoding against MONAI's, side by side: forward, norm-pix loss, backward, clipping, AdamW.

The same sizes (ViTiac's S, mask ratio 0.9), the same data and optimiser, steps taken in turn. Ours runs as
`mae3d_pretrain` does by default, and with the papers' decoder, in which all tokens attend to one another. fp32 on one
CPU thread, or with `--device cuda` on a GPU, where both run in bf16. Memory: the peak of a step in a process of its
own, above what the process held before the network was built. MONAI's network differs as its class does: it embeds all
tokens, then drops the hidden ones, has a class token, stores attention scores, and predicts visible tokens too.

    python benchmarks/pretraining_step.py      # prints the tables of docs/speed.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measuring import peak_memory, printed_apart, taken_in_turn, training_step
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor, nn

from nnunet_vit_mae.networks.autoencoder import norm_pix_targets, reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.planning import default_settings
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.units import MIB

RATIO = 0.9
DEFAULT, PAPERS = "default", "ours"  # our networks: as planned, and with the decoder of both papers
OURS = {DEFAULT: "default", PAPERS: "papers' decoder"}
WITHOUT_AUTOCAST = ("MONAI",)  # its network fails under it: on a GPU all of it is in bf16, its weights too


@dataclass(frozen=True)
class Case:
    """Cubic patches and tokens."""

    side: int
    token: int
    batch: int

    @property
    def tokens(self) -> int:
        return (self.side // self.token) ** 3

    def __str__(self) -> str:
        return f"{self.side}^3, token {self.token}, batch {self.batch}"


CASES = [Case(48, 8, 4), Case(96, 8, 1)]


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory_of", nargs=2, metavar=("NAME", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, case = arguments.memory_of
        print(peak_memory(partial(step_of, name, CASES[int(case)], arguments.size, torch.device("cpu"))))
        return
    print("| case | ours | ms | MONAI, ms | ratio | MiB | MONAI, MiB | ratio |\n|---|---|---|---|---|---|---|---|")
    for number, case in enumerate(CASES):
        device, flags = torch.device(arguments.device), ("--size", arguments.size, "--memory_of")
        peaks = {name: int(printed_apart(__file__, *flags, name, str(number))) / MIB for name in (*OURS, "MONAI")}
        taken = taken_in_turn({name: step_of(name, case, arguments.size, device) for name in peaks}, arguments.rounds)
        for name, words in OURS.items():
            ratio = statistics.median(a / b for a, b in zip(taken[name], taken["MONAI"], strict=True))
            times = f"{1e3 * statistics.median(taken[name]):.0f} | {1e3 * statistics.median(taken['MONAI']):.0f}"
            memory = f"{peaks[name]:.0f} | {peaks['MONAI']:.0f} | {peaks[name] / peaks['MONAI']:.2f}"
            print(f"| {case} | {words} | {times} | {ratio:.2f} | {memory} |", flush=True)


def step_of(name: str, case: Case, size: str, device: torch.device, *, bf16: bool | None = None) -> Callable[[], None]:
    """Return a training step, ready to be repeated; on a GPU in bf16, unless told otherwise."""
    torch.manual_seed(0)
    bf16 = device.type == "cuda" if bf16 is None else bf16
    volume = torch.randn(case.batch, 1, *(case.side,) * 3, device=device)
    build, loss_of = PEERS[name]
    model, autocast = build(case, size).to(device).train(), bf16 and name not in WITHOUT_AUTOCAST
    if bf16 and not autocast:
        model, volume = model.bfloat16(), volume.bfloat16()

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return loss_of(model, volume, case)

    return training_step(model, loss)


def protocol_of(name: str, case: Case) -> Pretraining:
    """Return the default protocol, or that of the papers."""
    return default_settings((case.side,) * 3, (1.0,) * 3, 2).pretraining if name == DEFAULT else Pretraining()


def our_model(name: str, case: Case, size: str) -> nn.Module:
    """Build the network as `mae3d_pretrain` does."""
    return build_autoencoder(Network(size=size, token=(case.token,) * 3), 1, protocol_of(name, case))


def our_loss(name: str, model: nn.Module, volume: Tensor, case: Case) -> Tensor:
    """Compute the loss as `mae3d_pretrain` does."""
    masking = Masking(mask_ratio=RATIO, rebuilt_share=protocol_of(name, case).rebuilt_share)
    masks = masking.rounds(masking.draw(torch.rand(case.batch, case.tokens)))[0].to(volume.device)
    return reconstruction_loss(model(volume, masks), norm_pix=True)


def monai_model(case: Case, size: str) -> nn.Module:
    """Build MONAI's network with the sizes of ours."""
    sizes = SIZES[size]
    return MaskedAutoEncoderViT(
        in_channels=1,
        img_size=case.side,
        patch_size=case.token,
        hidden_size=sizes.width,
        mlp_dim=4 * sizes.width,
        num_layers=sizes.depth,
        num_heads=sizes.heads,
        masking_ratio=RATIO,
        decoder_hidden_size=sizes.decoder_width,
        decoder_mlp_dim=4 * sizes.decoder_width,
        decoder_num_layers=sizes.decoder_depth,
        decoder_num_heads=sizes.decoder_heads,
        qkv_bias=True,
    )


def monai_loss(model: nn.Module, volume: Tensor, case: Case) -> Tensor:
    """Compute the same loss on what MONAI predicts."""
    predicted, mask = model(volume)
    target = patchify(volume, (case.token,) * 3)
    target = norm_pix_targets(target, torch.ones_like(target))[:, :, 0]
    error = (predicted.float() - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def nnssl_model(case: Case, size: str) -> nn.Module:
    """Build nnssl's network, whose decoder is as wide as its encoder, with the depths of ours.

    Its rotary positions need heads of another width than ours, so only the added ones are used.
    """
    from nnssl.architectures.evaMAE_module import EvaMAE

    sizes = SIZES[size]
    return EvaMAE(
        input_channels=1,
        embed_dim=sizes.width,
        patch_embed_size=(case.token,) * 3,
        output_channels=1,
        input_shape=(case.side,) * 3,
        encoder_eva_depth=sizes.depth,
        encoder_eva_numheads=sizes.heads,
        decoder_eva_depth=sizes.decoder_depth,
        decoder_eva_numheads=sizes.heads,
        patch_drop_rate=RATIO,
        use_rot_pos_emb=False,
    )


def nnssl_loss(model: nn.Module, volume: Tensor, case: Case) -> Tensor:
    """Compute nnssl's loss, the squared error of voxels in masked tokens."""
    predicted, kept = model(volume)
    hidden = torch.ones(case.batch, case.tokens, device=volume.device).scatter_(1, kept, 0)
    error = patchify((predicted.float() - volume).square(), (case.token,) * 3).mean(dim=(2, 3))
    return (error * hidden).sum() / hidden.sum()


PEERS = {
    **{name: (partial(our_model, name), partial(our_loss, name)) for name in OURS},
    "MONAI": (monai_model, monai_loss),
    "nnssl": (nnssl_model, nnssl_loss),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
