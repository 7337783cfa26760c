"""What each choice is worth with few labels: networks side by side, pre-trained and from scratch, seed by seed.

For each seed some labelled cases are set apart for testing. Of the others a few are labelled, and all of them and the
unlabelled pool are what an encoder is pre-trained on; arms with equal encoders share one. Each arm is fine-tuned on the
same few cases with the same crops, for the same number of steps and samples, and tested on cases that nothing has seen.
An arm without a network is nnU-Net's own U-Net, which learns by AdamW as the others do, or, with `"optimizer": "SGD"`,
as nnU-Net trains it: with its initial weights, rates and weights of resolutions. An arm with `members` is their
ensemble: the mean of their probabilities. What arms have in common is written once, under `common`. Dice is the mean
over cases of the mean over classes; the error of volumes is the mean absolute difference as a share of a class's mean
volume; the share of right risk groups is that of the test cases whose volume lies between the same quartiles as their
reference's. All three are measured again with thresholds that are fitted, as `mae3d_calibrate` does, to further
labelled cases; their images are in the pool of pre-training, their labels serve these thresholds and the quartiles
alone. The probe asks the frozen encoder: how well a linear map of a token's vector, learned on the labelled cases,
finds each class's share of the token in the test cases (R2).

Volumes stay in the memory of the device, and a GPU repeats its steps as CUDA graphs. Every result is a line of the
output file, and what is there already is not run again, so that days of one CPU core, or minutes of a GPU, can be given
in pieces:

    python benchmarks/ablation.py --pack 504 -o 504.npz
    python benchmarks/ablation.py 504.npz --arms benchmarks/ablation_arms.json --device cpu --unet_width 8 -o 504.jsonl
    python benchmarks/ablation.py --table 504.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphs import Repeated
from packed import Packed, covered, crops, cut, pack, place_with_foreground, unpack
from quality import Predicted, fitted_shifts, mean_of, predict, quality_of, risk_cutoffs
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking, Masks, background_tokens
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.networks.segmenter import Segmenter, prior_logits, start_from
from nnunet_vit_mae.networks.tokenizer import padded, patchify
from nnunet_vit_mae.optimisation import parameter_groups, set_learning_rate, warmup_cosine
from nnunet_vit_mae.presets import AXES, SIZES
from nnunet_vit_mae.settings import Finetuning, Pretraining, Settings, token_grid

NO_SETTINGS = ("optimizer", "seed", "members")  # entries of an arm beside those of a vit_mae block
OPTIMIZERS = ("AdamW", "SGD")  # SGD is the U-Net's
IGNORED = ("contrast_dropout", "loss", "augmentation", "freeze_epochs")  # settings of fine-tuning
ANY_DECODER = {"decoder": "mae", "decoder_width": 0, "taps": (), "upsampling": "nearest", "upscale_convolutions": 1}
INTENSITY = 0.2  # standard deviation of the random factor and shift of a training crop
WIDEST = 10  # features of the U-Net's deepest stages, relative to the first: 320 and 32 in nnU-Net
MEASURES = {  # that are shown as means, and their columns
    "loss": "its loss",
    "probe": "probe",
    "calibrated_dice": "calibrated Dice",
    "volume_error": "error of volumes",
    "calibrated_volume_error": "calibrated error",
    "risk_groups": "right risk groups",
    "calibrated_risk_groups": "calibrated groups",
}
SHAPES = 32  # that batches on a GPU can have in each kind of tokens: each is a CUDA graph of its own
PRETRAINED_OTHERWISE = ", pre-training "  # begins the end of an arm's name that makes no difference from random weights
SHRINKAGE = 0.01  # of the probe's weights, relative to the variance of what they weigh


Encoders = dict[str, tuple[float, dict[str, Tensor]]]  # the loss and the weights, by what pre-training depends on


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network and how it learns, or an ensemble of other arms."""

    settings: Settings
    has_vit: bool  # if not, the network is nnU-Net's U-Net
    optimizer: str
    seed: int  # added to that of the run
    members: tuple[str, ...]  # of an ensemble


