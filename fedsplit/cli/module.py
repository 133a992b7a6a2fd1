"""`fedsplit module ...`: the versions of trained modules, which one is in use, and how it came there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsplit.cli import module_export
from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.core.errors import ConfigError

if TYPE_CHECKING:
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.registry.registry import ModuleRegistry
    from fedsplit.registry.version import Promotion

app = typer.Typer(
    help="The registry of modules: what was trained from what, which version is in use, and since when.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RegistryOption = Annotated[
    Path | None,
    typer.Option(
        "--registry", metavar="DIR", help="The registry of modules; else the one near this folder."
    ),
]
FederationOption = Annotated[
    Path | None,
    typer.Option("--federation", metavar="DIR", help="The registry of this federation folder."),
]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="MODULE", help="TASK, TASK@ALIAS, TASK@latest, TASK#3, or 8 digits of a digest."
    ),
]
AliasOption = Annotated[str, typer.Option("--alias", metavar="NAME", help="Which alias moves.")]
ByOption = Annotated[
    str, typer.Option("--by", metavar="NAME", help="Who decided it; else the account's name.")
]
WhyOption = Annotated[
    str, typer.Option("--why", metavar="TEXT", help="A sentence that is kept with it.")
]


@app.command("list")
def list_modules(
    task: Annotated[str, typer.Argument(metavar="[TASK]", help="Only this task's.")] = "",
    *,
    tag: Annotated[str, typer.Option("--tag", metavar="WORD", help="Only those with it.")] = "",
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show all versions, by task, with their scores and aliases."""
    from fedsplit.cli.module_view import record_of, versions_table

    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        found = [v for v in kept.versions(task) if not tag or tag in v.tags]
        place = str(kept.path)
    if found:
        out.show(versions_table(found))
    else:
        which = "No such module" if task or tag else "No module yet"
        out.show(f"{which} in {place}. Each run adds the one that it trained.")
    out.result({"registry": place, "modules": [record_of(version) for version in found]})


