"""Statements of the pages on exit codes, files and links agree with the code."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import llamamoe
from llamamoe import errors
from llamamoe.checkpoint.out_folder import DERIVED_FILE, HEAL_RECEIPT_FILE, HEAL_RECIPE_FILE, RECEIPT_FILE, RECIPE_FILE
from tests.dense import make_dense

from .pages import ROOT, blocks

sys.path.insert(0, str(ROOT / "docs"))
from generator import api, repository
from generator.markdown import code, table

DOCS = ROOT / "docs"


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| (.*?) ?\|$", (DOCS / "reference/exit-codes.md").read_text(), re.MULTILINE)
    said = {name: int(number) for number, names in rows for name in re.findall(r"`(\w+)`", names)}
    public = {name: getattr(errors, name) for name in api.public_names() if name.endswith("Error")}
    assert said == {name: error.exit_code for name, error in public.items()}
    assert {"0", "130"} <= {number for number, _ in rows}


def test_files_of_a_conversion_are_named(tmp_path: Path) -> None:
    page = (DOCS / "reference/files.md").read_text(encoding="utf-8")
    llamamoe.split(make_dense(tmp_path / "dense", "llama"), tmp_path / "moe", verify=False)
    for file in (tmp_path / "moe").iterdir():
        assert f"`{file.name}`" in page, file.name
    for name in (RECIPE_FILE, RECEIPT_FILE, HEAL_RECIPE_FILE, HEAL_RECEIPT_FILE, DERIVED_FILE):
        assert f"`{name}`" in page


def test_environment_variables_are_named() -> None:
    """On a page, or in the help that pages are made of."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "llamamoe").rglob("*.py"))
    shown = [*DOCS.rglob("*.md"), *(ROOT / "cli").rglob("*.py")]
    said = "".join(path.read_text(encoding="utf-8") for path in shown)
    names = set(re.findall(r"LLAMAMOE_[A-Z_]+", code))
    assert "LLAMAMOE_LINKS_INTO" in names
    assert names <= set(re.findall(r"LLAMAMOE_[A-Z_]+", said))


def test_links_to_the_repository_lead_to_pages_or_copies() -> None:
    text = "[a](../../recipes/split/cmoe.yaml) [b](../../BENCHMARKS.md#exactness) [c](../../LICENSE) [d](quality.md)"
    assert repository.with_links(text, "concepts/x.md") == (
        "[a](../reference/shipped-recipes.md#split-cmoe) [b](../benchmarks.md#exactness) [c](../files/LICENSE) [d](quality.md)"
    )


def test_links_of_the_repository_to_pages_stay_on_the_site() -> None:
    assert "(how-to/family.md)" in repository.shown("CONTRIBUTING.md", "contributing.md")
    assert "(docs/how-to/family.md)" in (ROOT / "CONTRIBUTING.md").read_text()


def test_links_of_pages_lead_somewhere_in_the_repository_too() -> None:
    """But for pages that only the site has."""
    generated = re.compile(r"docs/reference/(cli|recipes|shipped-recipes|methods|json|api/\w+)\.md")
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)):
            target = (page.parent / link).resolve()
            if not link.startswith("https:") and not target.exists():
                assert generated.fullmatch(target.relative_to(ROOT).as_posix()), f"{page}: {link}"


@pytest.mark.parametrize("name", sorted(file.name for file in (DOCS / "pictures").iterdir()))
def test_pictures_are_drawn_from_the_results(name: str, pictures: dict[str, bytes]) -> None:
    assert (DOCS / "pictures" / name).read_bytes() == pictures[name], "python docs/generator/pictures.py"


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    pytest.importorskip("matplotlib", minversion="3.11.2")
    from generator.pictures import drawn

    found = drawn()
    assert set(found) == {file.name for file in (DOCS / "pictures").iterdir()}
    return found


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert page.relative_to(DOCS).as_posix() in nav, page


def test_public_names_have_pages_and_docstrings() -> None:
    assert set(api.public_names()) == {name for name in llamamoe.__all__ if name != "__version__"}
    assert {name.split(".")[1] for name in api.public_names().values()} == {
        module for *_, modules in api.GROUPS.values() for module in modules
    } - {"_version"}


def test_a_public_name_without_a_docstring_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from llamamoe.conversion import split

    assert api.missing("llamamoe.conversion.split", "split") == []
    monkeypatch.setattr(split.split, "__doc__", None)
    assert api.missing("llamamoe.conversion.split", "split") == ["llamamoe.conversion.split.split"]
    with pytest.raises(ValueError, match="without a docstring: llamamoe\\.conversion\\.split\\.split"):
        api.pages()


def test_a_bar_in_code_ends_no_cell() -> None:
    assert table(("a",), [[code("x|y")]]).splitlines()[-1] == "| <code>x&#124;y</code> |"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_pages_speak_plainly(page: Path) -> None:
    """Nothing from other hosts is loaded, and headings are sentences of one page."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"!\[[^]]*\]\(https?:", text)
    assert len(re.findall(r"^# ", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)) == 1


def shown_commands() -> list[str]:
    """Every command line of llamamoe on a page, also those that no test can run as they stand."""
    found = set()
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", *(ROOT / "recipes").rglob("*.md")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        code = "\n".join(block for _, block in blocks(text, "console", "bash"))
        code += "\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE))
        found |= set(re.findall(r"^(?:torchrun .*-m )?llamamoe(?:_cli)? ([a-z-]+ .*)$", code, re.MULTILINE))
    return sorted(found)


@pytest.mark.parametrize("line", shown_commands())
def test_commands_that_are_only_shown_have_options_that_exist(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    root = importlib.import_module("llamamoe_cli.main").root
    command = root.get_command(None, name)
    assert command is not None, name
    # click keeps the help option of a command's first context, which a test of -h would see
    outer = root.context_class(root, **root.context_settings)
    with command.context_class(command, info_name=name, parent=outer) as context:
        command.make_parser(context).parse_args(list(arguments))
        recipe = dict(pairwise(arguments)).get("--recipe", "")
        shipped = {file.stem for file in (ROOT / "recipes").rglob("*.yaml")}
        assert not re.fullmatch(r"\w+", recipe) or recipe in shipped, recipe