@dataclasses.dataclass(frozen=True)
class Descent:
    """An optimizer, its rate at a share (0 to 1) of the steps, the largest norm of its gradients, and the loss."""

    optimizer: torch.optim.Optimizer
    rate: Callable[[float], float]
    clip: float
    loss: Callable[[Any, Tensor], Tensor] = segmentation_loss

    def step(self, network: nn.Module, loss: Tensor, done: float) -> None:
        """Take a step when the share `done` of all steps is done."""
        set_learning_rate(self.optimizer, self.rate(done))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        self.optimizer.step()


@dataclasses.dataclass(frozen=True)
class Split:
    """Numbers of cases by what they are for."""

    labelled: list[int]
    development: list[int]  # for the thresholds
    tested: list[int]
    pretraining: list[int]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The loss of pre-training, the probe, and the predicted cases of development and test."""

    loss: float
    probe: float
    predicted: tuple[list[Predicted], list[Predicted]]


def main() -> None:
    """Pack a dataset, run what is missing, or print the table of results."""
    arguments = _parser().parse_args()
    if arguments.table:
        print_table([json.loads(line) for file in arguments.table for line in file.read_text().splitlines()])
    elif arguments.pack:
        pack(arguments.pack, arguments.output)
    else:
        run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, nargs="?", help="a dataset that --pack wrote")
    parser.add_argument("--pack", metavar="ID", help="write this dataset's preprocessed volumes to -o")
    parser.add_argument("-o", dest="output", type=Path, help="a line for each result")
    parser.add_argument("--arms", type=Path, help="arms by name, each a partial vit_mae block (see ablation_arms.json)")
    parser.add_argument("--only", metavar="ARM", nargs="+", help="run these arms of the file (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=10, help="cases of fine-tuning")
    parser.add_argument(
        "--development", type=int, default=10, help="further labelled cases that thresholds are fitted to"
    )
    parser.add_argument("--tested", type=int, default=20, help="labelled cases that nothing sees")
    parser.add_argument("--steps", type=int, default=400, help="of fine-tuning")
    parser.add_argument(
        "--pretraining_steps", type=int, nargs="+", default=[0, 6000], help="one or more lengths; 0: random weights"
    )
    parser.add_argument(
        "--one_encoder", action="store_true", help="pre-train once, on the images that none of the seeds is tested on"
    )
    parser.add_argument("--unet_width", type=int, default=32, help="features of the U-Net at full resolution")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run what the output file lacks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # as nnU-Net
    torch.set_num_threads(1)
    packed = unpack(arguments.packed, torch.device(arguments.device))
    arms = read_arms(arguments.arms)
    if unknown := [name for name in arguments.only or () if name not in arms]:
        raise UserError(f"{arguments.arms} has no arm {unknown[0]!r}: check --only.")
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {(entry["arm"], entry["seed"], entry["steps"]) for entry in map(json.loads, lines)}
    splits = {seed: split_of(packed, seed, arguments) for seed in arguments.seeds}
    if arguments.one_encoder:
        tested = {case for split in splits.values() for case in split.tested}
        seen = [case for case in range(len(packed.volumes)) if case not in tested]
        splits = {seed: dataclasses.replace(split, pretraining=seen) for seed, split in splits.items()}
    encoders: Encoders = {}
    for seed, split in splits.items():
        encoders = encoders if arguments.one_encoder else {}
        for entry in results(packed, arms, seed, split, encoders, arguments, done):
            with arguments.output.open("a") as stream:
                stream.write(json.dumps({"dataset": packed.name, "seed": seed} | entry) + "\n")
            print(entry, flush=True)


def read_arms(file: Path) -> dict[str, Arm]:
    """Read the arms of a file.

    Raises `UserError` for a setting that this benchmark does not read, and for an optimiser that the arm would not be
    trained with.
    """
    content = json.loads(file.read_text())
    common = Settings.from_dict(content.get("common", {}))
    return {name: arm_of(name, entry, common) for name, entry in content["arms"].items()}


def arm_of(name: str, entry: Mapping[str, Any], common: Settings) -> Arm:
    """Return an arm, given its entry in a file and what all arms have in common (same errors as `read_arms`)."""
    settings = common.updated({key: part for key, part in entry.items() if key not in NO_SETTINGS})
    for setting in IGNORED:
        if getattr(settings.finetuning, setting) != getattr(Finetuning(), setting):
            raise UserError(
                f"The arm {name} sets finetuning.{setting}, which this benchmark does not read: leave it out."
            )
    optimizer = entry.get("optimizer", "AdamW")
    if optimizer not in OPTIMIZERS or (optimizer == "SGD" and "network" in entry):
        raise UserError(
            f"The arm {name} has the optimiser {optimizer}: choose AdamW, or SGD for a U-Net without a network."
        )
    return Arm(settings, "network" in entry, optimizer, entry.get("seed", 0), tuple(entry.get("members", ())))


def split_of(packed: Packed, seed: int, arguments: argparse.Namespace) -> Split:
    """Draw the cases of a seed."""
    order = np.random.default_rng(seed).permutation(len(packed.labels)).tolist()
    rest = order[arguments.tested :]
    pool = range(len(packed.labels), len(packed.volumes))
    development = rest[arguments.labelled :][: arguments.development]
    return Split(rest[: arguments.labelled], development, order[: arguments.tested], [*sorted(rest), *pool])


def results(
    packed: Packed,
    arms: Mapping[str, Arm],
    seed: int,
    split: Split,
    encoders: Encoders,
    arguments: argparse.Namespace,
    done: set,
) -> Iterator[dict[str, Any]]:
    """Yield the results of a seed that are not there yet; encoders that it needs and finds are not trained again.

    Members of ensembles are, if an earlier run trained them, for their predictions are not kept.
    """
    chosen = {name: arms[name] for name in arguments.only or arms}
    shared = {member for arm in chosen.values() for member in arm.members}
    outcomes: dict[tuple[str, int], Outcome] = {}
    for steps in dict.fromkeys(arguments.pretraining_steps):
        for name, arm in chosen.items():
            members = arm.members or (name,)
            if (name, seed, steps) in done or (steps and not any(arms[member].has_vit for member in members)):
                continue
            started = time.monotonic()
            keys = [(member, steps if arms[member].has_vit else 0) for member in members]
            for key in keys:
                if key not in outcomes:
                    member, own_steps = key
                    outcomes[key] = trained(packed, arms[member], own_steps, seed, split, encoders, arguments)
            parts = [outcomes[key] for key in keys]
            if name not in shared:
                outcomes.pop((name, steps), None)
            cases = zip(*[part.predicted for part in parts], strict=True)
            yield {
                "arm": name,
                "steps": steps,
                "loss": parts[0].loss if len(parts) == 1 else math.nan,
                "probe": parts[0].probe if len(parts) == 1 else math.nan,
                **measured(packed.classes, *map(mean_of, cases)),
                "seconds": round(time.monotonic() - started, 1),
            }


def trained(
    packed: Packed,
    arm: Arm,
    steps: int,
    seed: int,
    split: Split,
    encoders: Encoders,
    arguments: argparse.Namespace,
) -> Outcome:
    """Train an arm, after so many steps of pre-training, and predict the cases of development and test."""
    settings, loss, encoder = arm.settings, math.nan, None
    if steps:
        key = f"{dataclasses.replace(settings.network, **ANY_DECODER)} {settings.pretraining} {steps}"
        if key not in encoders:
            encoders[key] = pretrained(packed, settings, steps, seed, split)
        loss, encoder = encoders[key]
    own_seed = seed + arm.seed
    torch.manual_seed(own_seed)
    network, probe = build(packed, arm, encoder, arguments.unet_width), math.nan
    if isinstance(network, Segmenter):
        probe = probe_of(packed, network.encoder, settings, split)
    descent = descent_of(network, arm, pretrained=encoder is not None)
    finetune(packed, network, descent, settings.finetuning, split, own_seed, arguments.steps)
    development, tested = (
        [predict(packed, lambda volume: _finest(_logits(network, volume)), case) for case in cases]
        for cases in (split.development, split.tested)
    )
    return Outcome(loss, probe, (development, tested))


def measured(classes: int, development: Sequence[Predicted], tested: Sequence[Predicted]) -> dict[str, float]:
    """Return Dice, the error of volumes and right risk groups of the test cases, as trained and calibrated."""
    cutoffs = risk_cutoffs(development, classes)
    plain = quality_of(tested, [0.0] * (classes - 1), cutoffs)
    calibrated = quality_of(tested, fitted_shifts(development, classes), cutoffs)
    shown = dataclasses.asdict(plain)
    return shown | {f"calibrated_{name}": value for name, value in dataclasses.asdict(calibrated).items()}


def build(packed: Packed, arm: Arm, encoder: dict[str, Tensor] | None, unet_width: int) -> nn.Module:
    """Build an arm's network on the device."""
    settings = arm.settings
    prior = settings.finetuning.foreground_prior
    logits = prior_logits(packed.classes, prior, regions=False) if prior else None
    if not arm.has_vit:
        network = unet(packed, unet_width)
        if arm.optimizer == "SGD":
            network.apply(network.initialize)
        elif logits:
            start_from(network.decoder.seg_layers, logits)
        return network.to(packed.device)
    network = build_segmenter(
        settings.network,
        1,
        packed.classes,
        drop_path=settings.finetuning.drop_path,
        unet=lambda: unet(packed, unet_width),
    )
    if encoder is not None:
        network.encoder.load_state_dict(encoder)
    if logits:
        start_from(network.decoder.heads, logits)
    return network.to(packed.device)


