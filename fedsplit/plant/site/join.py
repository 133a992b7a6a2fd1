"""`site join`: makes this machine a site of a federation, by a code. All or nothing; keys are made here and stay here.

First what can be known before the code is used up: folder, server (clock, version, the CA that the code names), data,
disk. Then one request. A line that is cut after it loses nothing: the same command goes on with the same keys.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedsplit import __version__
from fedsplit.core.errors import (
    ConfigError,
    NotMemberError,
    PlantError,
    ServerAwayError,
    ServerRefusalError,
)
from fedsplit.core.foreign import printable
from fedsplit.core.names import certificate_name
from fedsplit.core.whole_files import free_bytes, write_whole
from fedsplit.plant import pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.lock import taken
from fedsplit.plant.site import keys, settings_text, source
from fedsplit.plant.site.calls import ControlCalls
from fedsplit.plant.site.folder import SETTINGS, SiteFile, SiteFolder
from fedsplit.plant.site.trust import believed
from fedsplit.plant.site.wish import Wish, draft_of
from fedsplit.plant.wire import JoinAnswer, JoinRequest, Report

LEAST_FREE_BYTES = 64 << 20
"""For keys, logs and records; what the backbone's parts need is known once the site is a member."""
_IGNORED = {keys.JOINING, "lost+found", ".DS_Store"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Joined:
    """What came of it."""

    folder: SiteFolder
    seen: source.Seen
    again: bool
    cut: str
    """The cut that runs have here unless they say otherwise."""


def join(wish: Wish, say: Say) -> Joined:
    """Join. Raises ConfigError, DataError and PlantError, each before anything is used up or with what goes on."""
    folder = SiteFolder(wish.folder.expanduser().absolute())
    with _made(folder.path, wish.code), contextlib.ExitStack() as alone:
        again = _again(folder, wish)
        if again:
            alone.callback(taken(folder.state).release)
        draft = draft_of(folder, wish, again=again)
        ca = believed(wish.code, say)
        seen = source.look_at(draft)
        say(f"Data: {seen}")
        for note in seen.notes:
            say(f"Note: {note}")
        made = _keys(folder, wish.code)
        answer = _redeemed(wish.code, ca, made)
        _written(folder, draft, answer, made, again=again)
    if again:
        _used_once(folder, say)
    return Joined(SiteFolder.at(folder.path), seen, again, draft.site.cut or answer.cut)


@contextmanager
def _made(path: Path, code: JoinCode) -> Iterator[None]:
    """The folder is there; where nothing came of the join it is as it was before, but for a join that can go on."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    under_way = keys.code_of(path)
    was_empty = bool(missing) or not any(path.iterdir() if path.is_dir() else ())
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(
            f"{printable(path)} cannot be made ({err.strerror}); choose a folder on a disk that can be written"
        ) from err
    try:
        yield
    except BaseException as err:
        # Keys that a server may have been told of stay, those of another code's join too.
        told = isinstance(err, _GoesOnError | KeyboardInterrupt) or under_way not in ("", code.id)
        if not told or isinstance(err, ServerRefusalError):
            shutil.rmtree(path / keys.JOINING, ignore_errors=True)
        if was_empty and not any(path.iterdir()):
            for one in missing:
                with contextlib.suppress(OSError):
                    one.rmdir()
        raise


class _GoesOnError(ServerAwayError):
    """The request may have arrived: the keys that it named are kept."""


def _again(folder: SiteFolder, wish: Wish) -> bool:
    """Is it a site already, and may it get new keys? Raises ConfigError where something else is there."""
    if keys.code_of(folder.path) == wish.code.id and not (folder.path / SETTINGS).exists():
        return False
    there = sorted(p.name for p in folder.path.iterdir() if p.name not in _IGNORED)
    if not there:
        return False
    if SETTINGS not in there:
        raise ConfigError(
            f"{printable(folder.path)} is not empty (it holds {printable(', '.join(there[:5]), limit=200)}) and no site "
            f"folder; give a new folder with --dir"
        )
    site = folder.settings.site
    if wish.again or keys.code_of(folder.path) == wish.code.id:
        return True
    reason = _no_member(folder)
    if not reason:
        raise ConfigError(
            f"{printable(folder.path)} is the folder of site {site.name!r}, which is a member of the federation at "
            f"{site.address}. Give --again to replace its keys, or another folder with --dir"
        )
    return True


def _no_member(folder: SiteFolder) -> str:
    """Why the site of this folder is no member any more; empty where it is one. Raises ConfigError if nobody can say."""
    try:
        ends = keys.ends(keys.certificate(folder))
        if ends < time.time():
            return f"its certificate was over on {keys.day(ends)}"
        pair = (folder.certificate, folder.certificate_key)
        with ControlCalls(folder.settings.site.address, folder.ca, pair) as calls:
            answer = calls.report(Report(state="stopping", fedsplit_version=__version__))
        return "" if answer.standing == "member" else answer.standing
    except (ConfigError, NotMemberError, ServerRefusalError) as err:
        return str(err)
    except PlantError as err:
        raise ConfigError(
            f"{printable(folder.path)} is the folder of site {folder.settings.site.name!r}, and its server does not say how "
            f"it stands: {err}. Give --again to join with new keys all the same"
        ) from err


def _keys(folder: SiteFolder, code: JoinCode) -> keys.JoiningKeys:
    """The keys, on disk before anybody is told of them. Raises ConfigError for a disk that does not take them."""
    if (free := free_bytes(folder.path)) < LEAST_FREE_BYTES:
        raise ConfigError(
            f"the disk of {printable(folder.path)} has {free / 1e6:,.0f} MB free, a site needs at least "
            f"{LEAST_FREE_BYTES / 1e6:,.0f} MB; free some, or choose another folder. The code is not used up"
        )
    try:
        return keys.JoiningKeys.of(folder.path, code.id)
    except OSError as err:
        raise ConfigError(
            f"{printable(folder.path)} cannot be written ({err.strerror}); choose a folder on a disk that can be. The code "
            f"is not used up"
        ) from err


def _redeemed(code: JoinCode, ca: str, made: keys.JoiningKeys) -> JoinAnswer:
    """Send the request and check what comes. Raises PlantError."""
    request = JoinRequest(
        code_id=code.id,
        secret=code.secret,
        csr=pki.csr(made.key, "site").decode("ascii"),
        node_key=made.node_public,
        fedsplit_version=__version__,
    )
    try:
        with ControlCalls(code.address, ca) as calls:
            answer = calls.join(request)
    except (ServerRefusalError, NotMemberError) as err:
        raise ServerRefusalError(f"the server does not take this code: {err}") from err
    except ServerAwayError as err:
        raise _GoesOnError(
            f"{err}. Run the same command again: it goes on where this one stopped"
        ) from err
    certificate = pki.read_certificate(answer.certificate.encode(), what="the site's certificate")
    if certificate.public_key() != made.key.public_key():
        raise ServerRefusalError("the server sent a certificate of another key; ask for a new code")
    name = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if not name or name[0].value != certificate_name(answer.site):
        raise ServerRefusalError(
            f"the server sent a certificate that is not of site {answer.site!r}; ask for a new code"
        )
    if pki.fingerprint(pki.read_certificate(answer.ca.encode())) != code.ca_fingerprint:
        raise ServerRefusalError(
            "the server sent another CA than the code names; ask for a new code"
        )
    return answer


def _written(
    folder: SiteFolder,
    draft: SiteFile,
    answer: JoinAnswer,
    made: keys.JoiningKeys,
    *,
    again: bool,
) -> None:
    """Write the folder; site.toml comes last and makes it one. Raises _GoesOnError where the disk does not take it."""
    given = {
        "name": answer.site,
        "address": draft.site.address,
        "backbone-sha256": answer.backbone_sha256,
    }
    files = made.files | {"site.pem": answer.certificate, "ca.pem": answer.ca}
    try:
        if again:
            text = settings_text.changed(
                (folder.path / SETTINGS).read_text(encoding="utf-8"), given
            )
        else:
            values = draft.model_dump(by_alias=True)
            values["site"] |= given
            text = settings_text.written(SiteFile.model_validate(values))
        for one in (folder.backbones, folder.kept, folder.logs, folder.present):
            one.mkdir(exist_ok=True, mode=0o700)
        folder.superexec_secret.parent.mkdir(exist_ok=True, mode=0o700)
        if not folder.superexec_secret.is_file():
            write_whole(folder.superexec_secret, secrets.token_hex(32), mode=0o600)
        keys.put(folder.path, files, keep_old=again)
        write_whole(folder.path / SETTINGS, text)
    except OSError as err:
        raise _GoesOnError(
            f"the server took the code, and {printable(folder.path)} cannot be written ({err.strerror}); free some space and "
            f"run the same command again: it goes on where this one stopped"
        ) from err
    made.forget()


def _used_once(folder: SiteFolder, say: Say) -> None:
    """Use the new keys, and forget those before."""
    pair = (folder.certificate, folder.certificate_key)
    try:
        with ControlCalls(SiteFolder(folder.path).settings.site.address, folder.ca, pair) as calls:
            calls.report(Report(state="stopping", fedsplit_version=__version__))
    except PlantError as err:
        say(f"The new keys could not be used yet ({err}); those before are kept in {keys.OLD}")
        return
    keys.forget_old(folder.path)
