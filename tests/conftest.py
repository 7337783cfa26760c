"""A tiny nnU-Net dataset, planned and preprocessed once per session by nnU-Net's own commands.

Beside it stands what more than one file of tests calls.
"""

import gc
import json
import locale
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import settings
from in_process import path_of_forked_scripts, run_in_process
from no_network import sitecustomize
from torch import Tensor, distributed, nn

from nnunet_vit_mae.installation import trainers_folder

# times differ too much from one machine to the next for a deadline
settings.register_profile("new", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)  # so that a failure comes from a change
settings.load_profile("same")
torch.set_num_threads(1)  # there are as many processes as cores
os.environ["MAE3D_TENSORBOARD"] = "0"  # its import takes longer than a training here
os.environ.setdefault("nnUNet_def_n_proc", "1")  # nnU-Net reads it when it is imported

DATASET = "Dataset901_Tiny"
SHAPE = (14, 18, 22)  # z y x: three unequal sides
SPACING = (1.5, 1.0, 1.0)
SIDES = (7, 5, 17)  # of a small volume for networks, which tokens of 2 x 4 x 8 do not divide
MIXED = [[0, 1, 2], [1], [0, 2], [1, 2]]  # the contrasts of four studies
NO_NETWORK = Path(sitecustomize.__file__).parent
PYTHON_PATH = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no process is alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _same_locale() -> Iterator[None]:
    """ITK sets the locale to C when it writes DICOM, after which Python takes text files for ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.fixture(scope="session", autouse=True)
def _rehearsals_remembered() -> Iterator[None]:
    """`mae3d_plan` rehearses a step for a second or two, and nearly all tests plan the same few networks."""
    from nnunet_vit_mae.nnunet import planner

    known: dict[str, int] = {}

    def remembering(estimate: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any, **unet: partial) -> int:
            plans = [build.args[0].configuration.configuration for build in unet.values()]
            key = repr((estimate, plans, arguments))
            if key not in known:
                known[key] = estimate(*arguments, **unet)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for estimate in (planner.finetuning_memory, planner.pretraining_memory):
            patch.setattr(planner, estimate.__name__, remembering(estimate))
        yield


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders with one dataset in them, and two ways to run commands there."""

    root: Path
    dataset: ClassVar[str] = DATASET

    @property
    def environment(self) -> Mapping[str, str]:
        folders = {f"nnUNet_{name}": str(self.root / name) for name in ("raw", "preprocessed", "results")}
        few = {f"nnUNet_{name}": "1" for name in ("n_proc_DA", "def_n_proc", "npp", "nps")} | {"OMP_NUM_THREADS": "1"}
        without_network = {"PYTHONPATH": os.pathsep.join([str(NO_NETWORK), *PYTHON_PATH])}
        without_network[sitecustomize.CONNECTIONS] = str(self.connections)
        ours = {"nnUNet_compile": "f", "nnUNet_extTrainer": str(trainers_folder())}
        return os.environ | folders | few | without_network | ours

    @property
    def connections(self) -> Path:
        """Attempts of commands to reach another machine, all of which fail."""
        return self.root / "connections.txt"

    @property
    def raw(self) -> Path:
        return self.root / "raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        return self.root / "results" / self.dataset

    def copied_to(self, folder: Path) -> Self:
        """A copy below a folder, to be changed while other tests go on with this one."""
        return replace(self, root=Path(shutil.copytree(self.root, folder / "nnunet")))

    def use_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process use the folders too, for tests that call functions instead of typing commands."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def type(self, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command as a user does, and insist on its exit code."""
        program = Path(sys.executable).with_name(command[0])
        done = subprocess.run(
            [program, *command[1:]], env=self.environment, capture_output=True, text=True, timeout=600, check=False
        )
        return self._checked(done, code)

    def call(self, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command as `type` does, but in this process, which takes far less time.

        nnU-Net loads data in this process too, so that a random seed decides everything.
        """
        return self._checked(run_in_process(command, {**self.environment, "nnUNet_n_proc_DA": "0"}), code)

    def _checked(self, done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
        shown = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == code, f"{done.args} gave {done.returncode}\n{shown}"
        assert not self.connections.exists(), self.connections.read_text()
        return done


def write_case(folder: Path, case: str, channels: list[np.ndarray], label: np.ndarray | None = None) -> None:
    """Images (and a label) of one case, named as nnU-Net wants them."""
    arrays = {folder / f"{case}_{number:04d}.nii.gz": array for number, array in enumerate(channels)}
    if label is not None:
        arrays[folder.parent / folder.name.replace("images", "labels") / f"{case}.nii.gz"] = label
    for file, array in arrays.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(array if array.dtype == np.uint8 else array.astype(np.float32))
        image.SetSpacing(SPACING[::-1])
        sitk.WriteImage(image, str(file))


def blob(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Two contrasts of a noisy volume with a bright ellipsoid in it, and its label."""
    random = np.random.default_rng(seed)
    centre = [side * random.uniform(0.35, 0.65) for side in SHAPE]
    distance = sum(
        ((axis - c) / (side / 4)) ** 2 for axis, c, side in zip(np.indices(SHAPE), centre, SHAPE, strict=True)
    )
    label = (distance < 1).astype(np.uint8)
    noise = random.normal(0, 20, (2, *SHAPE))
    return [100 + 200.0 * label + noise[0], 300 - 150.0 * label + noise[1]], label


def read_voxels(file: Path) -> np.ndarray:
    """The voxels (z y x) that a file holds, as another program than ours reads them."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def seeded(seed: int = 0) -> torch.Generator:
    """Random numbers that are the same in every run, whatever was drawn before."""
    return torch.Generator().manual_seed(seed)


def random_volume(*shape: int, seed: int = 0) -> Tensor:
    """Noise around zero in any shape."""
    return torch.randn(*shape, generator=seeded(seed))


def studies_with(
    present: Sequence[Sequence[int]], sides: Sequence[int] = SIDES, *, channels: int = 3, seed: int = 0
) -> Tensor:
    """A batch of noise with zeros for the contrasts that a study lacks."""
    volume = random_volume(len(present), channels, *sides, seed=seed)
    for study, contrasts in enumerate(present):
        for absent in set(range(channels)) - set(contrasts):
            volume[study, absent] = 0
    return volume


def perturbed(network: AnyModule, seed: int = 0) -> AnyModule:
    """Change the weights: at first, modality vectors do not matter yet."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def small_unet(
    channels: int, classes: int, strides: Sequence[int | Sequence[int]], *, deep_supervision: bool = False
) -> PlainConvUNet:
    """nnU-Net's U-Net with few features, and a stage for each stride."""
    features = range(4, 4 + 2 * len(strides), 2)
    return PlainConvUNet(
        channels, len(strides), tuple(features), nn.Conv3d, 3, strides, 1, classes, 1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
    )  # fmt: skip


