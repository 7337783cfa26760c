"""The package as others meet it: wheel, layers, commands, and nnU-Net's look-up of the trainers."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nnunet_vit_mae import __version__
from nnunet_vit_mae.installation import trainers_folder

REPOSITORY = Path(__file__).parent.parent
TRAINERS = (
    "nnUNetTrainerViTMAE",
    "nnUNetTrainerViTScratch",
    "nnUNetTrainerAMAE",
    "nnUNetTrainerAMAEScratch",
    "nnUNetTrainerBaseline",
    "nnUNetTrainerBaselineAdamW",
)

# flags are a promise: who changes this table changes what people have in their scripts
PLAN_FLAGS = {"-h", "--help", "-d", "-c", "-p"}
FLAGS = {
    "mae3d_plan": PLAN_FLAGS
    | {
        "-o",
        "--recipe",
        "--size",
        "--decoder",
        "--token",
        "--token_order",
        "--upsampling",
        "--adaptive",
        "--encoder",
        "-gpu_memory_target",
    }
    | {"--epochs", "--iterations", "--batch_size", "--mirroring", "--lr", "--seed"},
    "mae3d_preprocess": PLAN_FLAGS | {"-np"},
    "mae3d_pretrain": PLAN_FLAGS
    | {"-f", "--epochs", "--mask_ratio", "--batch_size", "--lr", "--adaptive", "--seed", "--c", "-device"}
    | {"-np", "-num_gpus", "--cache"},
    "mae3d_share": PLAN_FLAGS | {"-f", "-o", "--licence", "--case_hashes", "--repo", "--public"},
    "mae3d_features": PLAN_FLAGS | {"-tr", "-f", "-chk", "--case", "-o", "-device"},
    "mae3d_fill_contrasts": {"-h", "--help", "-d"},
    "mae3d_omit": PLAN_FLAGS | {"-tr", "-f", "-chk", "-i", "-r", "--omit", "-o", "-device"},
    "mae3d_evaluate": {"-h", "--help", "-r", "-p", "-i", "-o", "--csv", "--patient", "--cutoffs", "--thickness_bins"}
    | {
        "--tolerance",
        "--min_lesion_voxels",
        "--resamples",
        "--seed",
        "--calibration",
        "--uncertainty",
        "--model_folder",
        "-np",
    },
    "mae3d_calibrate": PLAN_FLAGS
    | {"-tr", "-f", "-chk", "--objective", "--temperature", "--uncertainty", "-i", "-l", "-device"}
    | {"--allow_training_cases"},
    "mae3d_quantify": PLAN_FLAGS
    | {"-i", "-o", "-tr", "-f", "-chk", "--cutoffs", "--uncertainty", "--coverage"}
    | {"-num_parts", "-part_id", "-device", "--dicom", "--contrast", "--reference", "--codes"},
    "mae3d_export": PLAN_FLAGS | {"-tr", "-f", "-chk", "-o", "--case_names"},
    "mae3d_import": {"-h", "--help", "-o", "--overwrite"},
    "mae3d_check": {"-h", "--help", "-d", "-o", "--csv", "--case", "--patient", "--list_empty", "-np"},
    "mae3d_convert": {
        "-h",
        "--help",
        "-i",
        "-o",
        "--contrast",
        "--reference",
        "--labels",
        "--label_values",
        "--key",
        "-np",
    },
    "mae3d_crop_roi": {"-h", "--help", "-i", "-l", "-o", "-t", "-r", "--margin", "--csv", "--case", "--template_column"}
    | {"--resample", "--contrasts", "--reject", "-np"},
    "mae3d_refine_labels": {"-h", "--help", "-d", "-i", "-l", "-o", "--threshold", "--min_voxels", "--connectivity"}
    | {"--labels", "--channel"},
    "mae3d_split": {"-h", "--help", "-d", "-o", "--csv", "--case", "--patient", "--folds", "--development", "--test"}
    | {"--stratify", "--stratify_volume", "--few", "--one_per_patient", "--leave_out", "--seed", "--overwrite"}
    | {"--verify", "--figure", "--test_folder"},
    "mae3d_study": {
        "-h",
        "--help",
        "-d",
        "-o",
        "-c",
        "-p",
        "--arms",
        "--few",
        "--seeds",
        "--development",
        "--test",
        "--csv",
    }
    | {"--patient", "--recipe", "--epochs", "--iterations", "--pretrain_epochs", "--config", "-j", "--executor"}
    | {"--dry-run", "--step", "-device"},
    "mae3d_demo": {"-h", "--help", "-o", "--seed"},
    "mae3d_trainers": {"-h", "--help"},
    "mae3d_doctor": {"-h", "--help", "-d", "-c", "-p", "--json"},
}

# what a Docker image is built from too
BUILT_FROM = re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)

# an arrow goes to a smaller number only, or stays inside its own folder
LAYERS = {
    "devices": 0,
    "errors": 0,
    "hub": 0,
    "installation": 0,
    "storage": 0,
    "processes": 0,
    "presets": 0,
    "progress": 0,
    "sections": 0,
    "settings": 0,
    "planning": 0,
    "units": 0,
    "divergence": 1,
    "doctor": 1,
    "networks": 1,
    "optimisation": 1,
    "recipes": 1,
    "batch_transforms": 1,
    "weights": 1,
    "tracking": 1,
    "transfer": 1,
    "plots": 1,
    "imaging": 1,
    "phantoms": 1,
    "statistics": 0,
    "calibration": 1,
    "datasets": 2,
    "foreign": 2,
    "pretraining": 2,
    "evaluation": 2,
    "sharing": 3,
    "study": 3,
    "nnunet": 3,
    "demonstration": 3,
    "cli": 4,
}
SAME_LAYER = {
    ("storage", "errors"),
    ("hub", "errors"),
    ("processes", "errors"),
    ("processes", "units"),
    ("sections", "errors"),
    ("settings", "errors"),
    ("settings", "presets"),
    ("settings", "sections"),
    ("planning", "errors"),
    ("planning", "settings"),
    ("planning", "units"),
    ("phantoms", "imaging"),
    ("transfer", "weights"),
    ("weights", "networks"),
}


def build(kind: str, folder: Path) -> Path:
    """Build a wheel from a copy of the sources, with the environment's own setuptools."""
    sources = folder / "sources"
    sources.mkdir()
    for part in (REPOSITORY / name for name in BUILT_FROM):
        if part.is_dir():
            shutil.copytree(part, sources / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, sources)
    script = f"from setuptools import build_meta as b; print(b.build_{kind}(r'{folder}'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


