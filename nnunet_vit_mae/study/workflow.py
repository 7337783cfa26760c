"""Run the steps of a study with Snakemake, which knows what is done, what can run at once and what has failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.installation import nnunet_environment
from nnunet_vit_mae.processes.guard import guarded
from nnunet_vit_mae.settings import Settings
from nnunet_vit_mae.storage.files import locked, write_json
from nnunet_vit_mae.storage.readme import write_readme
from nnunet_vit_mae.study.compute import duration_text, read_compute
from nnunet_vit_mae.study.design import STUDY_FILE, StudyDesign
from nnunet_vit_mae.study.references import note_references, references_have_changed
from nnunet_vit_mae.study.steps import MEASURING_KINDS, Step, steps_of

CONTENTS = {
    "index.html": "the report: open it in a browser",
    "figures/": "its figures as PNG and SVG",
    "results.csv": "a row for each arm, number of labels, seed, calibration, case and label",
    "comparisons.csv": "all paired comparisons, with their sentences",
    "evaluations/": "the report of mae3d_evaluate for the first seed of each number of labels",
    "study.json": "the choices; the same command with the same choices goes on",
    "splits_final.json": "the splits that the models are trained with",
    "split.json": "how they were made, and the cases to test on",
    "recipes/": "settings of each arm and seed",
    "predictions/": "segmentations of the test cases, by model",
    "measures/": "measures of each model",
    "test/": "links to the test cases of the split",
    "references.json": "size and date of the references: what was measured with others is measured again",
    "done/": "which steps are done: remove a file to repeat its step",
    "logs/": "what each step has said",
    "compute/": "time and memory of each step",
}
POLL_SECONDS = 20.0  # between two looks at what is done


def refuse_missing_snakemake(executor: str | None) -> None:
    """Raise `UserError` when Snakemake or its plugin for a cluster is not installed."""
    if find_spec("snakemake") is None:
        raise UserError('mae3d_study needs Snakemake: pip install "nnunet-vit-mae[study]".')
    if executor and find_spec(f"snakemake_executor_plugin_{executor.replace('-', '_')}") is None:
        raise UserError(
            f"--executor {executor} needs Snakemake's plugin: pip install snakemake-executor-plugin-{executor}."
        )


def commands_left(study: StudyDesign) -> str:
    """Return how much is left to train, and the commands that are left to run; only Snakemake's own folder is written.

    Raises `UserError` if Snakemake fails, which says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, STUDY_FILE)
        file.write_text(json.dumps(study.to_json()), encoding="utf-8")
        command = [*snakemake_command(study, file), "--summary"]
        told = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    if told.returncode:
        raise UserError("Snakemake cannot list the steps that are left: see its message above.")
    pending = {line.split("\t")[0] for line in told.stdout.splitlines() if line.endswith("\tupdate pending")}
    corrected = references_have_changed(study)  # of which Snakemake knows when they have been noted
    left = [step for step in steps_of(study) if step.marker in pending or (corrected and step.kind in MEASURING_KINDS)]
    return "\n".join([work_text(study, left), *(step.shell for step in left)])


def work_text(study: StudyDesign, steps: Sequence[Step]) -> str:
    """Return how many trainings and pre-trainings are among some steps, and how long each is."""
    arms = {model.run: model.arm for model in study.models()}
    trainings = Counter(_length_of_training(study, arms[step.name]) for step in steps if step.kind == "train")
    pretrainings = Counter(_epochs_of_pretraining(study, step.name) for step in steps if step.kind == "pretrain")
    parts = [f"{count} training{'s' * (count > 1)} {length}" for length, count in trainings.items()]
    parts += [f"{count} pre-training{'s' * (count > 1)} of {epochs} epochs" for epochs, count in pretrainings.items()]
    return f"Left: {', '.join(parts) or 'nothing to train'}."


