"""What pre-training is worth with few labels: the comparison of `ablation.py` on volumes in the memory of a GPU.

A GPU that is lent by the minute has no time to read files, and no nnU-Net installed. So `--pack` writes a preprocessed
dataset into one file, where nnU-Net is; all else needs torch and dynamic-network-architectures only. Cases are drawn as
in `ablation.py`: those to test on are seen by nothing, the few labelled ones and all others without their labels are
what an encoder is pre-trained on. Arms come from the same kind of file; without a decoder they are nnU-Net's own U-Net.

Every result is a line of the output file, and what is there already is not run again:

    python benchmarks/gpu_ablation.py --pack 504 -o 504.npz
    python benchmarks/gpu_ablation.py 504.npz --arms arms.json --seeds 0 1 2 -o ablation_504_gpu.jsonl
    python benchmarks/ablation.py --table ablation_504_gpu.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.optimisation import parameter_groups, set_learning_rate, warmup_cosine
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import Settings

TRIES = 10  # for a crop with foreground
INTENSITY = 0.2  # standard deviation of the random factor and shift of a training crop
FEATURES = (32, 64, 128, 256, 320, 320)  # nnU-Net's, by stage


@dataclasses.dataclass(frozen=True)
class Packed:
    """A dataset: volumes (n z y x, zeros behind each of them), their sizes, labels of the first ones, and plans."""

    name: str
    volumes: Tensor  # on the device, in half precision
    labels: Tensor  # on the device
    sizes: np.ndarray  # n 3
    patch: tuple[int, ...]
    strides: list[list[int]]  # of nnU-Net's U-Net

    @property
    def classes(self) -> int:
        """Return the number of outputs, the background among them."""
        return int(self.labels.max()) + 1


@dataclasses.dataclass(frozen=True)
class Split:
    """Numbers of cases."""

    labelled: list[int]
    tested: list[int]
    pretraining: list[int]


def main() -> None:
    """Pack a dataset, or run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, nargs="?")
    parser.add_argument("--pack", metavar="ID", help="write this dataset's preprocessed volumes to -o")
    parser.add_argument("-o", dest="output", type=Path, required=True)
    parser.add_argument("--arms", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=10)
    parser.add_argument("--tested", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--pretraining_steps", type=int, default=10000)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.pack, arguments.output)
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(1)
    packed = unpack(arguments.packed, torch.device(arguments.device))
    arms: Mapping[str, dict] = json.loads(arguments.arms.read_text())
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {(entry["arm"], entry["seed"], entry["steps"]) for entry in map(json.loads, lines)}
    for seed in arguments.seeds:
        for entry in results(packed, arms, seed, arguments, done):
            with arguments.output.open("a") as stream:
                stream.write(json.dumps({"dataset": packed.name, "seed": seed} | entry) + "\n")
            print(entry, flush=True)


def pack(dataset: str, output: Path) -> None:
    """Write the preprocessed volumes of a dataset of one channel, labelled ones first, and what its plans say."""
    from ablation import labels_of

    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.pretraining.volumes import open_volume

    plan = load_plan(find_dataset(dataset), "nnUNetPlans", "3d_fullres")
    names = sorted(file.name[: -len("_seg.b2nd")] for file in plan.preprocessed_folder.glob("*_seg.b2nd"))
    files = [plan.preprocessed_folder / f"{name}.b2nd" for name in names]
    files += sorted(plan.unlabelled_folder.glob("*.b2nd")) if plan.unlabelled_folder.is_dir() else []
    volumes = [open_volume(file)[0] for file in files]
    labels = [labels_of(plan, name)[0].clip(min=0) for name in names]
    sizes = np.array([volume.shape for volume in volumes])
    largest = tuple(sizes.max(axis=0))
    np.savez_compressed(
        output,
        # three digits are kept, which compress well
        volumes=np.stack([_filled(volume.round(2).astype(np.float16), largest) for volume in volumes]),
        labels=np.stack([_filled(label.astype(np.uint8), largest) for label in labels]),
        sizes=sizes,
        patch=plan.patch_size,
        strides=plan.configuration.network_arch_init_kwargs["strides"],
        name=plan.dataset.name,
    )


def _filled(array: np.ndarray, largest: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, most - side) for side, most in zip(array.shape, largest, strict=True)])


def unpack(file: Path, device: torch.device) -> Packed:
    """Read a packed dataset to the device."""
    with np.load(file, allow_pickle=False) as content:
        volumes, labels = (torch.from_numpy(content[part]).to(device) for part in ("volumes", "labels"))
        patch, strides = content["patch"].tolist(), content["strides"].tolist()
        return Packed(str(content["name"]), volumes, labels, content["sizes"], tuple(patch), strides)


