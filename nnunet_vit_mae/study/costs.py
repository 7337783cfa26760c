"""What each arm of a study costs: parameters, samples, hours and memory, from checkpoints, plans and Snakemake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nnunet_vit_mae.settings import BLOCK
from nnunet_vit_mae.storage.files import read_json
from nnunet_vit_mae.storage.layout import PLANS
from nnunet_vit_mae.storage.pickles import read_trained
from nnunet_vit_mae.study.arms import BASELINE
from nnunet_vit_mae.study.compute import Compute, duration_text, read_compute
from nnunet_vit_mae.study.design import StudyDesign
from nnunet_vit_mae.units import size_text


@dataclass(frozen=True)
class Cost:
    """A row of the table of costs; empty texts where nothing is known."""

    arm: str
    parameters: str
    samples: str  # of training
    training: str  # mean time of a training with its calibration
    prediction: str  # mean time to predict the test cases
    pretraining: str  # time of the encoder, which seeds and arms share
    cpu: str  # of the training
    memory: str


def cost_of(study: StudyDesign, arm: str) -> Cost:
    """Return what an arm costs."""
    if study.arms[arm].members:
        return Cost(arm, "", f"mean of {' and '.join(study.arms[arm].members)}", "", "", "", "", "")
    training = _compute(study, "train", arm)
    calibration = _compute(study, "calibrate", arm)
    prediction = [*_compute(study, "predict", arm), *_compute(study, "predict_probabilities", arm)]
    pretraining = _pretraining(study, arm)
    return Cost(
        arm=arm,
        parameters=_parameters_text(study, arm),
        samples=_samples_text(study, arm),
        training=_mean_text(training, calibration),
        prediction=_mean_text(prediction),
        pretraining=duration_text(pretraining.seconds) if pretraining else "",
        cpu=duration_text(fmean(taken.cpu_seconds for taken in training)) if training else "",
        memory=size_text(max(taken.memory_bytes for taken in training)) if training else "",
    )


def _compute(study: StudyDesign, kind: str, arm: str) -> list[Compute]:
    folder = Path(study.output) / "compute" / kind
    files = [file for few in study.few for file in sorted(folder.glob(f"{arm}_{few}_s*.tsv"))]
    return [taken for file in files if (taken := read_compute(file)) is not None]


def _pretraining(study: StudyDesign, arm: str) -> Compute | None:
    if not study.arms[arm].encoder:
        return None
    return read_compute(Path(study.output) / "compute" / "pretrain" / f"{study.encoder_of(arm)}.tsv")


def _mean_text(*kinds: list[Compute]) -> str:
    """Return the sum of the mean times of some kinds of step."""
    known = [fmean(taken.seconds for taken in kind) for kind in kinds if kind]
    return duration_text(sum(known)) if known else ""


def _parameters_text(study: StudyDesign, arm: str) -> str:
    checkpoints = (study.checkpoint(arm, few, seed) for few in study.few for seed in range(study.seeds))
    file = next((file for file in checkpoints if file.is_file()), None)
    return f"{count_parameters(file) / 1e6:.1f} M" if file else ""


def count_parameters(checkpoint: Path) -> int:
    """Count the weights in a checkpoint of nnU-Net, which names some of them twice."""
    weights = read_trained(checkpoint, mmap=True)["network_weights"]
    return sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())


def _samples_text(study: StudyDesign, arm: str) -> str:
    file = study.model_folder(arm, 0) / PLANS
    if not file.is_file():
        return ""
    if not study.arms[arm].scheduled:
        return "as its trainer"
    planned = _with_inherited(read_json(file)["configurations"], study.configuration)
    return samples_text(planned, study.arms[arm].trainer)


def _with_inherited(configurations: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Return a configuration of nnU-Net's plans with what it inherits from others."""
    own = configurations[name]
    return {**(_with_inherited(configurations, own["inherits_from"]) if "inherits_from" in own else {}), **own}


def samples_text(configuration: dict[str, Any], trainer: str) -> str:
    """Return the number of training samples: epochs x iterations x batch."""
    finetuning = configuration[BLOCK]["finetuning"]
    batch = configuration["batch_size"] if trainer == BASELINE else finetuning["batch_size"]
    epochs, iterations = finetuning["epochs"], finetuning["iterations"]
    return f"{epochs * iterations * batch:,} ({epochs} x {iterations} x {batch})"