def find_trainers(*paths: str, ext_trainer: str) -> str:
    """Ask nnU-Net for each trainer, in a fresh interpreter with these import paths alone; gives its last lines."""
    script = f"""
import site, sys
for path in {paths!r}: site.addsitedir(path)
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
print(*(find(name).__module__ + '.' + find(name).__name__ for name in {TRAINERS!r}))
import nnunet_vit_mae; print(nnunet_vit_mae.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        env=os.environ | {"nnUNet_extTrainer": ext_trainer},
        cwd=os.sep,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(done.stdout.splitlines()[-2:])


EXPECTED = " ".join(f"nnunet_vit_mae.nnunet.trainers.{name}" for name in TRAINERS)


@pytest.mark.slow
def test_nnunet_finds_the_trainers_of_an_editable_install_beside_another_folder(tmp_path):
    with zipfile.ZipFile(build("editable", tmp_path)) as wheel:
        wheel.extractall(tmp_path / "editable")
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "nnunet_vit_mae" not in entry.name:
            (dependencies / entry.name).symlink_to(entry)
    other = tmp_path / "other"
    other.mkdir()
    (other / "somebody_elses_trainers.py").write_text("class nnUNetTrainerOther: pass\n")
    paths = (str(dependencies), str(tmp_path / "editable"))
    found = find_trainers(*paths, ext_trainer=f"{other}{os.pathsep}{tmp_path / 'sources' / 'trainers'}")
    assert EXPECTED in found
    assert str(tmp_path / "sources" / "nnunet_vit_mae" / "__init__.py") in found


def test_the_wheel_holds_what_it_should(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        entries = next(wheel.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    for source in (REPOSITORY / "nnunet_vit_mae").rglob("*.py"):
        assert source.relative_to(REPOSITORY).as_posix() in names
    assert "nnunet_vit_mae/trainers/nnunet_vit_mae_trainers.py" in names
    for recipe in (REPOSITORY / "plans").glob("*.json"):
        assert f"nnunet_vit_mae/plans/{recipe.name}" in names
    assert "nnunet_vit_mae/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert all(f"{command} =" in entries for command in FLAGS)
    tops = {name.split("/")[0] for name in names}
    assert all(top.startswith("nnunet_vit_mae") for top in tops), tops


def test_the_sources_for_others_hold_everything():
    """What is tracked is in the sdist; `.ci/run` builds it, and the wheel from it."""
    manifest = (REPOSITORY / "MANIFEST.in").read_text()
    named = {
        *re.findall(r"^graft (.+)$", manifest, re.MULTILINE),
        *manifest.split("\ninclude ")[1].split("\n")[0].split(),
    }
    by_setuptools = {"nnunet_vit_mae", "trainers", "plans", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a clone")
    tops = {name.split("/")[0] for name in tracked.stdout.split()}
    assert tops == named | by_setuptools | {"MANIFEST.in"}


def test_there_is_one_version():
    stated = re.search(r"^version: (.+)$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE)
    assert stated
    assert stated[1] == __version__


def test_the_trainers_folder_is_cheap_to_look_into():
    """nnU-Net imports every module it meets there."""
    assert {file.name for file in trainers_folder().glob("*.py")} == {"__init__.py", "nnunet_vit_mae_trainers.py"}


@pytest.mark.parametrize("command", FLAGS)
def test_command_line_is_frozen(command, capsys):
    (entry,) = entry_points(group="console_scripts", name=command)
    with pytest.raises(SystemExit) as stop:
        entry.load()(["--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out.partition("options:")[2].partition("examples:")[0]
    assert set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", options)) == FLAGS[command]


def test_commands_answer_without_torch():
    """`--help` must not take seconds."""
    modules = [entry.module for entry in entry_points(group="console_scripts") if entry.name in FLAGS]
    slow = {"torch", "nnunetv2", "matplotlib", "pandas", "monai", "statsmodels", "sklearn", "scipy"}
    assert not imported_by(*modules) & slow


def test_networks_need_neither_nnunet_nor_files():
    """Nor torch's compiler, whose import takes as long as that of torch."""
    others = {"nnunetv2", "SimpleITK", "blosc2", "matplotlib", "torch._dynamo"}
    assert not imported_by("nnunet_vit_mae.networks.build") & others