def results(
    packed: Packed, arms: Mapping[str, dict], seed: int, arguments: argparse.Namespace, done: set
) -> Iterator[dict[str, Any]]:
    """Yield the results of a seed that are not there yet; arms with equal encoders share a pre-training."""
    order = np.random.default_rng(seed).permutation(len(packed.labels)).tolist()
    rest = order[arguments.tested :]
    pool = range(len(packed.labels), len(packed.volumes))
    split = Split(rest[: arguments.labelled], order[: arguments.tested], [*sorted(rest), *pool])
    encoders: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for arm, block in arms.items():
        settings = Settings.from_dict(block)
        for steps in (0, arguments.pretraining_steps) if "network" in block else (0,):
            if (arm, seed, steps) in done:
                continue
            started, loss, encoder = time.monotonic(), math.nan, None
            if steps:
                decoder_apart = dataclasses.replace(settings.network, decoder="mae", decoder_width=0, taps=())
                key = f"{decoder_apart} {settings.pretraining}"
                if key not in encoders:
                    encoders[key] = pretrained(packed, settings, steps, seed, split)
                loss, encoder = encoders[key]
            torch.manual_seed(seed)
            network = build(packed, settings, "network" in block, encoder)
            finetune(packed, network, settings, split, seed, arguments.steps, pretrained=encoder is not None)
            dice = [dice_of(packed, network, number) for number in split.tested]
            seconds = round(time.monotonic() - started, 1)
            yield {"arm": arm, "steps": steps, "loss": loss, "probe": math.nan, "dice": float(np.mean(dice))} | {
                "seconds": seconds
            }


def build(packed: Packed, settings: Settings, is_vit: bool, encoder: dict[str, Tensor] | None) -> nn.Module:
    """Build an arm's network on the device."""
    if is_vit:
        network = build_segmenter(settings.network, 1, packed.classes, drop_path=0.0, unet=lambda: unet(packed))
        if encoder is not None:
            network.encoder.load_state_dict(encoder)
    else:
        network = unet(packed)
    return network.to(packed.volumes.device)


def unet(packed: Packed) -> nn.Module:
    """Build the U-Net that nnU-Net plans, with outputs at all resolutions."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(packed.strides)
    return PlainConvUNet(
        1, stages, FEATURES[:stages], nn.Conv3d, 3, packed.strides, 2, packed.classes, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def pretrained(
    packed: Packed, settings: Settings, steps: int, seed: int, split: Split
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of the last twentieth of a pre-training, and its encoder."""
    protocol, device = settings.pretraining, packed.volumes.device
    torch.manual_seed(seed)
    random, network = np.random.default_rng((seed, 1)), build_autoencoder(settings.network, 1, protocol).to(device)
    groups = parameter_groups(network.named_parameters(), weight_decay=protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    masking = Masking(mask_ratio=protocol.mask_ratio, rebuilt_share=protocol.rebuilt_share)
    tokens = math.prod(-(-side // part) for side, part in zip(packed.patch, settings.network.token, strict=True))
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, protocol.lr * warmup_cosine((step + 1) / (steps + 1), protocol.warmup))
        cases = random.choice(split.pretraining, protocol.batch_size)
        volume, inside = crops(packed, cases, random)
        for axis in (2, 3, 4):
            if random.random() < 0.5:
                volume, inside = volume.flip(axis), inside.flip(axis)
        noise = torch.from_numpy(random.random((len(cases), tokens), dtype=np.float32))
        masks = masking.draw(noise, covered(inside, settings.network.token).cpu())  # on the host, as in the product
        masks = masking.rounds(masks)[0].to(device)
        with autocast(device):
            loss = reconstruction_loss(network(volume, masks), norm_pix=protocol.norm_pix)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), protocol.gradient_clip)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, steps // 20) :]).mean()), network.encoder.state_dict()


def covered(inside: Tensor, token: tuple[int, int, int]) -> Tensor:
    """Return which tokens (b n) hold a voxel of their volume, given which voxels do (b 1 z y x)."""
    sides = [-side % part for side, part in zip(inside.shape[2:], token, strict=True)]
    filled = functional.pad(inside.half(), (0, sides[2], 0, sides[1], 0, sides[0]))
    return functional.max_pool3d(filled.float(), token).flatten(1) > 0