class Sharp(torch.autograd.Function):
    """Nothing, with an infinite slope: a loss stays good, and its gradient is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * torch.inf


class Poison:
    """Makes a folder when it is unpickled, which shows that a file was allowed to run something."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The dataset after `nnUNetv2_plan_and_preprocess`; shared, so tests that change it take `workspace`."""
    workspace = Workspace(tmp_path_factory.mktemp("nnunet"))
    for number in range(6):
        channels, label = blob(number)
        write_case(workspace.raw / "imagesTr", f"train_{number}", channels, label)
    for number in range(3):
        write_case(workspace.raw / "imagesUn", f"pool_{number}", blob(10 + number)[0])
    for number in range(2):
        channels, label = blob(20 + number)
        write_case(workspace.raw / "imagesTs", f"test_{number}", channels, label)
    description = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "blob": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
        "licence": "CC0",
    }
    (workspace.raw / "dataset.json").write_text(json.dumps(description))
    workspace.call("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    return workspace


@pytest.fixture
def workspace(planned: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the planned dataset for one test."""
    return planned.copied_to(tmp_path)


@pytest.fixture
def in_workspace(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy whose folders this process uses too."""
    workspace.use_here(monkeypatch)
    return workspace


@pytest.fixture
def forked_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that this process types are forked from one that has all imports done."""
    monkeypatch.setattr(sysconfig, "get_path", path_of_forked_scripts)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a command's `main` and insist on exit code 2 and one sentence; gives the sentence."""

    def call(main: Callable[[list[str]], None], *arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return call


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw at the end of a pre-training alone: a picture takes longer than an epoch here."""
    monkeypatch.setattr("nnunet_vit_mae.pretraining.run.PICTURES", 1)


@pytest.fixture(scope="module")
def no_garbage_of_imports() -> Iterator[None]:
    """statsmodels collects garbage in every correction, which takes 0.7 s when all modules are imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone, as DDP needs it."""
    distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
