"""A version as one file that travels: a zip of the module's files and version.json. What comes in is a stranger's.

Only what `pack` writes is read back: plain names, nothing compressed, no comment, no links and no folders. So an archive
never unpacks to more than its own size, nor anywhere but where it should. Caps stand before anything is read or written.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedsplit.core.errors import ConfigError, RegistryError
from fedsplit.core.foreign import parse_json, printable
from fedsplit.core.whole_files import free_bytes, hand_over
from fedsplit.registry.module_files import MAX_FILES, VERSION_FILE, file_digests, is_file_name
from fedsplit.registry.version import Record

MAX_ARCHIVE_BYTES = 2**32 - 2**20
"""What a zip holds without its extension for larger ones."""
_MAX_RECORD_BYTES, _MAX_DIRECTORY_BYTES = 16 * 2**20, 2**16
_END = struct.Struct("<4s4H2IH")
_DATE = (1980, 1, 1, 0, 0, 0)
_CHUNK = 2**20


def pack(folder: Path, record: Record, file: Path) -> None:
    """Write a version to `file`, whole or not at all. Raises ConfigError and RegistryError."""
    if record.size_bytes > MAX_ARCHIVE_BYTES - _MAX_RECORD_BYTES:
        raise ConfigError(
            f"{record.name} has {record.size_bytes} bytes, a file takes at most {MAX_ARCHIVE_BYTES - _MAX_RECORD_BYTES}; copy "
            f"the folder {folder} instead"
        )
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
            # Without a time, so that the same version always makes the same file.
            text = json.dumps(record.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"
            archive.writestr(zipfile.ZipInfo(VERSION_FILE, _DATE), text)
            for name in sorted(file_digests(folder)):
                info = zipfile.ZipInfo(name, _DATE)
                info.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        hand_over(part)
        part.replace(file)
    except OSError as err:
        raise RegistryError(
            f"{file} cannot be written ({err.strerror or err}); free some space there, or choose another place"
        ) from err
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def unpacked(file: Path, beside: Path) -> Iterator[tuple[Path, Record]]:
    """The module's folder and what is known of it, until the block ends; unpacked in `beside`.

    Raises ConfigError for what is no version's file, RegistryError where it cannot be read or there is no room.
    """
    folder = beside / f".import.{os.getpid()}.{os.urandom(4).hex()}.part"
    try:
        try:
            _check_end(file)
            with zipfile.ZipFile(file) as archive:
                record = _unpack(archive, file, folder)
        except OSError as err:
            raise RegistryError(
                f"{file} cannot be imported ({err.strerror or err}); check the file, its rights, and the room in {beside}"
            ) from err
        except (
            zipfile.BadZipFile,
            ValueError,
            EOFError,
            RuntimeError,
            struct.error,
            NotImplementedError,
        ) as err:
            raise _refused(file, printable(err, limit=300)) from err
        yield folder, record
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_end(file: Path) -> None:
    """Look at the archive's end before zipfile does, which reads a list of its files of any length. Raises ValueError."""
    size = file.stat().st_size
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("it is no file")
    if not _END.size <= size <= MAX_ARCHIVE_BYTES:
        raise ValueError(f"it has {size} bytes; {_END.size} to {MAX_ARCHIVE_BYTES} are wanted")
    with file.open("rb") as source:
        source.seek(-min(size, _END.size + 20), os.SEEK_END)
        end = source.read()
    mark, *disks, entries, length, start, comment = _END.unpack(end[-_END.size :])
    if mark != b"PK\x05\x06" or comment or any(disks[:2]):
        raise ValueError("it does not end as a zip of one part without a comment does")
    if end[: -_END.size].startswith(b"PK\x06\x07"):
        raise ValueError("it is a zip of the large kind")
    if not 2 <= entries <= MAX_FILES + 1 or length > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"it lists {entries} files; 2 to {MAX_FILES + 1} are wanted")
    if start + length + _END.size != size:
        raise ValueError("there is something in front of it or behind it")


def _unpack(archive: zipfile.ZipFile, file: Path, folder: Path) -> Record:
    infos = archive.infolist()
    for info in infos:
        _check_entry(info)
    names = [info.filename for info in infos]
    # As file systems without capitals have it, two names would be one file.
    if len({name.casefold() for name in names}) != len(names):
        raise ValueError("a name stands in it twice")
    if VERSION_FILE not in names:
        raise ValueError(f"there is no {VERSION_FILE} in it")
    total = sum(info.file_size for info in infos)
    if total > file.stat().st_size:
        raise ValueError(f"its files claim {total} bytes, more than it has")
    if total > free_bytes(folder.parent):
        raise RegistryError(
            f"{file} needs {total} bytes in {folder.parent}, {free_bytes(folder.parent)} are free; free some space there"
        )
    record_info = archive.getinfo(VERSION_FILE)
    if record_info.file_size > _MAX_RECORD_BYTES:
        raise ValueError(
            f"{VERSION_FILE} has {record_info.file_size} bytes, at most {_MAX_RECORD_BYTES} are wanted"
        )
    record = Record.model_validate(parse_json(archive.read(record_info)))
    folder.mkdir(mode=0o700)
    for info in infos:
        if info.filename != VERSION_FILE:
            with archive.open(info) as source, (folder / info.filename).open("xb") as target:
                _copy(source, target, info.file_size)
    return record


def _check_entry(info: zipfile.ZipInfo) -> None:
    name = printable(info.filename, limit=100)
    # zipfile cuts a name at a zero byte; the name as it was says so.
    if info.orig_filename != info.filename or not (
        is_file_name(info.filename) or info.filename == VERSION_FILE
    ):
        raise ValueError(f"{name!r} is no plain file name")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise ValueError(f"{name!r} is a link or another thing than a file")
    if info.flag_bits & 0x1 or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name!r} is encrypted or compressed; fedsplit writes plain files")
    if info.compress_size != info.file_size:
        raise ValueError(f"{name!r} says two sizes")


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        data = source.read(min(_CHUNK, size))
        if not data:
            raise EOFError("a file in it ends too early")
        target.write(data)
        size -= len(data)
    # Reading on to the end has the checksum looked at.
    if source.read(1):
        raise ValueError("a file in it is longer than it says")


def _refused(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{printable(file, limit=300)} is no file of `fedsplit module export`, and nothing was imported: {why}. Export it "
        f"again where it comes from, or copy it again"
    )
