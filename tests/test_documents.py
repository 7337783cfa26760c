"""The documentation: links lead somewhere, blocks of code are code, and commands take the flags that they are given."""

import argparse
import json
import re
import sys
from functools import cache
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_blocks import BLOCK, SHELL, commands_in, prose_of
from test_package import FLAGS

REPOSITORY = Path(__file__).parent.parent
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "examples").rglob("*.md")),
    *DOCS,
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
MEASURED = re.compile(r"[-+]?[\d.,]+( .*)?")  # a cell of a table
SCRIPTS = {script.name: script for script in entry_points(group="console_scripts")}


class Parsed(Exception):  # noqa: N818 (it is the good end)
    """A command has parsed its arguments."""


@cache
def anchors_of(page: Path) -> set[str]:
    """What the repository's host and MyST make of the headings: lower case, no punctuation, a hyphen for a space."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parse(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a command until it has parsed its arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_only(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    SCRIPTS[name].load()()


def block_name(page: Path, match: re.Match[str]) -> str:
    return f"{page.relative_to(REPOSITORY)}:{page.read_text()[: match.start()].count(chr(10)) + 1}"


BLOCKS = [
    pytest.param(match[1], match[2], id=block_name(page, match))
    for page in PAGES
    if page.name != "api.md"  # has signatures, and examples that are tests
    for match in BLOCK.finditer(page.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose_of(page)):
        if not target.startswith(("http://", "https://")):  # other sites are not asked
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors_of(file), target


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_blocks_are_what_they_say(language, text, monkeypatch):
    """JSON and Python are that, and every command takes its arguments; it is not run."""
    if language == "json":
        json.loads(text)
    elif language == "python":
        compile(text, "block", "exec")
    elif language == SHELL:
        for name, *arguments in commands_in(text):
            assert name in SCRIPTS, name
            with pytest.raises(Parsed):
                parse(name, arguments, monkeypatch)


def test_a_flag_that_does_not_exist_would_be_noticed(monkeypatch, capsys):
    ((name, *arguments),) = commands_in("VARIABLE=1 mae3d_plan -d 501 \\\n  -o 'A name' --sizes S   # a comment\n")
    assert (name, arguments[:4]) == ("mae3d_plan", ["-d", "501", "-o", "A name"])
    with pytest.raises(SystemExit):
        parse(name, arguments, monkeypatch)
    assert "did you mean --size?" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_have_these_flags(page):
    for span in re.findall(r"`(mae3d_[^`]+)`", prose_of(page)):
        name, *words = span.split()
        flags = {word for word in words if re.fullmatch(r"--?[a-z][\w-]*", word)}
        assert flags <= FLAGS.get(name, set()), span


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_first_sentence_says_for_whom_a_page_is(page):
    _, first, *_ = page.read_text().split("\n\n")
    assert first.startswith("For "), first


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_measured_tables_stand_beside_their_command(page):
    for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        cells = [cell.strip() for row in rows for cell in row[1:]]
        if 2 * sum(MEASURED.fullmatch(cell) is not None for cell in cells) > len(cells) > 0:
            assert re.search(r"python benchmarks/|mae3d_\w+ -", section), section.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_stand_between_empty_lines(page):
    """A table that a replacement has put into a sentence is none."""
    for paragraph in prose_of(page).split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        rows = [line for line in lines if line.lstrip().startswith("| ")]
        assert not rows or (lines[0] == rows[0] and lines[1].startswith("|-") and len(rows) == len(lines) - 1), lines


def test_all_that_reproduces_a_paper_has_its_recipe_and_encoders_that_have_not_seen_the_development_set():
    page = REPOSITORY / "docs" / "reproduce.md"
    planned, pretrained = set(), {}
    for name, *words in (command for _, text in BLOCK.findall(page.read_text()) for command in commands_in(text)):
        flags = dict(pairwise(words))
        if name == "mae3d_plan":
            assert "--recipe" in flags or flags["-p"] in planned, words
            planned.add(flags["-o"])
            if "--encoder" in flags:
                file = Path(flags["--encoder"])
                plans = file.parts[-3].split("__")[1]
                assert file.parent.name == f"fold_{pretrained[plans]}", words
        elif name == "mae3d_pretrain":
            pretrained[flags["-p"]] = flags.get("-f", "all")
            assert flags.get("-f") == "0" or flags["-d"] == "502", words  # 502 has no validation cases
        elif name == "nnUNetv2_train":
            assert flags["-p"] in planned, words


def test_each_model_of_the_papers_has_a_trainer():
    text = (REPOSITORY / "docs" / "reproduce.md").read_text()
    vitiac, amae = text[: text.index("## AMAE")], text[text.index("## AMAE") :]
    for name in ("nnUNetTrainerViTMAE", "nnUNetTrainerViTScratch", "nnUNetTrainerBaseline"):  # table 2
        assert f"-tr {name}" in vitiac
    for name in ("BaselineAdamW", "ViTScratch", "AMAEScratch", "AMAE", "ViTMAE"):  # table 1
        assert f"| `nnUNetTrainer{name}`" in amae


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "index.md").read_text()
    contents = index.split("```{toctree}")[1].split("```")[0].split()
    names = {page.stem for page in DOCS} - {"index"}
    assert names == {Path(target).stem for target in LINK.findall(index)} == set(contents) - {":hidden:"}
