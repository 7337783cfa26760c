"""Commands as people meet them: the list of all, help with examples, suggestions for typing errors, completion."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from nnunet_vit_mae.cli import commands
from nnunet_vit_mae.cli.commands import GROUPS, overview
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.models import find_model

NAMES = [name for names in GROUPS.values() for name in names]


def test_the_list_is_complete():
    scripts = {script.name for script in entry_points(group="console_scripts") if script.name.startswith("mae3d_")}
    assert {f"mae3d_{name}" for name in NAMES} == scripts
    assert all(re.search(rf"^  {name} +[A-Z].+\.$", overview(), re.MULTILINE) for name in NAMES)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_without_a_command_all_are_listed(argv, capsys):
    commands.main(argv)
    assert capsys.readouterr().out == overview() + "\n"


def test_a_command_is_called_with_its_flags(capsys, refused):
    commands.main(["trainers"])
    assert capsys.readouterr().out.strip().endswith("trainers")
    message = refused(commands.main, "pretrain", "--epoch_s", "3", "-d", "1")
    assert message.endswith("unrecognized arguments: --epoch_s 3 (did you mean --epochs?)\n")


def test_an_unknown_command_is_refused(refused):
    message = refused(commands.main, "pretain")
    assert message == "Error: mae3d has no command pretain (did you mean pretrain?): mae3d --help lists all.\n"
    assert "did you mean" not in refused(commands.main, "frobnicate")


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_with_flags_that_exist(name, capsys):
    with pytest.raises(SystemExit):
        commands.main([name, "--help"])
    options, examples = capsys.readouterr().out.split("\nexamples:\n")
    lines = examples.strip().splitlines()
    assert lines
    for line in lines:
        program, *words = line.split()
        assert program == f"mae3d_{name}"
        flags = [word for word in words if re.fullmatch(r"--?[a-z_]+", word)]
        assert all(re.search(rf"[ ,]{flag}\b", options) for flag in flags), line


def test_help_shows_defaults_and_what_is_required_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        commands.main(["study", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "mae3d_study [-h] -d ID -o FOLDER [-c NAME] [-p NAME] [--arms ARM [ARM ...]] --few N [N ...]" in text
    assert "(default: unet hybrid hybrid_scratch)" in text


def test_the_nearest_dataset_and_model_are_named(in_workspace):
    with pytest.raises(UserError, match=r"\(did you mean Dataset901_Tiny\?\)"):
        find_dataset("Dataset901_Tinny")
    dataset = find_dataset("901")
    (dataset.results / "nnUNetTrainerViTMAE__Own__3d_fullres").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean nnUNetTrainerViTMAE__Own__3d_fullres\?"):
        find_model(
            dataset, "Own", "3d_fullres", trainer="nnUNetTrainerViTMEA", folds=["0"], checkpoint="checkpoint_final.pth"
        )
    with pytest.raises(UserError, match="-f names the fold 1 twice"):
        find_model(dataset, "Own", folds=["1", "0", "1"])


def test_shells_complete_flags(tmp_path):
    line, answer = "mae3d_plan --rec", tmp_path / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    script = "from nnunet_vit_mae.cli.plan import main; main()"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert answer.read_text().split() == ["--recipe"]


def test_a_reader_that_ends_early_is_no_error():
    """As in `mae3d | head -n 1`."""
    script = "from nnunet_vit_mae.cli.commands import main; main([])"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