def unet(packed: Packed, width: int) -> nn.Module:
    """Build the U-Net that nnU-Net plans, of this width at full resolution, with outputs at all resolutions."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(packed.strides)
    features = [min(width << stage, WIDEST * width) for stage in range(stages)]
    return PlainConvUNet(
        1, stages, features, nn.Conv3d, 3, packed.strides, 2, packed.classes, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def pretrained(
    packed: Packed, settings: Settings, steps: int, seed: int, split: Split
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of the last twentieth of a pre-training, and its encoder."""
    protocol, device = settings.pretraining, packed.device
    torch.manual_seed(seed)
    random, network = np.random.default_rng((seed, 1)), build_autoencoder(settings.network, 1, protocol).to(device)
    groups = parameter_groups(network.named_parameters(), weight_decay=protocol.weight_decay)
    descent = _adamw(groups, protocol, betas=(0.9, 0.95))
    masking = Masking(mask_ratio=protocol.mask_ratio, rebuilt_share=protocol.rebuilt_share)
    tokens = math.prod(token_grid(packed.patch, settings.network.token))
    mirrored = axes_of(protocol.mirroring)
    loss_of = Repeated(Rebuilding(network, norm_pix=protocol.norm_pix), device)
    losses = []
    for step in range(steps):
        cases = random.choice(split.pretraining, protocol.batch_size)
        volume, inside = crops(packed, cases, random)
        for axis in mirrored:
            if random.random() < 0.5:
                volume = volume.flip(axis)
                inside[axis - 2] = inside[axis - 2][:, ::-1]
        noise = torch.from_numpy(random.random((len(cases), tokens), dtype=np.float32))
        taking_part = covered(inside, settings.network.token)
        if protocol.skip_background:
            taking_part &= ~background_tokens(volume, settings.network.token).cpu()
        masks = masking.rounds(masking.draw(noise, taking_part))[0]  # on the host, as in the product
        if device.type == "cuda":
            masks = in_few_shapes(masks, max(1, tokens // SHAPES))
        loss = loss_of(volume, *masks.to(device))
        descent.step(network, loss, (step + 1) / (steps + 1))
        losses.append(loss.detach().clone())  # the next repetition of a graph overwrites what it has returned
    return float(torch.stack(losses[-max(1, steps // 20) :]).mean()), network.encoder.state_dict()


class Rebuilding(nn.Module):
    """An autoencoder with its loss; its arguments are tensors."""

    def __init__(self, network: nn.Module, *, norm_pix: bool):
        super().__init__()
        self.network, self.norm_pix = network, norm_pix

    def forward(self, volume: Tensor, visible: Tensor, hidden: Tensor, counted: Tensor) -> Tensor:
        """Return the loss."""
        with autocast(volume.device):
            rebuilt = self.network(volume, Masks(visible, hidden, counted))
            return reconstruction_loss(rebuilt, norm_pix=self.norm_pix)


def in_few_shapes(masks: Masks, multiple: int) -> Masks:
    """Leave out the last tokens of each sample, which are random ones, so that nearly all batches have equally many."""
    visible, hidden = (
        max(tokens - tokens % multiple, min(tokens, multiple))
        for tokens in (masks.visible.shape[1], masks.hidden.shape[1])
    )
    return Masks(masks.visible[:, :visible], masks.hidden[:, :hidden], masks.counted[:, :hidden])


def finetune(
    packed: Packed, network: nn.Module, descent: Descent, protocol: Finetuning, split: Split, seed: int, steps: int
) -> None:
    """Train on the labelled cases. Their crops are mirrored only where the arm names the axes.

    On a CPU channels come last in memory, which makes convolutions with few channels a quarter faster.
    """
    random, device = np.random.default_rng(seed), packed.device
    layout = torch.channels_last_3d if device.type == "cpu" else torch.contiguous_format
    network.to(memory_format=layout).train()
    labels = packed.labels.cpu().numpy()
    mirrored = axes_of(protocol.mirroring)  # `auto` names none
    loss_of = Repeated(Segmenting(network, descent.loss), device)
    for step in range(steps):
        cases = random.choice(split.labelled, protocol.batch_size)
        starts = np.array([place_with_foreground(packed, labels[case], case, random) for case in cases])
        volume, target = cut(packed.volumes, packed, cases, starts)[0], cut(packed.labels, packed, cases, starts)[0]
        for axis in mirrored:
            if random.random() < 0.5:
                volume, target = volume.flip(axis), target.flip(axis)
        factor, shift = (
            torch.from_numpy(random.normal(mean, INTENSITY, (len(cases), 1, 1, 1, 1))).float().to(device)
            for mean in (1, 0)
        )
        noise = torch.randn(volume.shape, device=device) * (INTENSITY / 2 * random.random())
        loss = loss_of(volume.float() * factor + shift + noise, target[:, 0].long())
        descent.step(network, loss, (step + 1) / (steps + 1))
    network.eval()


class Segmenting(nn.Module):
    """A network with its loss; its arguments are tensors."""

    def __init__(self, network: nn.Module, loss: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, volume: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return self.loss(_logits(self.network, volume), target)


def axes_of(mirroring: str) -> list[int]:
    """Return the axes of a batch of crops (b c z y x) that may be mirrored."""
    return [2 + axis for axis, name in enumerate(AXES) if name in mirroring]


def descent_of(network: nn.Module, arm: Arm, *, pretrained: bool) -> Descent:
    """Return how an arm learns: by nnU-Net's SGD if it says so, else by AdamW at the rates of its protocol."""
    if arm.optimizer == "SGD":
        group = {"params": list(network.parameters()), "lr_scale": 1.0}
        sgd = torch.optim.SGD([group], lr=0.0, momentum=0.99, nesterov=True, weight_decay=3e-5)
        return Descent(sgd, lambda done: 1e-2 * (1 - done) ** 0.9, clip=12.0, loss=nnunet_loss)
    protocol = arm.settings.finetuning
    groups = parameter_groups(
        network.named_parameters(),
        weight_decay=protocol.weight_decay,
        layer_decay=protocol.layer_decay if pretrained else 1.0,
        depth=SIZES[arm.settings.network.size].depth,
    )
    return _adamw(groups, protocol, betas=(0.9, 0.999))


def nnunet_loss(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Return the loss with nnU-Net's weights, on which the steps of SGD depend: halved with each resolution, last 0."""
    weights = [0.5**level for level in range(max(1, len(logits) - 1))]
    targets = [functional.interpolate(target[:, None].float(), part.shape[2:])[:, 0].long() for part in logits]
    parts = map(segmentation_loss, logits, targets)
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=False)]).sum() / sum(weights)


def _adamw(groups: list[dict], protocol: Finetuning | Pretraining, betas: tuple[float, float]) -> Descent:
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    return Descent(optimizer, lambda done: protocol.lr * warmup_cosine(done, protocol.warmup), protocol.gradient_clip)


def _logits(network: nn.Module, volume: Tensor) -> Tensor | list[Tensor]:
    with autocast(volume.device):
        return network(volume)


def _finest(logits: Tensor | list[Tensor]) -> Tensor:
    return logits[0] if isinstance(logits, list) else logits


def probe_of(packed: Packed, encoder: nn.Module, settings: Settings, split: Split) -> float:
    """Return R2 on the test cases, mean over classes, of a linear map from a token to each class's share of it."""
    encoder.eval()
    (seen, shares), (unseen, truth) = (
        map(torch.cat, zip(*(tokens_of(packed, encoder, settings, case) for case in cases), strict=True))
        for cases in (split.labelled, split.tested)
    )
    mean, deviation = seen.mean(dim=0), seen.std(dim=0).clamp(min=1e-6)
    seen, unseen = (seen - mean) / deviation, (unseen - mean) / deviation
    offset = shares.mean(dim=0)
    penalty = SHRINKAGE * torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
    weights = torch.linalg.solve(seen.T @ seen / len(seen) + penalty, seen.T @ (shares - offset) / len(seen))
    errors = (unseen @ weights + offset - truth).square().sum(dim=0)
    return (1 - errors / (truth - truth.mean(dim=0)).square().sum(dim=0)).mean().item()


@torch.no_grad()
def tokens_of(packed: Packed, encoder: nn.Module, settings: Settings, case: int) -> tuple[Tensor, Tensor]:
    """Return the vectors of all tokens of a case (n d), and the share of each foreground class in them (n classes)."""
    box = tuple(slice(int(side)) for side in packed.sizes[case])
    image, token = packed.volumes[case][box][None, None].float(), settings.network.token
    classes = torch.arange(1, packed.classes, device=packed.device)[:, None, None, None]
    shares = patchify(padded((packed.labels[case][box] == classes)[None].float(), token), token).mean(dim=3)[0]
    return encoder.encode(image, ()).tokens[0].double(), shares.double()


def print_table(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each dataset, arm and length of pre-training, with the Dice of every seed.

    Measures that no result has are left out: those of older runs lack some.
    """
    found: dict[tuple[str, str, int], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for entry in entries:
        found[entry["dataset"], entry["arm"], entry["steps"]][entry["seed"]] = entry
    rows = []
    for dataset, arm, steps in sorted(found, key=lambda key: [*map(str, key[:2]), key[2]]):
        trained, untrained = found[dataset, arm, steps], (dataset, arm.partition(PRETRAINED_OTHERWISE)[0], 0)
        scratch = found.get((dataset, arm, 0)) or found.get(untrained, {})
        paired = [trained[seed]["dice"] - scratch[seed]["dice"] for seed in scratch if steps and seed in trained]
        gain = f"{np.mean(paired):+.3f}" if paired else ""
        means = {column: _mean(trained, key) for key, column in MEASURES.items()}
        rows.append(
            {
                "dataset": dataset,
                "arm": arm,
                "steps of pre-training": str(steps),
                **{column: means.pop(column) for column in (MEASURES["loss"], MEASURES["probe"])},
                "Dice: mean (each seed)": _seeds(trained),
                "gain over scratch": gain,
                **means,
            }
        )
    columns = [name for name in rows[0] if name not in MEASURES.values() or any(row[name] for row in rows)]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(f"| {' | '.join(row[name] for name in columns)} |")


def _mean(entries: Mapping[int, Mapping[str, Any]], key: str) -> str:
    """Return the mean over the seeds that have this measure; results of older runs lack some."""
    values = [entry[key] for entry in entries.values() if math.isfinite(entry.get(key, math.nan))]
    return f"{np.mean(values):.3f}" if values else ""


def _seeds(entries: Mapping[int, Mapping[str, Any]]) -> str:
    values = [entries[seed]["dice"] for seed in sorted(entries)]
    return f"{np.mean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    main()
