"""The steps of a study: each is a command of nnU-Net's or ours that can be typed by hand, and the steps it waits for.

Each step leaves a marker `done/KIND/NAME` in the folder of the study, by which Snakemake knows what is left to do.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.storage.layout import CALIBRATED, FINAL
from nnunet_vit_mae.study.arms import DEFAULT_PLANS, Arm
from nnunet_vit_mae.study.design import StudyDesign, StudyModel

EVALUATE = "evaluate"
GPU_KINDS = ("pretrain", "train", "calibrate", "predict", "predict_probabilities")
SHORT_KINDS = ("plan_architecture", "split", "test", "report")  # run where mae3d_study runs, on a cluster too
TRAINING_KINDS = ("pretrain", "train", "calibrate")  # read the splits
MEASURING_KINDS = (EVALUATE, "report")  # read the references


@dataclass(frozen=True)
class Step:
    """A command, and the markers of the steps before it."""

    kind: str  # Snakemake's rule
    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def marker(self) -> str:
        """The file that says that the step is done; of an evaluation, its folder."""
        return f"evaluations/{self.name}" if self.kind == EVALUATE else f"done/{self.kind}/{self.name}"

    @property
    def log(self) -> str:
        """What the command printed."""
        return f"logs/{self.kind}/{self.name}.txt"

    @property
    def compute(self) -> str:
        """Snakemake's record of time and memory."""
        return f"compute/{self.kind}/{self.name}.tsv"

    @property
    def shell(self) -> str:
        """The line to type."""
        return shlex.join(self.command)


def steps_of(study: StudyDesign) -> list[Step]:
    """Return all steps of a study, each after those that it waits for."""
    prepared = list(_preparation(study))
    ready = tuple(step.marker for step in prepared)
    encoders = [step for arm in study.encoders for step in _encoder(study, arm, ready)]
    planned = [_plan(study, arm, seed, ready) for arm in study.trained for seed in range(study.seeds)]
    trained = [step for model in _runs(study) if not study.arms[model.arm].members for step in _training(study, model)]
    ensembles = [step for model in _runs(study) if study.arms[model.arm].members for step in _ensemble(study, model)]
    evaluated = [_evaluation(study, few) for few in study.few]
    tested = tuple(prediction_marker(study, model) for model in study.models())
    report = Step("report", "study", (*_own(study), "report"), tested)
    return [*prepared, *encoders, *planned, *trained, *ensembles, *evaluated, report]


def guarded_shell(study: StudyDesign, step: Step) -> str:
    """Return the line of a step for the shell, with `--step splits` after the split and before what depends on it.

    The splits may be replaced at any time.
    """
    guard = shlex.join((*_own(study), "splits"))
    if step.kind == "split":
        return f"{step.shell} && {guard}"
    return f"{guard} && {step.shell}" if step.kind in TRAINING_KINDS else step.shell


def _runs(study: StudyDesign) -> list[StudyModel]:
    return [model for model in study.models() if not model.calibrated]


def _own(study: StudyDesign) -> tuple[str, ...]:
    return ("mae3d_study", "-o", study.output, "--step")


def _preparation(study: StudyDesign) -> Iterator[Step]:
    """Yield what all arms share: preprocessing, the split, further plans and the test cases."""
    dataset = ("-d", study.id)
    before: tuple[str, ...] = ()
    if not study.preprocessed:
        yield (step := Step("preprocess", "labelled", _preprocessing_command(study)))
        before = (step.marker,)
    if study.unlabelled:
        command = ("mae3d_preprocess", *dataset, "-c", study.configuration, "-p", study.base_plans)
        yield Step("preprocess", "unlabelled", command, before)
    yield (split := Step("split", "patients", split_command(study), before))
    if study.test:
        yield Step("test", "cases", (*_own(study), "test"), (split.marker,))
    for planner in dict.fromkeys(arm.planner for arm in study.arms.values() if arm.planner):
        yield Step("plan_architecture", planner, ("nnUNetv2_plan_experiment", *dataset, "-pl", planner), before)


def _preprocessing_command(study: StudyDesign) -> tuple[str, ...]:
    """Return nnU-Net's command that preprocesses the labelled images, and plans if the plans are its default ones."""
    flags = ("-d", study.id, "-c", study.configuration)
    if study.base_plans == DEFAULT_PLANS:
        return ("nnUNetv2_plan_and_preprocess", *flags)
    return ("nnUNetv2_preprocess", *flags, "-plans_name", study.base_plans)


def split_command(study: StudyDesign) -> tuple[str, ...]:
    """Return the command that splits the patients."""
    command = ["mae3d_split", "-d", study.id, "--development", f"{study.development:g}"]
    command += ["--few", *map(str, study.few)]
    command += ["--test", f"{study.test:g}"] if study.test else []
    command += ["--csv", study.csv, "--patient", study.patient] if study.csv else []
    return tuple(command)


def _mae3d_plan(study: StudyDesign, arm: str, plans: str, recipe: Path, *more: str) -> tuple[str, ...]:
    source = ("-d", study.id, "-c", study.configuration, "-p", study.arms[arm].plans)
    return ("mae3d_plan", *source, "-o", plans, "--recipe", str(recipe), *more)