def test_only_the_nnunet_folder_imports_nnunet():
    for module in package_modules():
        if not module.startswith("nnunet_vit_mae.nnunet"):
            assert not any(name.split(".")[0] == "nnunetv2" for name in imports_of(module)), module


def test_imports_go_downward():
    for module in package_modules():
        for imported in imports_of(module):
            assert arrow_is_allowed(module, imported), f"{module} imports {imported}"


def test_an_upward_import_would_be_noticed():
    assert not arrow_is_allowed("nnunet_vit_mae.networks.autoencoder", "nnunet_vit_mae.nnunet.plans")
    assert not arrow_is_allowed("nnunet_vit_mae.pretraining.run", "nnunet_vit_mae.cli.pretrain")
    assert "torch" in imported_by("nnunet_vit_mae.networks.build")


def test_a_public_name_stands_for_one_thing():
    homes: dict[str, list[str]] = {}
    for module in package_modules():
        source = (REPOSITORY / Path(*module.split("."))).with_suffix(".py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    shared = {name: modules for name, modules in homes.items() if len(modules) > 1}
    # every command has a main, and every decoder is built by the build of its module
    assert set(shared) <= {"main", "build"}, shared


def package_modules() -> list[str]:
    files = (REPOSITORY / "nnunet_vit_mae").rglob("*.py")
    return [
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files if file.name != "__init__.py"
    ]


def imports_of(module: str) -> set[str]:
    """Full names that a module imports anywhere, from its source."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / Path(*module.split("."))).with_suffix(".py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def arrow_is_allowed(module: str, imported: str) -> bool:
    if not imported.startswith("nnunet_vit_mae."):
        return True
    start, end = module.split(".")[1], imported.split(".")[1]
    return start == end or LAYERS[end] < LAYERS[start] or (start, end) in SAME_LAYER


def imported_by(*modules: str) -> set[str]:
    """Names of all modules in a fresh interpreter after importing these."""
    script = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_of_the_trainers_module_is_a_trainer():
    module = import_module("nnunet_vit_mae.trainers.nnunet_vit_mae_trainers")
    assert set(module.__all__) == set(TRAINERS)
