"""What `mae3d_doctor` looks at in nnU-Net: its variables, our trainers, and a dataset with its plans and encoders."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_vit_mae.datasets.split.files import SPLITS
from nnunet_vit_mae.datasets.split.patients import separation_warning
from nnunet_vit_mae.doctor.diagnosis import ERROR, OK, WARNING, Diagnosis
from nnunet_vit_mae.doctor.machine import diagnose_disk
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.hub import local_file
from nnunet_vit_mae.imaging.channels import cases_in
from nnunet_vit_mae.installation import EXT_TRAINER, trainers_folder
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.folds import labelled_cases, split_of
from nnunet_vit_mae.nnunet.plans import Plan, classes_of, destination, load_plan
from nnunet_vit_mae.nnunet.preprocessing import preprocessed_pool
from nnunet_vit_mae.storage.files import UNTIL
from nnunet_vit_mae.storage.layout import encoder_file
from nnunet_vit_mae.transfer import adapt_encoder
from nnunet_vit_mae.weights import read_encoder

TRAINER = "nnUNetTrainerViTMAE"  # the others are in the same file


def diagnose_variables() -> Iterator[Diagnosis]:
    """Yield nnU-Net's three folders: whether they are set, are there and can be written to, and their free space."""
    for path in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):
        name = path.env_var_name
        if not path.is_set():
            yield Diagnosis("variables", ERROR, f"{name} is not set.", f"export {name}=/folder/for/it")
            continue
        folder = Path(os.fspath(path))
        if not folder.is_dir():
            advice = f"mkdir -p {shlex.quote(str(folder))}, or correct the variable."
            level = ERROR if path is nnUNet_raw else WARNING  # nnU-Net makes the others
            yield Diagnosis("variables", level, f"{name} names {folder}, which is not a folder.", advice)
        elif path is not nnUNet_raw and not os.access(folder, os.W_OK):
            yield Diagnosis("variables", ERROR, f"{name}: {folder} cannot be written to.", "Change its owner or mode.")
        else:
            yield Diagnosis("variables", OK, f"{name} is {folder}.")
            yield diagnose_disk(name, folder)


def diagnose_trainers() -> Iterator[Diagnosis]:
    """Yield whether nnU-Net finds our trainers: its commands look into the folders of `nnUNet_extTrainer`."""
    folders = [folder for folder in os.environ.get(EXT_TRAINER, "").split(os.pathsep) if folder.strip()]
    for folder in folders:
        if not Path(folder).is_dir():
            text = f"{EXT_TRAINER} names {folder}, which is not a folder."
            yield Diagnosis("trainers", WARNING, text, "Remove it from the variable.")
    with redirect_stdout(io.StringIO()):  # nnU-Net tells where it looks
        try:
            recursive_find_trainer_class_by_name(TRAINER)
        except RuntimeError:
            value = f"$(mae3d_trainers){os.pathsep}${EXT_TRAINER}" if folders else "$(mae3d_trainers)"
            text = f"nnU-Net does not find {TRAINER}: {EXT_TRAINER} does not name {trainers_folder()}."
            yield Diagnosis("trainers", ERROR, text, f'export {EXT_TRAINER}="{value}"')
            return
    yield Diagnosis("trainers", OK, f"nnU-Net finds {TRAINER}.")


def diagnose_dataset(name: str, plans_name: str, configuration: str) -> Iterator[Diagnosis]:
    """Yield the state of a dataset: plans, preprocessed images, folds and encoders."""
    try:
        dataset = find_dataset(name)
        plan = load_plan(dataset, plans_name, configuration)
    except UserError as error:
        yield Diagnosis("dataset", ERROR, str(error))
        return
    labels = len(classes_of(plan).names)
    counted = f"{labels} label{'s' * (labels > 1)}"
    yield Diagnosis("dataset", OK, f"{dataset.name}: {', '.join(plan.channel_names)}; {counted}.")
    for check in (_plans, _images, _folds, _encoders):
        try:
            yield from check(plan)
        except UserError as error:
            yield Diagnosis("dataset", ERROR, str(error))


def _plans(plan: Plan) -> Iterator[Diagnosis]:
    network = plan.settings.network
    origin = "their vit_mae block" if plan.has_block else "the defaults, as they have no vit_mae block"
    token, patch = (" x ".join(map(str, sides)) for sides in (network.token, plan.patch_size))
    chosen = f"size {network.size}, token {token}, decoder {network.decoder} by {origin}"
    yield Diagnosis("plans", OK, f"The plans {plan.plans_name} have the patch {patch}; {chosen}.")


def _images(plan: Plan) -> Iterator[Diagnosis]:
    labelled = labelled_cases(plan)
    expected = cases_in(plan.dataset.references, plan.file_ending)
    pool, missing = preprocessed_pool(plan)
    yield Diagnosis("images", OK, f"{len(labelled)} labelled and {len(pool)} unlabelled images are preprocessed.")
    if unprocessed := set(expected) - {case.name for case in labelled}:
        text = f"{len(unprocessed)} labelled images are not preprocessed."
        yield Diagnosis("images", ERROR, text, plan.preprocessing_command)
    if missing:
        text = f"{len(missing)} unlabelled images are not preprocessed and will not be used."
        yield Diagnosis("images", WARNING, text, f"mae3d_preprocess {plan.flags_text}")


def _folds(plan: Plan) -> Iterator[Diagnosis]:
    folder, names = plan.dataset.preprocessed, [case.name for case in labelled_cases(plan)]
    if not (folder / SPLITS).is_file():
        advice = f"mae3d_split -d {plan.dataset.id}, with --csv if patients have several scans."
        yield Diagnosis("folds", WARNING, "There is no split yet: nnU-Net would split by case, not by patient.", advice)
        return
    split = split_of(plan, "0", names)
    yield Diagnosis("folds", OK, f"Fold 0 has {len(split['train'])} training and {len(split['val'])} validation cases.")
    if warning := separation_warning(folder, split["train"], split["val"]):
        yield Diagnosis("folds", WARNING, warning)


def _encoders(plan: Plan) -> Iterator[Diagnosis]:
    settings = plan.settings
    place = destination(settings.network, plan.plans, plan.configuration, plan.dataset_json)
    files = [settings.encoder.file] if settings.encoder.file else _own_encoders(plan)
    for file in files:
        try:
            tensors, card = read_encoder(local_file(file))
            _, notes = adapt_encoder(tensors, card, place)
        except UserError as error:
            advice = f"mae3d_pretrain {plan.flags_text}, or mae3d_plan --encoder for plans that it fits"
            yield Diagnosis("encoder", ERROR, f"{file} does not fit these plans: {error}", advice)
            continue
        yield Diagnosis("encoder", OK, f"{file} fits; {card.origin}. {' '.join(notes)}".rstrip())
    if not files:
        advice = f"mae3d_pretrain {plan.flags_text}"
        yield Diagnosis("encoder", WARNING, f"There is no encoder for {plan.plans_name} yet.", advice)


def _own_encoders(plan: Plan) -> list[Path]:
    pattern = encoder_file(plan.dataset.results, plan.plans_name, plan.name, "*")
    found = pattern.parent.parent.glob(f"{pattern.parent.name}/{pattern.name}")
    return sorted(file for file in found if UNTIL not in file.parent.name)
