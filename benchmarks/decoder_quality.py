"""What the options of the pre-training decoder cost in quality, paired by seed: fine-tuned Dice and a linear probe.

For each seed (fold: the seed modulo 5) and option an encoder is pre-trained on the fold's training cases and the
unlabelled pool, for the same number of epochs and, with `--same_time`, again for the time that the first option took.
Each is fine-tuned on the same few labelled cases with the same crops, and tested on the fold's validation cases, which
nothing has seen. Dice is the mean over cases of the mean over classes. Fine-tuning has no augmentation but random
crops: so few steps as a CPU can take do not suffice to learn what a flipped front looks like. The probe asks the
encoder as it is, which tells encoders apart after fewer steps: how well a linear map of a token's vector, learned on
the labelled cases, finds each class's share of the token in the validation cases.

    python benchmarks/decoder_quality.py -d 504 -p PLANS --epochs 200 --seeds 0 1 2 3 4 -o FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from pretraining_decoder import OPTIONS
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.folds import pretraining_cases, split_of
from nnunet_vit_mae.nnunet.plans import Plan, load_plan
from nnunet_vit_mae.optimisation import parameter_groups, set_learning_rate, warmup_cosine
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.pretraining.crops import random_crop
from nnunet_vit_mae.pretraining.run import PretrainingRun, run
from nnunet_vit_mae.pretraining.volumes import open_volume

CANDIDATES = [
    "plain",
    "a quarter rebuilt, 4 heads",
    "cross",
    "cross, a quarter rebuilt",
    "cross, a quarter rebuilt, background tokens left out",
]
TRIES = 10  # for a crop with foreground


def main() -> None:
    """Print the table; a line for each run comes before it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("-o", dest="output", type=Path, required=True, help="for what pre-training writes")
    parser.add_argument("--epochs", type=int, default=200, help="of pre-training in the same steps")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--labelled", type=int, default=10, help="cases of fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--same_time", action="store_true", help="pre-train again for as long as the first option took")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=CANDIDATES, metavar="NAME")
    parser.add_argument("-device", type=torch.device, default="cpu")
    parser.add_argument("-np", dest="readers", type=int, default=0, help="processes that read crops of pre-training")
    arguments = parser.parse_args()
    plan = load_plan(find_dataset(arguments.dataset), arguments.plans, arguments.configuration)

    ratios, found = defaultdict(list), defaultdict(list)
    for seed in arguments.seeds:
        found["no pre-training", "steps"].append(measured(plan, None, seed, arguments))
        print(f"seed {seed}, no pre-training: {found['no pre-training', 'steps'][-1]}", flush=True)
        first_speed = None
        for name in arguments.options:
            encoder, speed = pretrained(plan, name, arguments.epochs, seed, arguments)
            first_speed = first_speed or speed
            ratios[name].append(first_speed / speed)
            found[name, "steps"].append(measured(plan, encoder, seed, arguments))
            said = f"time {ratios[name][-1]:.2f}, {found[name, 'steps'][-1]}"
            if arguments.same_time and speed != first_speed:
                encoder, _ = pretrained(plan, name, round(arguments.epochs * speed / first_speed), seed, arguments)
                found[name, "time"].append(measured(plan, encoder, seed, arguments))
                said += f", in the same time {found[name, 'time'][-1]}"
            print(f"seed {seed}, {name}: {said}", flush=True)

    first = arguments.options[0]
    print(f"\n| decoder | pre-trained for | time | Dice | against {first} | probe | against {first} |")
    print("|---|---|---|---|---|---|---|")
    for (name, kind), values in found.items():
        time = "" if name not in ratios else "1.00" if kind == "time" else f"{np.median(ratios[name]):.2f}"
        cells = [
            f"{np.mean(own):.3f} | {against(reference, own)}"
            for reference, own in zip(zip(*found[first, "steps"], strict=True), zip(*values, strict=True), strict=True)
        ]
        print(f"| {name} | {f'the same {kind}' if name in ratios else ''} | {time} | {' | '.join(cells)} |")


class Quality(NamedTuple):
    """What an encoder is worth for a segmentation."""

    dice: float  # after fine-tuning
    probe: float  # of the frozen encoder

    def __str__(self) -> str:
        return f"Dice {self.dice:.4f}, probe {self.probe:.4f}"


def measured(plan: Plan, encoder: nn.Module | None, seed: int, arguments: argparse.Namespace) -> Quality:
    """Return both measures on the validation cases of the seed's fold; without an encoder, of a new one."""
    names = sorted(file.name[: -len("_seg.b2nd")] for file in plan.preprocessed_folder.glob("*_seg.b2nd"))
    split = split_of(plan, str(seed % 5), names)
    labelled = np.random.default_rng(seed).permutation(split["train"])[: arguments.labelled]
    torch.manual_seed(seed)
    settings = plan.settings
    drop_path = settings.finetuning.drop_path
    model = build_segmenter(settings.network, len(plan.channel_names), plan.classes, drop_path=drop_path)
    model.to(arguments.device)
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    probe = probe_of(plan, model.encoder, labelled, split["val"], arguments.device)
    finetune(plan, model, labelled, seed, arguments, layer_decay=settings.finetuning.layer_decay if encoder else 1.0)
    return Quality(float(np.mean([dice_of(plan, model, name, arguments.device) for name in split["val"]])), probe)


