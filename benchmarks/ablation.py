"""What each choice is worth with few labels: networks side by side, pre-trained and from scratch, seed by seed.

For each seed some labelled cases are set apart for testing. Of the others a few are labelled, and all of them and the
unlabelled pool are what an encoder is pre-trained on. Each arm is fine-tuned on the same few cases with the same crops,
for the same number of steps and samples, and tested on cases that nothing has seen. Dice is the mean over cases of the
mean over classes. The probe asks the frozen encoder: how well a linear map of a token's vector, learned on the labelled
cases, finds each class's share of the token in the test cases (R2).

Every result is a line of the output file, and what is there already is not run again, so that days of one CPU core can
be given in pieces:

    python benchmarks/ablation.py -d 504 --arms benchmarks/ablation_arms.json --seeds 0 1 2 -o ablation_504.jsonl
    python benchmarks/ablation.py --table ablation_504.jsonl ablation_507.jsonl
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.tokenizer import padded, patchify
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import Plan, build_unet, load_plan
from nnunet_vit_mae.optimisation import parameter_groups, set_learning_rate, warmup_cosine
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.pretraining.crops import random_crop
from nnunet_vit_mae.pretraining.job import PretrainingRun
from nnunet_vit_mae.pretraining.run import run
from nnunet_vit_mae.pretraining.volumes import open_volume
from nnunet_vit_mae.settings import Finetuning, Settings

UNET = "unet"  # the arm of nnU-Net's U-Net alone
TRIES = 10  # for a crop with foreground
IGNORED = ("contrast_dropout", "loss", "augmentation")  # settings of fine-tuning
INTENSITY = 0.2  # standard deviation of the random factor and shift of a training crop


@dataclasses.dataclass(frozen=True)
class Split:
    """Cases by what they are for: names of labelled cases, files for pre-training."""

    labelled: list[str]
    tested: list[str]
    pretraining: list[Path]


def main() -> None:
    """Run what is missing, or print the table of results."""
    arguments = _parser().parse_args()
    if arguments.table:
        print_table([json.loads(line) for file in arguments.table for line in file.read_text().splitlines()])
        return
    torch.set_num_threads(1)
    plan = thin(load_plan(find_dataset(arguments.dataset), "nnUNetPlans", "3d_fullres"), arguments.unet_width)
    arms: Mapping[str, dict] = json.loads(arguments.arms.read_text())
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {(entry["arm"], entry["seed"], entry["steps"]) for entry in map(json.loads, lines)}
    for seed in arguments.seeds:
        split = split_of_seed(plan, seed, arguments.labelled, arguments.tested)
        for arm, steps in jobs(arms, arguments.pretraining_steps):
            if (arm, seed, steps) not in done:
                entry = measured(plan, arm, arms[arm], steps, seed, split, arguments.steps)
                with arguments.output.open("a") as stream:
                    stream.write(json.dumps({"dataset": plan.dataset.name, "arm": arm, "seed": seed} | entry) + "\n")
                print(entry, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset")
    parser.add_argument("-o", dest="output", type=Path, help="a line for each result")
    parser.add_argument("--arms", type=Path, help="arms by name, each a partial vit_mae block")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=10, help="cases of fine-tuning")
    parser.add_argument("--tested", type=int, default=30, help="labelled cases that nothing sees")
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--pretraining_steps", type=int, default=3000)
    parser.add_argument("--unet_width", type=int, default=8, help="features of the U-Net at full resolution")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results")
    return parser


def jobs(arms: Mapping[str, dict], pretraining_steps: int) -> Iterator[tuple[str, int]]:
    """Yield each arm from scratch and pre-trained; the U-Net has nothing to pre-train."""
    for arm in arms:
        yield arm, 0
        if arm != UNET:
            yield arm, pretraining_steps


def thin(plan: Plan, width: int) -> Plan:
    """Return the plan with a U-Net that has so many features at full resolution, at most eight times as many below."""
    plans = copy.deepcopy(plan.plans.plans)
    kwargs = plans["configurations"][plan.name]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [min(width << stage, 8 * width) for stage in range(kwargs["n_stages"])]
    return dataclasses.replace(plan, plans=PlansManager(plans))


def split_of_seed(plan: Plan, seed: int, labelled: int, tested: int) -> Split:
    """Draw the cases of a seed."""
    folder = plan.preprocessed_folder
    names = sorted(file.name[: -len("_seg.b2nd")] for file in folder.glob("*_seg.b2nd"))
    order = np.random.default_rng(seed).permutation(names).tolist()
    rest = order[tested:]
    pool = sorted(plan.unlabelled_folder.glob("*.b2nd")) if plan.unlabelled_folder.is_dir() else []
    return Split(rest[:labelled], order[:tested], [folder / f"{name}.b2nd" for name in sorted(rest)] + pool)


def measured(
    plan: Plan, arm: str, block: dict, steps: int, seed: int, split: Split, finetuning_steps: int
) -> dict[str, Any]:
    """Pre-train for so many steps, fine-tune and test."""
    started = time.process_time()
    settings = plan.settings.updated(block)
    refuse_ignored(arm, settings.finetuning)
    loss, encoder = pretrained(plan, settings, steps, seed, split) if steps else (math.nan, None)
    torch.manual_seed(seed)
    network: nn.Module
    if arm == UNET:
        network, probe = build_unet(plan), math.nan
    else:
        network = build_segmenter(
            settings.network,
            len(plan.channel_names),
            plan.classes,
            drop_path=settings.finetuning.drop_path,
            spacing=tuple(plan.configuration.spacing),
            unet=lambda: build_unet(plan),
        )
        if encoder is not None:
            network.encoder.load_state_dict(encoder)
        probe = probe_of(plan, network.encoder, settings, split)
    finetune(plan, network, settings, split, seed, finetuning_steps, pretrained=encoder is not None)
    dice = [dice_of(plan, network, name) for name in split.tested]
    return {
        "steps": steps,
        "loss": loss,
        "probe": probe,
        "dice": float(np.mean(dice)),
        "cpu_seconds": round(time.process_time() - started),
    }


def refuse_ignored(arm: str, protocol: Finetuning) -> None:
    """Raise `UserError` for a choice that makes no difference here: two arms would only seem to differ in it."""
    for name in IGNORED:
        if getattr(protocol, name) != getattr(Finetuning(), name):
            raise UserError(f"The arm {arm} sets finetuning.{name}, which this benchmark does not read: leave it out.")


def pretrained(plan: Plan, settings: Settings, steps: int, seed: int, split: Split) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of the last twentieth of a pre-training, and its encoder."""
    epochs = max(1, round(steps * settings.pretraining.batch_size / len(split.pretraining)))
    job = PretrainingRun(
        files=split.pretraining,
        channel_names=plan.channel_names,
        patch_size=plan.patch_size,
        spacing=tuple(plan.configuration.spacing),
        network=settings.network,
        protocol=dataclasses.replace(settings.pretraining, epochs=epochs, seed=seed),
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run(job, Path(folder), device=torch.device("cpu"), resume=False)
    last = result.losses[-max(1, len(result.losses) // 20) :]
    return float(np.mean(last)), result.network.encoder.state_dict()


def finetune(
    plan: Plan, network: nn.Module, settings: Settings, split: Split, seed: int, steps: int, *, pretrained: bool
) -> None:
    """Train on the labelled cases as the settings say, but for the number of steps.

    `freeze_epochs` counts as its share of the `epochs`.
    """
    protocol, random = settings.finetuning, np.random.default_rng(seed)
    frozen = steps * protocol.freeze_epochs / protocol.epochs if pretrained else 0
    groups = parameter_groups(
        network.named_parameters(),
        weight_decay=protocol.weight_decay,
        layer_decay=protocol.layer_decay if pretrained else 1.0,
        depth=SIZES[settings.network.size].depth,
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    network.train()
    for step in range(steps):
        rate = protocol.lr * warmup_cosine((step + 1) / (steps + 1), protocol.warmup)
        set_learning_rate(optimizer, rate, freeze_pretrained=step < frozen)
        batch = [labelled_crop(plan, random.choice(split.labelled), random) for _ in range(protocol.batch_size)]
        volume, target = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
        loss = segmentation_loss(network(volume), target[:, 0].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), protocol.gradient_clip)
        optimizer.step()
    network.eval()


def labelled_crop(plan: Plan, name: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return image (c z y x) and labels (1 z y x) of a crop, with foreground if a few tries find any."""
    image, reference = volume_of(plan, name), labels_of(plan, name)
    for _ in range(TRIES):
        place = random.integers(2**62)
        labels = random_crop(reference, plan.patch_size, np.random.default_rng(place))[0].clip(min=0)
        if labels.any():
            break
    crop = random_crop(image, plan.patch_size, np.random.default_rng(place))[0]
    factor, shift = random.normal(1, INTENSITY), random.normal(0, INTENSITY)
    noise = random.normal(0, INTENSITY / 2 * random.random(), crop.shape)
    return (crop * factor + shift + noise).astype(np.float32), labels


def probe_of(plan: Plan, encoder: nn.Module, settings: Settings, split: Split) -> float:
    """Return R2 on the test cases, mean over classes, of a linear map from a token to each class's share of it."""
    encoder.eval()
    seen, unseen = (
        [
            np.concatenate(parts)
            for parts in zip(*(tokens_of(plan, encoder, settings, name) for name in names), strict=True)
        ]
        for names in (split.labelled, split.tested)
    )
    probe = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 5, 11))).fit(*seen)
    return float(r2_score(unseen[1], probe.predict(unseen[0])))


@torch.no_grad()
def tokens_of(plan: Plan, encoder: nn.Module, settings: Settings, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of all tokens of a case (n d), and the share of each foreground class in them (n classes)."""
    image = torch.from_numpy(volume_of(plan, name))[None]
    labels = torch.from_numpy(labels_of(plan, name))
    classes = torch.arange(1, plan.classes)[:, None, None, None]
    shares = patchify(padded((labels == classes)[None].float(), settings.network.token), settings.network.token)
    return encoder.encode(image, ()).tokens[0].numpy(), shares.mean(dim=3)[0].numpy()


@torch.no_grad()
def dice_of(plan: Plan, network: nn.Module, name: str) -> float:
    """Return the mean Dice over the classes that the reference holds."""
    reference = labels_of(plan, name)[0]

    def predict(window: Tensor) -> Tensor:
        logits = network(window)
        return logits[0] if isinstance(logits, list) else logits

    image = torch.from_numpy(volume_of(plan, name))[None]
    found = sliding_window_inference(image, plan.patch_size, 1, predict, overlap=0.5, mode="gaussian")
    found = found.argmax(dim=1)[0].numpy()
    overlaps = [(found == label, reference == label) for label in np.unique(reference[reference > 0])]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in overlaps]))


def volume_of(plan: Plan, name: str) -> np.ndarray:
    """Read a preprocessed image (c z y x)."""
    return open_volume(plan.preprocessed_folder / f"{name}.b2nd")[:].astype(np.float32)


def labels_of(plan: Plan, name: str) -> np.ndarray:
    """Read preprocessed labels (1 z y x)."""
    return open_volume(plan.preprocessed_folder / f"{name}_seg.b2nd")[:]


def print_table(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each dataset and arm, with the Dice of every seed."""
    found: dict[tuple[str, str, bool], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for entry in entries:
        found[entry["dataset"], entry["arm"], entry["steps"] > 0][entry["seed"]] = entry
    print("| dataset | arm | loss | probe, scratch and pre-trained | scratch | pre-trained | difference |")
    print("|---|---|---|---|---|---|---|")
    for dataset, arm in dict.fromkeys((dataset, arm) for dataset, arm, _ in found):
        scratch, trained = (found.get((dataset, arm, steps), {}) for steps in (False, True))
        paired = [trained[seed]["dice"] - scratch[seed]["dice"] for seed in scratch if seed in trained]
        cells = [
            dataset,
            arm,
            _mean(trained, "loss"),
            f"{_mean(scratch, 'probe')} {_mean(trained, 'probe')}",
            _seeds(scratch),
            _seeds(trained),
            f"{np.mean(paired):+.3f}" if paired else "",
        ]
        print(f"| {' | '.join(cells)} |")


def _mean(entries: Mapping[int, Mapping[str, Any]], key: str) -> str:
    values = [entry[key] for entry in entries.values() if math.isfinite(entry[key])]
    return f"{np.mean(values):.3f}" if values else ""


def _seeds(entries: Mapping[int, Mapping[str, Any]]) -> str:
    values = [entries[seed]["dice"] for seed in sorted(entries)]
    return f"{np.mean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})" if values else ""


if __name__ == "__main__":
    main()
