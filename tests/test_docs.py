"""The documentation holds together: links, setting names, command lines, and no path of one machine."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from PIL import Image

from fedsplit.cli.main import app
from fedsplit.cli.request import prepare
from fedsplit.core.config import RunConfig, parse_set
from fedsplit.training.site_settings import NODE_KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "fedsplit" / "assets").rglob("*.md")),
]
KEYS = set(RunConfig.keys())
# Written like settings, and none: a line of Excel, Flower's own and the claims of a token.
NO_SETTINGS = {"sep", "client-resources-num-cpus", "num-supernodes", "iss", "aud"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEY_VALUE = re.compile(r"^([a-z][a-z-]*)=")
MACHINE_PATH = re.compile(r"(?<![\w.~$}/:])/(?:work|home|root|tmp|Users|opt|mnt|media)/")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def without_blocks(text: str) -> str:
    """The prose: no fenced blocks, no indented ones."""
    lines = FENCE.sub("", text).splitlines()
    return "\n".join(line for line in lines if not line.startswith("    "))


def blocks(text: str) -> list[str]:
    """Fenced and indented blocks, and code spans of prose: wherever a command may stand."""
    found = [body for kind, body in FENCE.findall(text) if kind in {"", "sh", "bash", "console"}]
    block: list[str] = []
    for line in [*FENCE.sub("", text).splitlines(), "."]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line.strip())
        elif block:
            found.append("\n".join(block))
            block = []
    return found + CODE_SPAN.findall(without_blocks(text))


def commands(text: str, program: str) -> list[list[str]]:
    """Every call of `program` in the page's code, in words; continued lines are joined."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#\s.*$", "", line).strip()
            for part in re.split(r"\s*(?:&&|;\s+|>)\s*", line):
                words = shlex.split(part, posix=True) if balanced(part) else part.split()
                if words and Path(words[0]).name == program:
                    found.append(words[1:])
    return found


