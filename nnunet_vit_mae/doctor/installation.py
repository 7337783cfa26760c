"""Python, the installed packages, and whether they fit one another."""

from __future__ import annotations

import platform
import shutil
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from nnunet_vit_mae.doctor.diagnosis import ERROR, OK, WARNING, Diagnosis
from nnunet_vit_mae.errors import first_line

PACKAGE = "nnunet-vit-mae"
NAMED = ("torch", "torchvision", "nnunetv2", "dynamic-network-architectures")  # whose versions a report should state
COMPILE = "nnUNet_compile"
REINSTALL = 'pip install --upgrade "nnunet-vit-mae" torch torchvision, in one command so that they fit.'


def diagnose_packages() -> Iterator[Diagnosis]:
    """Yield the versions in use, and what lacks or misses our requirements."""
    versions = {name: _version(name) for name in (PACKAGE, *NAMED)}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    yield Diagnosis("versions", OK, f"Python {platform.python_version()}, {text}.")
    for requirement in map(Requirement, metadata.requires(PACKAGE) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from _unmet(requirement)


def diagnose_imports() -> Iterator[Diagnosis]:
    """Yield compiled packages that do not load: torchvision fits one version of torch only, and timm needs it."""
    for name in ("torch", "torchvision", "timm"):
        try:
            with warnings.catch_warnings():  # timm and torch deprecate some of what they use
                warnings.simplefilter("ignore")
                import_module(name)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            yield Diagnosis("versions", ERROR, f"{name} cannot be imported ({first_line(error)}).", REINSTALL)
            return


def diagnose_compiler(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Yield whether torch.compile can make kernels for a GPU, with which nnU-Net trains unless told otherwise."""
    import torch

    if torch.version.cuda is None:  # nothing is compiled on a CPU
        return
    value = environment.get(COMPILE, "t")
    lacking = [what for what, is_there in _needs_of_triton(environment).items() if not is_there]
    if value.lower() not in ("true", "1", "t"):
        yield Diagnosis("compile", OK, f"{COMPILE} is {value}: nnU-Net trains without torch.compile.")
    elif lacking:
        text = f"torch.compile, which nnU-Net trains with on a GPU, lacks {' and '.join(lacking)}."
        yield Diagnosis("compile", WARNING, text, f"Install what is missing, or export {COMPILE}=f")
    else:
        yield Diagnosis("compile", OK, "torch.compile has what it needs to make kernels for a GPU.")


def _needs_of_triton(environment: Mapping[str, str]) -> dict[str, bool]:
    """Return what Triton needs to make a kernel, and whether it is there; it compiles some C for each."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's, whose headers are those of the system
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return {
        "Triton (pip install triton)": find_spec("triton") is not None,
        "a C compiler (package gcc)": any(map(shutil.which, (environment.get("CC") or "gcc", "clang"))),
        f"{header} (package python3-dev)": header.is_file(),
    }


def _unmet(requirement: Requirement) -> Iterator[Diagnosis]:
    version = _version(requirement.name)
    if version is None:
        text = f"{requirement.name} is not installed."
    elif not requirement.specifier.contains(version, prereleases=True):
        text = f"{requirement.name} is {version}, but {requirement.specifier} is needed."
    else:
        return
    yield Diagnosis("versions", ERROR, text, f'pip install "{requirement.name}{requirement.specifier}"')


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
