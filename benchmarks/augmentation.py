"""nnU-Net's augmentation, one sample after another, against ours, a batch at once: the same distributions? how fast?

The first table applies each transform always, many times, to the same volume, and compares two statistics of what comes
out by the Kolmogorov-Smirnov test. The second one takes steps of both in turn. On a machine with a GPU ours runs there.

    python benchmarks/augmentation.py      # prints the tables of docs/speed.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from measuring import taken_in_turn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp
from torch import Tensor

from nnunet_vit_mae.nnunet.augmentation import BatchAugmentation

ROTATION = (-np.pi / 6, np.pi / 6)
ENLARGED = 1.6  # a side of what nnU-Net's loader cuts, by a side of the patch
STATISTICS: dict[str, Callable[[Tensor], float]] = {
    "standard deviation": lambda volume: float(volume.std()),
    "roughness": lambda volume: float(volume.diff(dim=-1).abs().mean()),
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=48, help="of the cubic patch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image, segmentation = volumes(arguments.side)
    print(f"{arguments.side}^3 patch, {arguments.draws} draws of each.\n")
    print("| transform | statistic | nnU-Net, mean | ours, mean | p |\n|---|---|---|---|---|")
    for name, transform in transforms(arguments.side):
        compare(name, transform, image, segmentation, arguments, device)
    print(f"\nAll of them, batch {arguments.batch}, ours on {device}:\n")
    print("| | ms per sample |\n|---|---|")
    for name, milliseconds in times(image, segmentation, arguments, device).items():
        print(f"| {name} | {milliseconds:.1f} |")


def volumes(side: int) -> tuple[Tensor, Tensor]:
    """Return an enlarged patch and its labels, as nnU-Net's loader gives them."""
    shape = [round(side * ENLARGED)] * 3
    random = np.random.default_rng(0)
    image = gaussian_filter(random.normal(size=shape), 2) * 8
    labels = np.digitize(gaussian_filter(random.normal(size=shape), 3), [0.02, 0.06])
    return torch.from_numpy(image).float()[None], torch.from_numpy(labels).to(torch.int16)[None]


def nnunets(side: int) -> ComposeTransforms:
    """Return the transforms that nnU-Net trains 3d_fullres with."""
    return nnUNetTrainer.get_training_transforms((side,) * 3, ROTATION, None, (0, 1, 2), do_dummy_2d_data_aug=False)


def transforms(side: int) -> list[tuple[str, ComposeTransforms]]:
    """Return each transform that changes intensities or places, alone and always applied, after nnU-Net's crop."""
    spatial, *others = nnunets(side).transforms
    crop = nnunets(side).transforms[0]
    crop.p_rotation = crop.p_scaling = 0
    spatial.p_rotation = spatial.p_scaling = 1
    alone = [("SpatialTransform", ComposeTransforms([spatial]))]
    for one in others:
        if isinstance(one, RandomTransform):
            inverted = ", inverted" if getattr(one.transform, "p_invert_image", 0) else ""
            alone.append((type(one.transform).__name__ + inverted, ComposeTransforms([crop, one.transform])))
    return alone


def compare(
    name: str,
    transform: ComposeTransforms,
    image: Tensor,
    segmentation: Tensor,
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    """Print a row for each statistic."""
    ours = BatchAugmentation(transform, (0, 1, 2), contrast_dropout=0)
    batch = [one[None].repeat(arguments.batch, 1, 1, 1, 1).to(device) for one in (image, segmentation)]
    found = [sample for _ in range(arguments.draws // arguments.batch) for sample in ours(*map(torch.clone, batch))[0]]
    expected = [
        transform(image=image.clone(), segmentation=segmentation.clone())["image"] for _ in range(arguments.draws)
    ]
    for statistic, of in STATISTICS.items():
        theirs, mine = [of(one) for one in expected], [of(one) for one in found]
        p = ks_2samp(theirs, mine).pvalue
        print(f"| {name} | {statistic} | {np.mean(theirs):.4f} | {np.mean(mine):.4f} | {p:.2f} |", flush=True)


def times(image: Tensor, segmentation: Tensor, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the mean time of a sample; a median would miss the few samples that are changed a lot."""
    transform = nnunets(arguments.side)
    ours = BatchAugmentation(transform, (0, 1, 2), contrast_dropout=0)
    batch = [one[None].repeat(arguments.batch, 1, 1, 1, 1) for one in (image, segmentation)]

    def one_by_one() -> None:
        for _ in range(arguments.batch):
            transform(image=image.clone(), segmentation=segmentation.clone())

    def at_once() -> None:
        ours(*(one.clone().to(device) for one in batch))

    taken = taken_in_turn({"nnU-Net, one CPU process": one_by_one, "ours": at_once}, arguments.rounds)
    return {name: 1000 * statistics.fmean(seconds) / arguments.batch for name, seconds in taken.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
