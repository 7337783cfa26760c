"""What the package imports is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PACKAGE = "nnunet_vit_mae"
PROVIDED_BY = packages_distributions()  # distributions by top-level module


def normalised(distribution: str) -> str:
    """The spelling in which names of distributions are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared() -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]  # argcomplete is asked for by shells, highdicom by --dicom
    requirements = [*project["dependencies"], *extras["completion"], *extras["dicom"]]
    return {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imported(source: str) -> set[str]:
    """Top-level modules that a source file imports anywhere, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.split(".")[0])
    return modules


def undeclared(modules: set[str], requirements: set[str]) -> set[str]:
    """Modules that neither Python nor a required distribution provides."""
    return {
        module
        for module in modules - sys.stdlib_module_names - {PACKAGE}
        if not requirements & {normalised(name) for name in PROVIDED_BY.get(module, [])}
    }


def test_every_imported_module_belongs_to_a_declared_requirement():
    sources = [file for folder in (PACKAGE, "trainers") for file in (REPOSITORY / folder).rglob("*.py")]
    assert len(sources) > 50
    for file in sources:
        assert not undeclared(imported(file.read_text()), declared()), file


def test_a_missing_requirement_would_be_noticed():
    modules = imported("import os\ndef function():\n    from scipy import ndimage\n    import numpy.linalg")
    assert modules == {"os", "scipy", "numpy"}
    assert undeclared(modules, {"numpy"}) == {"scipy"}
    assert undeclared({"no_such_module"}, declared()) == {"no_such_module"}
