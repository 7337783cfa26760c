"""Compare networks on your data: split, pre-train, fine-tune with few labels, calibrate, test, and report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_vit_mae.cli.arguments import (
    add_device_argument,
    parser_for,
    positive_int,
    refuse_patient_without_table,
    share,
)
from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.recipes import merged, read_recipe
from nnunet_vit_mae.storage.entries import Whole, checked_entries
from nnunet_vit_mae.storage.files import make_folder, read_json
from nnunet_vit_mae.study.arms import ARMS, DEFAULT_PLANS, choose_arms
from nnunet_vit_mae.study.design import (
    StudyDesign,
    check_unchanged,
    read_study,
    refuse_other_encoders,
    refuse_plans_of_others,
)

if TYPE_CHECKING:
    from nnunet_vit_mae.nnunet.folders import Dataset

STEPS = ("splits", "test", "calibrate", "report")
DEFAULT_ARMS = ["unet", "hybrid", "hybrid_scratch"]  # the default network, with and without pre-training
DEFAULT_TEST = 0.2


@dataclass(frozen=True, kw_only=True)
class _CheckedChoices:
    """Choices in a file that nothing else checks: argparse looks at lists and `choices` of flags only."""

    arms: list[str] = field(default_factory=list)
    few: list[Whole] = field(default_factory=list)
    device: Literal["cuda", "cpu"] = "cuda"


@command("Steps that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_study`; the exit code is 1 when a step has failed."""
    args = _parse(argv)
    output = args.output.resolve()
    if args.step:
        _do_step(read_study(output), *args.step)
        return

    from nnunet_vit_mae.study.splits import refuse_impossible_split, refuse_other_splits
    from nnunet_vit_mae.study.workflow import commands_left, refuse_missing_snakemake, run_workflow

    refuse_missing_snakemake(args.executor)
    study = _study(args, output)
    check_unchanged(study)
    refuse_other_encoders(study)
    refuse_plans_of_others(study)
    refuse_other_splits(study)
    refuse_impossible_split(study)
    if args.dry_run:
        print(commands_left(study))
        return
    make_folder(output)
    complete = run_workflow(study, args.jobs, args.executor, lambda line: print(line, flush=True))
    if not complete:
        _tell_failures(study)
    print(f"Wrote index.html, results.csv, comparisons.csv, figures and evaluations to {args.output}.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "-d 501 -o study --arms unet hybrid hybrid_scratch --few 10 24 --seeds 3"
    parser = parser_for("mae3d_study", __doc__, example)
    add = parser.add_argument
    needed = [add("-d", dest="dataset", metavar="ID", help="dataset number or name, e.g. 501 (required)")]
    add(
        "-o",
        dest="output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the study; give it again to continue",
    )
    add("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="nnU-Net configuration")
    help_ = "nnU-Net's plans that the arms start from, unless they name others"
    add("-p", dest="plans", default=DEFAULT_PLANS, metavar="NAME", help=help_)
    add("--arms", nargs="+", default=DEFAULT_ARMS, metavar="ARM", help=f"{', '.join(ARMS)}, or JSON files of arms")
    help_ = "numbers of labelled training patients (required); nothing else is trained"
    needed += [add("--few", type=positive_int, nargs="+", metavar="N", help=help_)]
    add("--seeds", type=positive_int, default=3, metavar="N", help="training runs of each arm and number of labels")
    add("--development", type=share, default=0.2, metavar="SHARE", help="share of patients to calibrate on")
    add("--test", type=share, metavar="SHARE", help=f"share of patients to test on ({DEFAULT_TEST} without labelsTs)")
    add("--csv", type=Path, metavar="FILE", help="table with patients, as in mae3d_split")
    add("--patient", default="patient", metavar="COLUMN", help="column of the table with patients")
    add("--recipe", metavar="NAME|FILE", help="settings for all arms, as in mae3d_plan")
    add("--epochs", type=positive_int, metavar="N", help="epochs of training, for all arms (default: 1000)")
    add("--iterations", type=positive_int, metavar="N", help="iterations per epoch of training (default: 250)")
    add("--pretrain_epochs", type=positive_int, metavar="N", help="epochs of pre-training (default: 800)")
    add("--config", type=Path, metavar="FILE", help="JSON file with these choices by name; flags override it")
    add("-j", dest="jobs", type=positive_int, default=1, metavar="N", help="steps that run at once")
    add("--executor", metavar="NAME", help="Snakemake's plugin for a cluster, e.g. slurm")
    add("--dry-run", dest="dry_run", action="store_true", help="only print the commands that are left to run")
    add("--step", nargs="+", metavar="NAME", help="run one internal step; not needed by hand")
    add_device_argument(parser, "cuda")
    _show_as_required(parser, needed)
    args = parser.parse_args(argv)
    if args.config:
        parser.set_defaults(**_read_choices(args.config, vars(args)))
        args = parser.parse_args(argv)
    return args


def _show_as_required(parser: argparse.ArgumentParser, flags: Sequence[argparse.Action]) -> None:
    """Show flags in the usage as required ones, for which a file of choices may stand in."""
    for flag in flags:
        flag.required = True
    parser.usage = parser.format_usage().removeprefix("usage: ")
    for flag in flags:
        flag.required = False


def _read_choices(file: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Read the choices in a JSON file, which are checked as flags are. Raises `UserError` for a wrong one."""
    choices = read_json(file)
    allowed = sorted(set(known) - {"config", "step", "dry_run", "output"})
    if not isinstance(choices, dict):
        raise UserError(f"{file} must be an object of choices, with names from {', '.join(allowed)}.")
    if unknown := sorted(set(choices) - set(allowed)):
        raise UserError(f"{file} has the unknown choice {unknown[0]}: choose from {', '.join(allowed)}.")
    checked_entries(_CheckedChoices, choices, str(file), "correct it")
    lists = {name: choices.pop(name) for name in ("arms", "few") if name in choices}
    for name, value in choices.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{file} has {name} = {value!r}: give text or a number.")
    texts = {name: str(value) for name, value in choices.items()}  # which argparse parses like flags
    if "arms" in lists:
        lists["arms"] = [_beside(file, name) for name in lists["arms"]]
    if "recipe" in texts:
        texts["recipe"] = _beside(file, texts["recipe"])
    return texts | lists


def _beside(file: Path, name: str) -> str:
    """Return a JSON file that another one names, or a name as it is."""
    return str(file.parent / name) if name.endswith(".json") else name


def _study(args: argparse.Namespace, output: Path) -> StudyDesign:
    """Return the study that the flags describe, with what is there already."""
    if not args.dataset or not args.few:
        raise UserError(f"{'--few' if args.dataset else '-d'} is missing: give -d, --few and -o, or --config FILE.")
    refuse_patient_without_table(args)
    arms = choose_arms(args.arms, args.plans)

    from nnunet_vit_mae.cli.arguments import table_file, usable_device
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.folds import is_preprocessed
    from nnunet_vit_mae.settings import Settings

    dataset = find_dataset(args.dataset)
    if not args.dry_run and not args.executor:
        usable_device(args.device)
    schedule = {name: getattr(args, name) for name in ("epochs", "iterations") if getattr(args, name)}
    recipe = merged(read_recipe(args.recipe) if args.recipe else {}, {"finetuning": schedule} if schedule else {})
    study = StudyDesign(
        output=str(output),
        dataset=dataset.name,
        raw=str(dataset.raw),
        preprocessed_folder=str(dataset.preprocessed),
        results=str(dataset.results),
        arms=arms,
        few=tuple(sorted(set(args.few))),
        seeds=args.seeds,
        configuration=args.configuration,
        base_plans=args.plans,
        development=args.development,
        test=_test_share(args, dataset),
        csv=_table(table_file(args.csv, dataset.raw)),
        patient=args.patient,
        recipe=recipe,
        pretrain_epochs=args.pretrain_epochs or 0,
        device=args.device,
        unlabelled=(dataset.raw / "imagesUn").is_dir(),
        preprocessed=is_preprocessed(dataset, args.plans, args.configuration),
    )
    for name in study.trained:
        Settings.from_dict(study.recipe_of(name))  # refuses unknown settings before anything runs
    return study


def _table(file: Path | None) -> str:
    if file is None:
        return ""
    if not file.is_file():
        raise UserError(f"There is no table {file}: check --csv.")
    return str(file.resolve())


def _test_share(args: argparse.Namespace, dataset: Dataset) -> float:
    """Return the share of patients to test on; 0 where the dataset has a test set of its own."""
    from nnunet_vit_mae.imaging.channels import cases_in, channels_by_case
    from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description

    ending = read_description(dataset.raw / DESCRIPTION).ending
    references = cases_in(dataset.raw / "labelsTs", ending)
    images, _ = channels_by_case(dataset.raw / "imagesTs", ending)
    if references and args.test:
        raise UserError(f"{dataset.raw} has a test set in labelsTs: leave --test out, or move labelsTs aside.")
    if references and (odd := sorted({*images} ^ {*references})):
        raise UserError(
            f"imagesTs and labelsTs of {dataset.raw} hold different cases (only one of them has {abbreviated(odd)}): "
            "complete them, or move labelsTs aside."
        )
    test = 0.0 if references else args.test or DEFAULT_TEST
    if args.development + test >= 1:
        raise UserError(f"--development {args.development:g} and --test {test:g} leave nothing to train on.")
    return test


def _do_step(study: StudyDesign, name: str, *runs: str) -> None:
    if name not in STEPS or bool(runs) != (name == "calibrate"):
        raise UserError(
            f"--step {' '.join((name, *runs))}: give splits, test, report, or calibrate with the run of an ensemble."
        )

    from nnunet_vit_mae.study.splits import keep_splits, refuse_other_splits

    if name in ("test", "calibrate"):  # a report is of what is done
        refuse_other_splits(study)
    done = {"splits": keep_splits, "test": _collect_test_cases, "report": _report, "calibrate": _calibrate}
    done[name](study, *runs)


def _collect_test_cases(study: StudyDesign) -> None:
    from nnunet_vit_mae.datasets.split.files import collect_test_cases
    from nnunet_vit_mae.study.references import note_references

    cases = collect_test_cases(Path(study.raw), Path(study.preprocessed_folder), study.test_images, study.test_labels)
    note_references(study)
    print(f"Linked {cases} test cases to {study.test_images} and {study.test_labels}.")


def _calibrate(study: StudyDesign, run: str) -> None:
    from nnunet_vit_mae.nnunet.ensembling import calibrate_ensemble
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.storage.layout import VALIDATION

    models = {model.run: model for model in study.models() if model.calibrated and study.arms[model.arm].members}
    if run not in models:
        raise UserError(
            f"--step calibrate {run}: there is no such ensemble; choose from {', '.join(models) or 'none'}."
        )
    model = models[run]
    members = study.arms[model.arm].members
    record = calibrate_ensemble(
        load_plan(find_dataset(study.dataset), study.plans(members[0], model.seed), study.configuration),
        [study.fold_folder(member, model.few, model.seed) / VALIDATION for member in members],
        study.predictions(replace(model, calibrated=False)),
        study.predictions(model),
    )
    print(f"Wrote {record} and the calibrated segmentations beside it.")


def _report(study: StudyDesign) -> None:
    from nnunet_vit_mae.study.comparisons import answers_of, sentence_of
    from nnunet_vit_mae.study.costs import cost_of
    from nnunet_vit_mae.study.report import write_study_report
    from nnunet_vit_mae.study.results import measure_study

    table, missing = measure_study(study)
    answers = answers_of(study, table)
    page = write_study_report(study, table, answers, missing, [cost_of(study, arm) for arm in study.arms])
    for question, found in answers.items():
        print(question.title)
        print("\n".join(f"  {sentence_of(paired)}" for paired in found if paired.measure == "dice"))
    print(f"Wrote {page}, results.csv and comparisons.csv.")


def _tell_failures(study: StudyDesign) -> None:
    """Name the steps that failed, report what is there, and exit with code 1."""
    from nnunet_vit_mae.study.workflow import progress_of

    progress = progress_of(study)
    for step in progress.failed:
        log = Path(study.output, step.log)
        print(f"Failed or interrupted: {step.kind} {step.name}, see {log}.", file=sys.stderr)
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("Error: ")]
        print("".join(f"  {line}\n" for line in errors[-1:]), end="", file=sys.stderr)
    if progress.waiting:
        print(f"{len(progress.waiting)} steps wait for these.", file=sys.stderr)
    try:
        _report(study)
    except UserError as error:
        print(error, file=sys.stderr)
    print("Call the same command again to continue.", file=sys.stderr)
    sys.exit(1)