def _length_of_training(study: StudyDesign, arm: str) -> str:
    if not study.arms[arm].scheduled:
        return f"with the schedule of {study.arms[arm].trainer}"
    finetuning = Settings.from_dict(study.recipe_of(arm)).finetuning
    epochs, iterations = finetuning.epochs, finetuning.iterations
    return f"of {epochs * iterations:,} iterations ({epochs} epochs of {iterations})"


def _epochs_of_pretraining(study: StudyDesign, encoder: str) -> int:
    return study.pretrain_epochs or Settings.from_dict(study.recipe_of(encoder)).pretraining.epochs


def run_workflow(study: StudyDesign, jobs: int, executor: str | None, say: Callable[[str], None]) -> bool:
    """Write `study.json` and the recipes, and run what is left to do.

    Args:
        study: The study.
        jobs: Number of steps that run at once.
        executor: Name of Snakemake's plugin for a cluster; None for this machine.
        say: Called with a line when a step is done.

    Returns:
        Whether all steps have succeeded.

    Raises:
        UserError: If another process runs this study.
    """
    output = Path(study.output)
    with locked(output):
        write_json(study.to_json(), output / STUDY_FILE)
        write_readme(output, CONTENTS)
        for file, recipe in study.recipes().items():
            write_json(recipe, file)
        note_references(study)
        command = snakemake_command(study, output / STUDY_FILE)
        command += ["--jobs", str(jobs), "--executor", executor] if executor else ["--cores", str(jobs)]
        return _follow(command, study, jobs, say) == 0


def snakemake_command(study: StudyDesign, configuration: Path) -> list[str]:
    """Return the call of Snakemake; a study continues where it was interrupted."""
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(files("nnunet_vit_mae.study") / "Snakefile")),
        *("--directory", study.output, "--configfile", str(configuration)),
        *("--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "--printshellcmds"),
        "--nolock",  # Snakemake's lock outlives a process that was killed; ours does not
    ]


def environment() -> Mapping[str, str]:
    """Return the environment of the steps: our commands are found, and our trainers by nnU-Net."""
    paths = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    return nnunet_environment() | {"PATH": os.pathsep.join(paths)}


def _follow(command: Sequence[str], study: StudyDesign, jobs: int, say: Callable[[str], None]) -> int:
    """Run Snakemake, and tell the time left whenever steps are done."""
    told = ""
    with guarded(command, env=environment()) as process:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_SECONDS)
            if (line := progress_of(study).text(jobs)) != told and process.poll() is None:
                say(told := line)
    return process.returncode


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    done: int
    failed: list[Step]  # or interrupted: they have a log, but are not done
    waiting: list[Step]  # for others
    seconds: Mapping[str, float]  # mean time of the steps that are done, by kind

    def text(self, jobs: int) -> str:
        """Return a line with the time left, if a training has been timed: most of it goes into trainings."""
        left = [*self.failed, *self.waiting]
        line, kinds = f"{self.done} of {self.done + len(left)} steps are done", {step.kind for step in left}
        if "train" in kinds - self.seconds.keys():
            return f"{line}."
        known = sum(self.seconds.get(step.kind, 0.0) for step in left) / jobs
        bound = "about" if kinds <= self.seconds.keys() else "at least"
        return f"{line}; {bound} {duration_text(known)} left."


def progress_of(study: StudyDesign) -> Progress:
    """Return what is done of a study, from the files in its folder."""
    folder = Path(study.output)
    seconds: dict[str, list[float]] = defaultdict(list)
    left = []
    for step in (steps := steps_of(study)):
        if not (folder / step.marker).exists():
            left.append(step)
        elif (taken := read_compute(folder / step.compute)) is not None:
            seconds[step.kind].append(taken.seconds)
    failed = [step for step in left if (folder / step.log).exists()]
    means = {kind: fmean(values) for kind, values in seconds.items()}
    return Progress(len(steps) - len(left), failed, [step for step in left if step not in failed], means)