def balanced(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


def slugs(page: Path) -> set[str]:
    """The anchors of a page, as its headings make them."""
    headings = re.findall(
        r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pages
def test_internal_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor:
            assert anchor in slugs(file), f"{target} has no such heading"


def test_every_page_is_reached_from_the_map() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            file = (page.parent / target.partition("#")[0]).resolve()
            if "://" not in target and file.suffix == ".md" and file.exists():
                waiting.append(file)
    # Decisions are listed by their folder: a new one needs no line in the map.
    unreached = {p for p in PAGES if "adr" not in p.parts} - seen
    assert not unreached, f"no link leads to {sorted(map(name_of, unreached))}"


@pages
def test_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = KEYS | set(NODE_KEYS) | NO_SETTINGS
    for span in CODE_SPAN.findall(without_blocks(text)):
        match = KEY_VALUE.match(span)
        if match and " " not in span.partition("=")[0]:
            assert match[1] in known, f"`{span}`: there is no setting {match[1]!r}"
    for words in commands(text, "fedsplit"):
        for option, value in itertools.pairwise(words):
            if option == "--set" and value != "KEY=VALUE":
                assert value.partition("=")[0] in KEYS, f"--set {value}: no such setting"


@pages
def test_command_lines_parse(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8"), "fedsplit"):
        if "|" in words or "..." in words:
            continue  # a list of commands, not a command
        # A variable that the page had the reader set.
        check_parses(["8443" if word == "$PORT" else word for word in words])


def check_parses(words: list[str]) -> None:
    """Walk down to the command and let click read its options; nothing is run."""
    command: click.Command = typer.main.get_command(app)
    path = ["fedsplit"]
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            names = {name for p in command.params for name in p.opts} | {"--help", "--json"}
            assert all(w in names for w in words), f"{' '.join([*path, *words])}: unknown option"
            return
        path.append(words.pop(0))
        found = command.commands.get(path[-1])
        assert found is not None, f"there is no command `{' '.join(path)}`"
        command = found
    if not words:
        return  # the command's name alone, in prose
    shown = " ".join([*path, *words])
    try:
        command.make_context(path[-1], words, resilient_parsing=False)
    except click.exceptions.Exit:
        pass  # --help
    except click.UsageError as err:
        pytest.fail(f"`{shown}`: {err.format_message()}")


@pages
def test_no_path_of_one_machine(page: Path) -> None:
    found = MACHINE_PATH.search(page.read_text(encoding="utf-8"))
    assert found is None, f"names a path of one machine near {found.group() if found else ''}"


def test_the_commands_of_the_reference_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    for name, command in root.commands.items():
        leaves = command.commands.items() if isinstance(command, click.Group) else [("", command)]
        for leaf, one in leaves:
            title = f"## `fedsplit {name} {leaf}".rstrip() + "`"
            assert title in text, f"docs/reference/cli.md has no section {title}"
            section = text.split(title, 1)[1].split("\n## ", 1)[0]
            for parameter in one.params:
                assert parameter.opts[0] in section, f"{title}: {parameter.opts[0]} is missing"


def test_resume_lists_the_settings_that_may_change() -> None:
    from fedsplit.core.config import RESUME_KEYS

    text = (ROOT / "docs" / "how-to" / "resume.md").read_text(encoding="utf-8")
    listed = text.split("may have changed:", 1)[1].split("    fedsplit", 1)[0]
    assert set(CODE_SPAN.findall(listed)) == set(RESUME_KEYS)


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        for words in commands(page.read_text(encoding="utf-8"), "make"):
            assert not words or words[0] in targets, f"{name_of(page)}: no target {words[0]!r}"


def test_the_licence_is_the_declared_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


@pytest.mark.parametrize("backbone", ["bundled", "four blocks"])
@pytest.mark.parametrize("page", ["README.md", "docs/how-to/choose-a-method.md"])
def test_recommended_commands_could_start(
    page: str,
    backbone: str,
    tiny: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the moment before Flower starts, on any backbone, with a folder of images in place of PATH."""
    for i in range(24):
        file = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    stands_for = {
        "DIR": str(tiny["vit"]) if backbone == "four blocks" else "vit-glyphs",
        "PATH": str(tmp_path / "pictures"),
        "NAME": "surface",
    }
    monkeypatch.chdir(tmp_path)
    calls = [
        words
        for words in commands((ROOT / page).read_text(encoding="utf-8"), "fedsplit")
        if words[:2] == ["run", "--set"] and "..." not in words
    ]
    assert calls
    for words in calls:
        pairs = [
            re.sub(r"\b(DIR|PATH|NAME)\b", lambda m: stands_for[m[0]], value)
            for option, value in itertools.pairwise(words)
            if option == "--set"
        ]
        request = prepare(parse_set(pairs), app=ROOT)
        assert request.config.run.recipe, f"{words}: a recommended command names a recipe"
        assert request.told
        # Told before anything starts, on a backbone that has never seen such images, and on no other.
        assert bool(request.warnings) == (backbone == "bundled")


def test_the_demos_tables_can_be_put_into_the_pages() -> None:
    spec = importlib.util.spec_from_file_location("demo_pages", ROOT / "scripts" / "demo_pages.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    parts = {part: f"{part}, one\n\n{part}, two" for part in script.PARTS}
    for page in script.PAGES:
        text = page.read_text(encoding="utf-8")
        found = [part for part in script.PARTS if f"<!-- demo: {part} -->" in text]
        assert found
        new = script.filled(text, parts)
        assert all(f"    {part}, one\n\n    {part}, two\n\n" in new for part in found)
        # What stands around the blocks is as it was, and again changes nothing.
        assert script.filled(new, parts) == new
        assert new.split("<!-- demo: ")[0] == text.split("<!-- demo: ")[0]
        assert new.rsplit("two\n", 1)[1] == text[-len(new.rsplit("two\n", 1)[1]) :]