@app.command("show")
def show(
    module: Reference,
    *,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show all that is known of a version: sites, scores, settings, parents, promotions."""
    from fedsplit.cli.module_view import record_of, show_version

    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        version = kept.get(module)
        names = {v.digest: v.name for v in kept.versions()}
        history = [p for p in kept.history(version.task) if p.digest == version.digest]
        folder = kept.folder(version)
    show_version(out, version, folder, names, history)
    moves = [move.model_dump(mode="json") for move in history]
    out.result(record_of(version) | {"folder": str(folder), "promotions": moves})


@app.command("compare")
def compare(
    first: Reference,
    second: Reference,
    *,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what differs between two versions: scores by site, settings, classes, backbone."""
    from fedsplit.cli.module_view import compared, show_compared

    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        one, other = kept.get(first), kept.get(second)
    found = compared(one, other)
    show_compared(out, one, other, found)
    out.result(found)


@app.command("promote")
def promote(
    module: Reference,
    *,
    alias: AliasOption = "production",
    by: ByOption = "",
    why: WhyOption = "",
    expected: Annotated[
        str,
        typer.Option(
            "--expected",
            metavar="MODULE",
            help="Only if the alias still points to this version.",
        ),
    ] = "",
    unmeasured: Annotated[
        bool,
        typer.Option(
            "--unmeasured",
            help="In a federation: without the measurement at the sites; the audit log says so.",
        ),
    ] = False,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Have an alias point to a version, all at once. Two at the same time: one is refused.

    In a federation `production` is measured first, on each site's own test samples; [promotion] in federation.toml decides.
    """
    from fedsplit.plant.server.modules import federation_of

    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        version = kept.get(module)
        before = kept.aliases().get(version.task, {}).get(alias, "")
        wanted = kept.get(expected).digest if expected else before
        # What is decided between this look and the move, such as a measurement at the sites, takes its time: whoever
        # promotes meanwhile is not overruled.
        measured: dict[str, str] = {}
        if (folder := federation_of(kept.path)) is not None and wanted == before:
            from fedsplit.cli.promote import decided_by

            measured = decided_by(
                folder, kept, version, alias=alias, unmeasured=unmeasured, out=out
            )
        moved = kept.promote(
            version.name,
            alias=alias,
            by=by or _account(),
            why=why,
            expected=wanted,
            measured=measured,
        )
        names = _names(kept, version.task)
    _tell(out, moved, names)
    _tell_sites(out, moved, folder)


@app.command("rollback")
def rollback(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task.")],
    *,
    alias: AliasOption = "production",
    by: ByOption = "",
    why: WhyOption = "",
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Have an alias point to where it pointed before. Again: one further back."""
    from fedsplit.plant.server.modules import federation_of

    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        moved = kept.rollback(task, alias=alias, by=by or _account(), why=why)
        names = _names(kept, task)
        folder = federation_of(kept.path)
    _tell(out, moved, names)
    _tell_sites(out, moved, folder)


@app.command("tag")
def tag(
    module: Reference,
    word: Annotated[str, typer.Argument(metavar="WORD", help="Letters, digits, - _ .")],
    *,
    off: Annotated[bool, typer.Option("--off", help="Take the word away.")] = False,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Mark a version with a word; `module list --tag WORD` finds it."""
    from fedsplit.cli.module_view import record_of

    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        version = kept.tag(module, word, off=off)
    out.show(f"{version.name} has the tags: {', '.join(version.tags) or '(none)'}")
    out.result(record_of(version))


def export_file(
    module: str, file: Path, *, registry: Path | None, federation: Path | None, out: Output
) -> None:
    """`module export MODULE FILE.zip`: a version as one file, for the registry of another machine."""
    with _opened(registry, federation) as kept:
        version = kept.get(module)
        kept.export(version.name, file)
    out.show(
        f"{version.shown} is in {file} ({file.stat().st_size / 1e6:.1f} MB), with the names and scores of its sites. "
        f"There: fedsplit module import {file.name}"
    )
    out.result({"module": version.name, "digest": version.digest, "file": str(file)})


app.command("export")(module_export.export)


@app.command("import")
def import_module(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A file of `module export`, or the folder of a run that has ended."
        ),
    ],
    *,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Add a version: from a file of `module export`, or from the folder of a run."""
    from fedsplit.cli.module_view import record_of
    from fedsplit.registry.of_run import facts_of_folder

    out = Output(as_json=as_json)
    if not path.exists():
        raise ConfigError(
            f"there is no {path}; give a file of `fedsplit module export`, or the folder of a run"
        )
    with _opened(registry, federation, create=True) as kept:
        if path.is_dir():
            version = kept.add(path / "module", facts_of_folder(path))
        else:
            version = kept.import_(path)
    out.show(
        f"{version.shown} is in the registry {kept.path}. In use is what an alias points to: fedsplit module promote "
        f"{version.name}"
    )
    out.result(record_of(version))


@app.command("remove")
def remove(
    module: Reference,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that is in use, with its aliases.")
    ] = False,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Delete a version and its files. Its number is not given again."""
    out = Output(as_json=as_json)
    with _opened(registry, federation) as kept:
        version = kept.remove(module, force=force)
    gone = f", and with it the aliases {', '.join(version.aliases)}" if version.aliases else ""
    out.show(f"{version.name} is removed{gone}.")
    out.result({"module": version.name, "digest": version.digest, "aliases": list(version.aliases)})


@app.command("reindex")
def reindex(
    *,
    registry: RegistryOption = None,
    federation: FederationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the registry's database anew from its files, after it was damaged or lost.

    Exit codes: 0 all is there again, 3 something was left out and is told.
    """
    from fedsplit.registry.registry import ModuleRegistry

    out = Output(as_json=as_json)
    place = _place(registry, federation)
    found = ModuleRegistry.reindex(place)
    for problem in found.problems:
        out.note(f"warning: {problem}")
    out.show(f"{place} has {found.versions} versions and {found.aliases} aliases.")
    out.result(
        {
            "registry": str(place),
            "versions": found.versions,
            "aliases": found.aliases,
            "problems": list(found.problems),
        }
    )
    if found.problems:
        raise typer.Exit(3)


@contextmanager
def _opened(
    registry: Path | None, federation: Path | None, *, create: bool = False
) -> Iterator[ModuleRegistry]:
    from fedsplit.plant.server.modules import audit_of
    from fedsplit.registry.registry import ModuleRegistry

    place = _place(registry, federation, create=create)
    with ModuleRegistry.open(place, create=create, audit=audit_of(place)) as kept:
        yield kept


def _place(registry: Path | None, federation: Path | None, *, create: bool = False) -> Path:
    """The folder of the registry that is meant. Raises ConfigError."""
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.predict.found import registry_folder

    if registry is not None and federation is not None:
        raise ConfigError("--registry and --federation name two registries; give one of them")
    if federation is not None:
        return FederationFolder.at(federation).modules
    found = registry_folder(registry)
    if found is None and create:
        return Path("runs/modules").absolute()
    if found is None:
        raise ConfigError(
            f"there is no registry of modules near {Path.cwd()}: neither modules nor runs/modules; give its folder with "
            f"--registry, or a federation's with --federation"
        )
    return found.absolute()


def _account() -> str:
    import getpass

    from fedsplit.core.foreign import printable

    try:
        return printable(getpass.getuser(), limit=100)
    except (OSError, KeyError):
        return ""


def _names(kept: ModuleRegistry, task: str) -> dict[str, str]:
    return {version.digest: version.name for version in kept.versions(task)}


def _tell_sites(out: Output, moved: Promotion, folder: FederationFolder | None) -> None:
    if folder is not None and moved.alias == "production" and moved.digest != moved.previous:
        out.note(
            "The sites that are up use it within a minute; `fedsplit status` shows which one has it."
        )


def _tell(out: Output, moved: Promotion, names: dict[str, str]) -> None:
    name = names.get(moved.digest, moved.digest[:12])
    before = names.get(moved.previous, moved.previous[:12]) or "none"
    if moved.digest == moved.previous:
        out.show(f"{moved.task}@{moved.alias} is {name}, as before.")
    else:
        out.show(f"{moved.task}@{moved.alias} is {name} now; before: {before}.")
    out.result(moved.model_dump(mode="json") | {"module": name, "previous_module": before})
