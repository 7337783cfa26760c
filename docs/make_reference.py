"""Write `commands.md` and `api.md` from the code: `python docs/make_reference.py`. A test holds that they are current.

What explains rather than lists, such as `reference.md`, is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nnunet_vit_mae
from nnunet_vit_mae.cli.commands import GROUPS, command_module

FOLDER = Path(__file__).parent
COMMANDS = """\
# Commands

For those who look up a flag. This is what `--help` says about every command, made by `make_reference.py`. `mae3d`
lists the commands, and `mae3d NAME` is the same as `mae3d_NAME`.
"""
API = """\
# Python

For those who write scripts. These are the functions that the commands call, and their arguments, made by
`make_reference.py` from the code. All are imported from `nnunet_vit_mae` itself:

```python
from nnunet_vit_mae import load_encoder
```

Axes are z y x, as in nnU-Net. A mistake that the caller can fix raises a `UserError` (a `ValueError`) with a message
of one sentence. Functions that take a dataset, plans or a model read nnU-Net's three variables, such as `nnUNet_raw`,
as the commands do. The examples are tests; `901` is the dataset of the tests.
"""


class _Built(Exception):  # noqa: N818 (not an error)
    """A command has built its parser."""


def parser_of(name: str) -> ArgumentParser:
    """Return the parser of a command, which is stopped where it would read its arguments."""
    built = []

    def stop(parser: ArgumentParser, *_: Any) -> None:
        built.append(parser)
        raise _Built

    with mock.patch.object(ArgumentParser, "parse_args", stop):
        try:
            command_module(name).main([])
        except _Built:
            return built[0]
    raise AssertionError(f"mae3d_{name} has no parser")


def commands_page() -> str:
    """Return the page of all commands."""
    parts = [COMMANDS]
    for title, names in GROUPS.items():
        parts += [f"## {title}\n", *map(_command, names)]
    return "\n".join(parts)


def _command(name: str) -> str:
    parser = parser_of(name)
    lines = [f"### mae3d_{name}", "", parser.description or ""]
    flags = [action for action in parser._actions if action.dest != "help" and action.help != SUPPRESS]
    if flags:
        lines += ["", "| flag | value | default | meaning |", "|---|---|---|---|", *map(_row, flags)]
    if parser.epilog:
        lines += ["", "```", *(line.strip() for line in parser.epilog.splitlines()[1:]), "```"]
    return "\n".join([*lines, ""])


def _row(action: Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if action.choices:
        value = " ".join(map(str, action.choices))
    if action.nargs == "+":
        value += " ..."
    cells = (f"`{name}`", f"`{value}`" if value else "", _default(action), (action.help or "").replace("%%", "%"))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(action: Action) -> str:
    if action.required and action.option_strings:
        return "required"
    if isinstance(action.default, list):
        return " ".join(map(str, action.default))
    return "" if action.default is None or action.default is False else str(action.default)


def api_page() -> str:
    """Return the page of the Python interface."""
    return "\n".join([API, *(_entry(name, getattr(nnunet_vit_mae, name)) for name in nnunet_vit_mae.API)])


def _entry(name: str, value: Any) -> str:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    head = _signature(node) if isinstance(node, ast.FunctionDef) else "\n".join(_fields(value))
    docstring = inspect.cleandoc(value.__doc__ or "")
    return "\n".join([f"## {name}", "", "```python", head, "```", "", *_markdown(docstring), ""])


def _signature(node: ast.FunctionDef) -> str:
    arguments = node.args
    given = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    words = list(map(_argument, arguments.args, given))
    if arguments.kwonlyargs:
        words += ["*", *map(_argument, arguments.kwonlyargs, arguments.kw_defaults)]
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(words)}){returned}"
    if len(line) <= 100:
        return line
    return f"{node.name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returned}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{annotation}" + (f" = {ast.unparse(default)}" if default else "")


def _fields(value: type) -> Iterator[str]:
    """Yield the lines of a class down to its fields, with their comments."""
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    yield f"class {value.__name__}" + (f"({', '.join(bases)})" if bases else "")
    body = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    lines = textwrap.dedent(inspect.getsource(value)).splitlines()
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign):
            yield from lines[node.lineno - 1 : node.end_lineno]


def _markdown(docstring: str) -> Iterator[str]:
    """Yield a docstring's lines with its sections as headings, lists and code."""
    section = ""
    for line in docstring.splitlines():
        if line in ("Args:", "Returns:", "Raises:", "Example:"):
            section = line[:-1]
            yield {"Args": "Arguments:"}.get(section, line)
            yield ""
            if section == "Example":
                yield "```pycon"
        elif section in ("Args", "Raises") and line.startswith("    ") and not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            yield f"- `{name}`: {rest}"
        elif section == "Example":
            yield line[4:]
        elif section in ("Args", "Raises"):
            yield f"  {line.strip()}".rstrip()
        else:
            yield line.strip() if section else line
    if section == "Example":
        yield "```"


PAGES = {"commands.md": commands_page, "api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