def against(reference: Sequence[float], own: Sequence[float]) -> str:
    """Return the mean, the lowest and the highest of the paired differences."""
    differences = np.subtract(own, reference)
    return f"{differences.mean():+.3f} ({differences.min():+.3f} to {differences.max():+.3f})"


def pretrained(plan: Plan, name: str, epochs: int, seed: int, arguments: argparse.Namespace) -> tuple[nn.Module, float]:
    """Return an encoder and the median over the epochs of the samples per second of its pre-training."""
    settings = plan.settings
    job = PretrainingRun(
        files=[case.file for case in pretraining_cases(plan, str(seed % 5))],
        channel_names=plan.channel_names,
        patch_size=plan.patch_size,
        spacing=tuple(plan.configuration.spacing),
        network=settings.network,
        protocol=dataclasses.replace(settings.pretraining, epochs=epochs, **OPTIONS[name]),
        seed=seed,
    )
    output = arguments.output / f"{name} {epochs} {seed}".replace(", ", "_").replace(" ", "_")
    network = run(job, output, device=arguments.device, resume=False, readers=arguments.readers).network
    speeds = re.findall(r"([\d.]+) samples/s", (output / "log.txt").read_text())
    return network.encoder, statistics.median(map(float, speeds))


def finetune(
    plan: Plan,
    model: nn.Module,
    labelled: Sequence[str],
    seed: int,
    arguments: argparse.Namespace,
    *,
    layer_decay: float,
) -> None:
    """Train on the labelled cases, as the plans say but for the number of steps."""
    protocol, random = plan.settings.finetuning, np.random.default_rng(seed)
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=protocol.weight_decay,
        layer_decay=layer_decay,
        depth=SIZES[plan.settings.network.size].depth,
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    model.train()
    for step in range(arguments.steps):
        set_learning_rate(optimizer, protocol.lr * warmup_cosine((step + 1) / (arguments.steps + 1), protocol.warmup))
        batch = [labelled_crop(plan, random.choice(labelled), random) for _ in range(protocol.batch_size)]
        volume, target = (torch.from_numpy(np.stack(p)).to(arguments.device) for p in zip(*batch, strict=True))
        loss = segmentation_loss(model(volume), target[:, 0].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), protocol.gradient_clip)
        optimizer.step()
    model.eval()


def probe_of(plan: Plan, encoder: nn.Module, labelled: Sequence[str], tested: Sequence[str], device: str) -> float:
    """Return R2 on the tested cases, mean over classes, of a linear map from a token's vector to each class's share."""
    encoder.eval()
    seen, unseen = (
        [
            np.concatenate(parts)
            for parts in zip(*(tokens_of(plan, encoder, name, device) for name in names), strict=True)
        ]
        for names in (labelled, tested)
    )
    probe = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 5, 11))).fit(*seen)
    return float(r2_score(unseen[1], probe.predict(unseen[0])))


@torch.no_grad()
def tokens_of(plan: Plan, encoder: nn.Module, name: str, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of all tokens of a case (n d) and the share of each class in them (n classes - 1)."""
    image = torch.from_numpy(open_volume(plan.preprocessed_folder / f"{name}.b2nd")[:])[None].to(device)
    labels = torch.from_numpy(open_volume(labels_of(plan, name))[:])
    classes = torch.arange(1, plan.classes)[:, None, None, None]
    shares = patchify((labels == classes)[None].float(), plan.settings.network.token).mean(dim=3)
    return encoder.encode(image, ()).tokens[0].cpu().numpy(), shares[0].numpy()


def labelled_crop(plan: Plan, name: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return image (c z y x) and labels (1 z y x) of a crop, with foreground if a few tries find any."""
    image, reference = open_volume(plan.preprocessed_folder / f"{name}.b2nd"), open_volume(labels_of(plan, name))
    for _ in range(TRIES):
        place = random.integers(2**62)
        labels = random_crop(reference, plan.patch_size, np.random.default_rng(place)).clip(min=0)
        if labels.any():
            break
    return random_crop(image, plan.patch_size, np.random.default_rng(place)), labels


@torch.no_grad()
def dice_of(plan: Plan, model: nn.Module, name: str, device: torch.device) -> float:
    """Return the mean Dice over the classes that the reference segmentation holds."""
    image = torch.from_numpy(open_volume(plan.preprocessed_folder / f"{name}.b2nd")[:])[None].float().to(device)
    reference = open_volume(labels_of(plan, name))[0]
    logits = sliding_window_inference(image, plan.patch_size, 4, model, overlap=0.5, mode="gaussian")
    found = logits.argmax(dim=1)[0].cpu().numpy()
    overlaps = [(found == label, reference == label) for label in np.unique(reference[reference > 0])]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in overlaps]))


def labels_of(plan: Plan, name: str) -> Path:
    """Return the file of nnU-Net's preprocessed labels."""
    return plan.preprocessed_folder / f"{name}_seg.b2nd"


if __name__ == "__main__":
    main()