def _encoder(study: StudyDesign, arm: str, ready: tuple[str, ...]) -> Iterator[Step]:
    """Yield the steps of an encoder, which all seeds and all arms with the same encoder start from."""
    plans = study.encoder_plans(arm)
    command = _mae3d_plan(study, arm, plans, study.encoder_recipe_file(arm))
    yield (plan := Step("plan", f"encoder_{arm}", command, ready))
    flags = ("-d", study.id, "-c", study.configuration, "-p", plans, "-f", "0")
    epochs = ("--epochs", str(study.pretrain_epochs)) if study.pretrain_epochs else ()
    command = ("mae3d_pretrain", *flags, *epochs, "--c", "-device", study.device)
    yield Step("pretrain", arm, command, (plan.marker,))


def _plan(study: StudyDesign, arm: str, seed: int, ready: tuple[str, ...]) -> Step:
    """Return the step that writes the plans of an arm; its batch is that of nnU-Net's plans, as for the U-Net."""
    more, after = ["--batch_size", "plans"], ready
    if study.arms[arm].encoder:
        encoder = study.encoder_of(arm)
        more += ["--encoder", str(study.encoder_file(encoder))]
        after = (f"done/pretrain/{encoder}",)
    command = _mae3d_plan(study, arm, study.plans(arm, seed), study.recipe_file(arm, seed), *more)
    return Step("plan", f"{arm}_s{seed}", command, after)


def _training(study: StudyDesign, model: StudyModel) -> Iterator[Step]:
    """Yield training, calibration and prediction of an arm with a number of labels and a seed."""
    arm, fold = study.arms[model.arm], str(study.fold(model.few))
    chosen = ("-p", study.plans(model.arm, model.seed), "-tr", arm.trainer)
    device = ("-device", study.device)
    command = ("nnUNetv2_train", study.id, study.configuration, fold, *chosen, "--npz", "--c", *device)
    yield (train := Step("train", model.run, command, (f"done/plan/{model.arm}_s{model.seed}",)))
    common = ("-d", study.id, "-c", study.configuration, *chosen, "-f", fold)
    before = train.marker
    for calibrated in (False, True) if arm.calibrate else (False,):
        if calibrated:
            yield Step("calibrate", model.run, ("mae3d_calibrate", *common, *device), (before,))
            before = f"done/calibrate/{model.run}"
        yield _prediction(
            study, arm, StudyModel(model.arm, model.few, model.seed, calibrated), (*common, *device), before
        )


def _prediction(study: StudyDesign, arm: Arm, model: StudyModel, common: tuple[str, ...], before: str) -> Step:
    probabilities = _needs_probabilities(study, model)
    folders = ("-i", str(study.test_images), "-o", str(study.predictions(model)))
    command = ("nnUNetv2_predict", *folders, *common, "-chk", CALIBRATED if model.calibrated else FINAL)
    if study.device == "cpu":  # nnU-Net starts six processes to read and write, which a network on a CPU never needs
        command += ("-npp", "1", "-nps", "1")
    kind = "predict_probabilities" if probabilities else "predict"
    return Step(kind, model.name, (*command, *(("--save_probabilities",) if probabilities else ())), (before,))


def _needs_probabilities(study: StudyDesign, model: StudyModel) -> bool:
    return model.arm in study.members and not model.calibrated


def prediction_marker(study: StudyDesign, model: StudyModel) -> str:
    """Return the file that says that a model has predicted the test cases."""
    if study.arms[model.arm].members:
        return f"done/{'calibrate_ensemble' if model.calibrated else 'ensemble'}/{model.run}"
    kind = "predict_probabilities" if _needs_probabilities(study, model) else "predict"
    return f"done/{kind}/{model.name}"


def _ensemble(study: StudyDesign, model: StudyModel) -> Iterator[Step]:
    """Yield the mean of the members' probabilities, and its calibration."""
    arm = study.arms[model.arm]
    members = [StudyModel(member, model.few, model.seed, False) for member in arm.members]
    folders = [str(study.predictions(member)) for member in members]
    command = ("nnUNetv2_ensemble", "-i", *folders, "-o", str(study.predictions(model)), "--save_npz")
    yield (mean := Step("ensemble", model.run, command, tuple(prediction_marker(study, member) for member in members)))
    if arm.calibrate:
        yield Step("calibrate_ensemble", model.run, (*_own(study), "calibrate", model.run), (mean.marker,))


def _evaluation(study: StudyDesign, few: int) -> Step:
    """Return the step that writes mae3d_evaluate's report of all arms with a number of labels and the first seed."""
    models = [model for model in study.models() if (model.few, model.seed) == (few, 0)]
    command = ["mae3d_evaluate", "-r", str(study.test_labels), "-i", str(study.test_images)]
    command += ["-o", str(Path(study.output, "evaluations", f"{few}_labels"))]
    for model in models:
        name = f"{model.arm} calibrated" if model.calibrated else model.arm
        command += ["-p", f"{name}={study.predictions(model)}"]
    return Step(EVALUATE, f"{few}_labels", tuple(command), tuple(prediction_marker(study, model) for model in models))
