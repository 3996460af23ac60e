"""Read ZIP archives (Office files, EPUB) without trusting what they say about themselves.

Only members that are wanted are expanded, and bytes are counted while they are: sizes in an
archive's directory can be false. Archives inside an archive are not opened. Libraries get a copy of
what was read, so that they see no other bytes than those that were checked.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from ragcache.errors import SourceError
from ragcache.retriever.extraction import LimitExceeded, TimeLimit

#: Limits on an archive, besides that on the bytes of its members together.
MAX_MEMBERS = 10_000
MAX_RATIO = 200  # bytes per compressed byte of a member; text has 5 to 50
_ANY_RATIO = 1 << 20  # bytes that a member may have at any ratio

_PIECE = 1 << 16  # bytes that are read at once
_PROLOG_PIECE = 1 << 12  # bytes of XML that are parsed at once
_XML = (".xml", ".rels", ".opf", ".ncx", ".vml")
_OLE = bytes.fromhex("d0cf11e0a1b11ae1")  # of encrypted Office files, and of .doc, .xls and .ppt
_OLE_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")
_OLE_SEARCHED = 1 << 26  # bytes in which that name is looked for


@dataclass(frozen=True, slots=True)
class Archive:
    """The members of an archive that were read, and the names of the others."""

    members: Mapping[str, bytes]
    others: tuple[str, ...]

    def copy(self) -> io.BytesIO:
        """An archive of these members, not compressed; the others are there, and empty."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, raw in self.members.items():
                archive.writestr(name, raw)
            for name in self.others:
                archive.writestr(name, b"")
        out.seek(0)
        return out


def read_archive(
    path: Path, wanted: Callable[[str], bool], clock: TimeLimit, *, most: int
) -> Archive:
    """The members of ``path`` whose names are ``wanted``, of at most ``most`` bytes together.

    Raises LimitExceeded beyond that, :data:`MAX_MEMBERS`, :data:`MAX_RATIO` or the time of
    ``clock``; SourceError for a damaged or encrypted archive, and for XML that declares entities.
    """
    kind = path.suffix[1:].lower()
    try:
        with path.open("rb") as file:
            _refuse_ole(path, file.read(_OLE_SEARCHED) if file.read(8) == _OLE else b"")
            with zipfile.ZipFile(file) as archive:
                return _read(path, archive, wanted, clock, most)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise SourceError(
            f"{path} is not a readable .{kind} file: {error}. It may be truncated: get it again, "
            "or save it again with the program that it is from."
        ) from error


def _read(
    path: Path,
    archive: zipfile.ZipFile,
    wanted: Callable[[str], bool],
    clock: TimeLimit,
    most: int,
) -> Archive:
    members: dict[str, bytes] = {}
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise LimitExceeded(f"it has more than {MAX_MEMBERS:,} members")
    if len({info.filename for info in infos}) < len(infos):
        raise zipfile.BadZipFile("two of its members have one name")
    room = most
    for info in infos:
        if info.is_dir() or not wanted(info.filename):
            continue
        if info.flag_bits & 1:
            raise SourceError(f"{path} is encrypted. Save a copy of it without a password.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"{info.filename} is compressed by another method")
        pieces: list[bytes] = []
        size = 0
        with archive.open(info) as member:
            while piece := member.read(_PIECE):
                clock.check()
                pieces.append(piece)
                size += len(piece)
                if size > room:
                    raise LimitExceeded(f"it expands to more than {most >> 20} MiB")
                if size > max(_ANY_RATIO, MAX_RATIO * info.compress_size):
                    raise LimitExceeded(
                        f"{info.filename} in it expands to more than {MAX_RATIO} times its bytes"
                    )
        room -= size
        members[info.filename] = b"".join(pieces)
        if info.filename.lower().endswith(_XML) and size:
            _refuse_entities(path, info.filename, members[info.filename])
    return Archive(members, tuple(i.filename for i in infos if i.filename not in members))


def _refuse_ole(path: Path, raw: bytes) -> None:
    if not raw:
        return
    if _OLE_ENCRYPTED in raw:
        raise SourceError(
            f"{path} is encrypted. Save a copy of it without a password with the program that it "
            "is from."
        )
    raise SourceError(
        f"{path} has the format of Office before 2007, whatever its name. Save it as {path.suffix} "
        "with an office program, for instance `soffice --convert-to`."
    )


def _refuse_entities(path: Path, member: str, raw: bytes) -> None:
    """Raise SourceError if XML has declarations of its own, such as entities, before its root.

    They can only stand there, and no format that is read has any. A bare ``<!DOCTYPE`` is allowed,
    because no parser in use loads what it names.
    """
    declares = rooted = False

    def on_doctype(name: str, system: str | None, public: str | None, internal: bool) -> None:
        nonlocal declares
        declares = declares or bool(internal)

    def on_element(name: str, attributes: object) -> None:
        nonlocal rooted
        rooted = True

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = on_doctype
    parser.StartElementHandler = on_element
    try:
        for at in range(0, len(raw), _PROLOG_PIECE):
            parser.Parse(raw[at : at + _PROLOG_PIECE], False)
            if declares:
                raise SourceError(
                    f"{path} is refused: {member} in it declares XML entities, which can expand to "
                    "any size or read other files. Save it again with the program that it is from."
                )
            if rooted:
                return
    except (expat.ExpatError, LookupError) as error:  # of an unknown encoding
        raise zipfile.BadZipFile(f"{member} is not XML ({error})") from None
