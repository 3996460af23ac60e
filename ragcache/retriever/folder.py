"""Find the files to read in a folder, and count those that are left out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever.extraction import Omitted
from ragcache.retriever.suffixes import KNOWN, READERS, missing_packages

_DATASET_FILES = {"state.json", "dataset_info.json"}  # written by Hugging Face's datasets
_DATASET_LISTS = {"dataset_dict.json", "dataset_infos.json"}
_MAX_NAMED_SUFFIXES = 10  # of files that are left out, in a warning
_INSTALL = 'Run `pip install "ragcache-fusion[formats]"`'


def files_at(path: Path, omitted: list[Omitted]) -> list[Path]:
    """The readable files at ``path``, in reading order. What is left out of a folder is added to
    ``omitted``. Raises SourceError for a missing or unreadable file, and a folder without any."""
    if not path.exists():
        raise SourceError(f"{path} does not exist. Check the path.")
    if not path.is_dir():
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise SourceError(f"{path} has no known format: convert it to one of {KNOWN}.")
        if missing := missing_packages(suffix):
            raise SourceError(
                f"{path} needs {' and '.join(missing)}, which are not installed. {_INSTALL}."
            )
        return [path]
    found, broken = list[Path](), list[Path]()
    unknown, unready = Counter[str](), Counter[str]()
    missing_for = {suffix: bool(missing_packages(suffix)) for suffix in READERS}
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        data_set = _DATASET_FILES.issubset(names)
        for name in names:
            file = Path(folder, name)
            suffix = file.suffix.lower()
            if name.startswith(".") or not file.is_file():
                if not name.startswith(".") and file.is_symlink():
                    broken.append(file)
            elif file.suffix != ".arrow" and (data_set or name in _DATASET_LISTS):
                continue  # beside the Arrow files of a data set
            elif suffix not in READERS:
                unknown[suffix or name] += 1
            elif missing_for[suffix]:
                unready[suffix] += 1
            else:
                found.append(file)
    found.sort(key=Path.as_posix)
    broken.sort()
    if unknown:
        why = f"{_counted(unknown)}. Only {KNOWN} are read: convert the files that you need."
        omitted.append(Omitted(str(path), unknown.total(), len(found), "files", why))
    if unready:
        why = f"{_counted(unready)}. {_INSTALL} to have them read."
        omitted.append(Omitted(str(path), unready.total(), len(found), "files", why))
    if broken:
        why = f"broken links, such as {broken[0]}. Repair or delete them."
        omitted.append(Omitted(str(path), len(broken), len(found), "files", why))
    if not found:
        hint = f" {broken[0]} is a broken link." if broken else ""
        hint += f" {_INSTALL} to have {_counted(unready)} read." if unready else ""
        raise SourceError(f"{path} holds no document: no file in it is one of {KNOWN}.{hint}")
    return found


def _counted(kinds: Counter[str]) -> str:
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_MAX_NAMED_SUFFIXES))
    return named + (", ..." if len(kinds) > _MAX_NAMED_SUFFIXES else "")