def crops(packed: Packed, cases: np.ndarray, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return crops (b 1 z y x) at random places of volumes, zeros around them, and which voxels lie in the volumes."""
    starts = np.array([place(packed.sizes[case], packed.patch, random) for case in cases])
    volume, inside = cut(packed.volumes, packed, cases, starts)
    return volume.float(), inside


def place(sizes: np.ndarray, patch: tuple[int, ...], random: np.random.Generator) -> list[int]:
    """Draw the first voxel of a crop; of a volume that is smaller than the crop, all of it is kept."""
    ends = [sorted((0, int(voxels) - side)) for voxels, side in zip(sizes, patch, strict=True)]
    return [int(random.integers(low, high + 1)) for low, high in ends]


def cut(source: Tensor, packed: Packed, cases: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cut crops from the volumes or labels of cases, and say which of their voxels lie inside."""
    device = source.device
    index, inside = [], []
    for axis in range(3):
        places = torch.from_numpy(starts[:, axis, None] + np.arange(packed.patch[axis]))
        sizes = torch.from_numpy(packed.sizes[cases][:, axis, None])
        inside.append(((places >= 0) & (places < sizes)).to(device))
        index.append(places.clamp(0, source.shape[axis + 1] - 1).to(device))
    z, y, x = inside
    valid = z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]
    chosen = torch.from_numpy(np.asarray(cases)).to(device)[:, None, None, None]
    voxels = source[chosen, index[0][:, :, None, None], index[1][:, None, :, None], index[2][:, None, None, :]]
    return (voxels * valid)[:, None], valid[:, None]


def finetune(
    packed: Packed, network: nn.Module, settings: Settings, split: Split, seed: int, steps: int, *, pretrained: bool
) -> None:
    """Train on the labelled cases as the settings say, but for the number of steps."""
    protocol, random = settings.finetuning, np.random.default_rng(seed)
    device, labels = packed.volumes.device, packed.labels.cpu().numpy()
    groups = parameter_groups(
        network.named_parameters(),
        weight_decay=protocol.weight_decay,
        layer_decay=protocol.layer_decay if pretrained else 1.0,
        depth=SIZES[settings.network.size].depth,
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    network.train()
    for step in range(steps):
        set_learning_rate(optimizer, protocol.lr * warmup_cosine((step + 1) / (steps + 1), protocol.warmup))
        cases = random.choice(split.labelled, protocol.batch_size)
        starts = np.array([place_with_foreground(packed, labels[case], case, random) for case in cases])
        volume, target = cut(packed.volumes, packed, cases, starts)[0], cut(packed.labels, packed, cases, starts)[0]
        factor, shift = (
            torch.from_numpy(random.normal(mean, INTENSITY, (len(cases), 1, 1, 1, 1))).float().to(device)
            for mean in (1, 0)
        )
        noise = torch.randn(volume.shape, device=device) * (INTENSITY / 2 * random.random())
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(volume.float() * factor + shift + noise)
        loss = segmentation_loss(logits, target[:, 0].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), protocol.gradient_clip)
        optimizer.step()
    network.eval()


def place_with_foreground(packed: Packed, labels: np.ndarray, case: int, random: np.random.Generator) -> list[int]:
    """Draw the first voxel of a crop, with foreground in it if a few tries find any."""
    start: list[int] = []
    for _ in range(TRIES):
        start = place(packed.sizes[case], packed.patch, random)
        box = tuple(slice(max(0, first), first + side) for first, side in zip(start, packed.patch, strict=True))
        if labels[box].any():
            break
    return start


@torch.no_grad()
def dice_of(packed: Packed, network: nn.Module, case: int) -> float:
    """Return the mean Dice over the classes of a case, from windows that overlap by half at least."""
    sizes, patch, device = packed.sizes[case], packed.patch, packed.volumes.device
    reference = packed.labels[case][tuple(slice(int(side)) for side in sizes)]
    shape = [max(int(voxels), side) for voxels, side in zip(sizes, patch, strict=True)]
    total = torch.zeros(packed.classes, *shape, device=device)
    for start in np.stack(np.meshgrid(*map(steps_along, shape, patch), indexing="ij"), axis=-1).reshape(-1, 3):
        volume, _ = cut(packed.volumes, packed, np.array([case]), start[None])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(volume.float())
        logits = (logits[0] if isinstance(logits, list) else logits)[0].float()
        total[(slice(None), *(slice(a, a + b) for a, b in zip(start, patch, strict=True)))] += logits.softmax(dim=0)
    found = total.argmax(dim=0)[tuple(slice(int(side)) for side in sizes)]
    present = [label for label in range(1, packed.classes) if (reference == label).any()]
    overlaps = [(found == label, reference == label) for label in present]
    return float(np.mean([2 * (a & b).sum().item() / (a.sum() + b.sum()).item() for a, b in overlaps]))


def steps_along(voxels: int, side: int) -> np.ndarray:
    """Return the first voxels of the windows along an axis."""
    count = math.ceil((voxels - side) / (side / 2)) + 1
    return np.linspace(0, voxels - side, count).round().astype(int)


if __name__ == "__main__":
    main()
