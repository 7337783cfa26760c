"""Python, the installed packages, and whether they fit one another."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec

from packaging.requirements import Requirement

from nnunet_vit_mae.doctor.diagnosis import ERROR, OK, WARNING, Diagnosis
from nnunet_vit_mae.errors import first_line

PACKAGE = "nnunet-vit-mae"
NAMED = ("torch", "torchvision", "nnunetv2", "dynamic-network-architectures")  # whose versions a report should state
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


def diagnose_compiler() -> Iterator[Diagnosis]:
    """Yield whether torch.compile can make kernels for a GPU."""
    if find_spec("triton") is None:
        advice = "Leave nnUNet_compile unset, or set it to f."
        yield Diagnosis("compile", WARNING, "Triton is missing: torch.compile cannot make kernels for a GPU.", advice)
    else:
        yield Diagnosis("compile", OK, "Triton is installed: torch.compile can be used.")


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
