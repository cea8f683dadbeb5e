"""Lines of text files, wherever they lie: plain, gzipped, in a folder or in a tar archive that is never unpacked."""

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO


def lines_of(source: str | Path, name: re.Pattern | None = None) -> Iterator[tuple[str, str]]:
    """The non-empty lines of one file or of several, each with its place ("file, line 3") for error messages.

    source: a file, a folder, or a .tar, .tar.gz or .tgz archive; files may be gzipped (.gz). Of a folder or an
    archive, the files are read whose path inside it ends with a match of `name`, in the order of their paths; None
    reads all. Archives are read where they lie: no member touches the disk, so its path and links can do no harm.

    Raises FileNotFoundError if there is no such source and ValueError if none of its files matches.
    """
    source = Path(source)
    found = False
    for path, stream in _files(source, name):
        found = True
        plain = gzip.GzipFile(fileobj=stream) if path.endswith(".gz") else stream
        with io.TextIOWrapper(plain, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    if not found:
        raise ValueError(f"source='{source}' has no file whose name matches '{name.pattern if name else ''}'.")


def _files(source: Path, name: re.Pattern | None) -> Iterator[tuple[str, IO[bytes]]]:
    """The wanted files, open, with their paths."""
    if source.is_dir():
        paths = (path for path in source.rglob("*") if path.is_file())
        for path in sorted(path for path in paths if _is_wanted(path.relative_to(source).as_posix(), name)):
            with path.open("rb") as file:
                yield str(path), file
    elif source.name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(source) as archive:
            members = (member for member in archive.getmembers() if member.isfile())
            wanted = [member for member in members if _is_wanted(member.name, name)]
            for member in sorted(wanted, key=lambda member: member.name):
                stream = archive.extractfile(member)
                assert stream is not None  # which it is for folders and devices only
                yield f"{source}/{member.name}", stream
    else:
        with source.open("rb") as file:
            yield str(source), file


def _is_wanted(path: str, name: re.Pattern | None) -> bool:
    """Whether the last parts of a path, as many as it takes, match `name` as a whole."""
    parts = PurePosixPath(path).parts
    return name is None or any(name.fullmatch("/".join(parts[start:])) for start in range(len(parts)))
