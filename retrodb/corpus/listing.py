"""Which files a build reads: files, folders, globs and URLs become one sorted list without duplicates."""

import glob
import os
import re
import stat as stat_modes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from fsspec import AbstractFileSystem

from retrodb.corpus.source import CONTENT_KEYS, is_local, local_stamp
from retrodb.errors import InputError
from retrodb.remote import ObjectStore, absolute_url, filesystem_of, has_buckets
from retrodb.schemas import SPLITS

Format = Literal["jsonl", "parquet", "text"]
EXTENSIONS: Final[dict[str, Format]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED_EXTENSIONS: Final = (".gz", ".zst", ".zstd")

TRAIN, VALIDATION = SPLITS

_GLOB_CHARACTERS: Final = frozenset("*?[")
_IDENTITY_KEYS: Final = (
    *CONTENT_KEYS,
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created", "ino"),
)


@dataclass(frozen=True, order=True)
class InputFile:
    """One input file.

    Attributes:
        url: absolute local path (symbolic links not resolved), or fsspec URL.
        format: what its extension says it holds.
        size: bytes as they lie there; -1 where the filesystem does not say.
        stamp: cheap identity: it changes when the file is written. Empty where the filesystem offers nothing that
            would; such a file must be scanned again.
        split: what its documents are for: ``train`` or ``validation``.
    """

    url: str
    format: Format
    size: int
    stamp: str
    split: str = TRAIN


@dataclass(frozen=True)
class Listing:
    """``files``, sorted by URL, and the number of hidden or unknown files and folders that were ``skipped``."""

    files: tuple[InputFile, ...]
    skipped: int


@dataclass
class _Found:
    files: dict[str, InputFile] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)


def format_of(name: str) -> Format | None:
    """The format that a file's extension stands for, after ``.gz``, ``.zst`` or ``.zstd``; None if unknown."""
    stem, extension = os.path.splitext(name.lower())
    if extension in COMPRESSED_EXTENSIONS:
        extension = os.path.splitext(stem)[1]
    return EXTENSIONS.get(extension)


def expand_inputs(inputs: Sequence[str]) -> Listing:
    """List what ``inputs`` name: files, folders (recursively), globs, any fsspec URL; ``~`` is expanded.

    A file reached twice is listed once. In folders and globs hidden names and unknown extensions are skipped and
    counted; a file that is named must have a known extension.

    Raises:
        InputError: nothing is there, nothing readable is in it, the extension is unknown, or all files are empty.
    """
    if not inputs:
        raise InputError("no input: name at least one file, folder, glob or URL.")
    found = _Found()
    for given in inputs:
        if not given.strip():
            raise InputError("an input is the empty string: name a file, folder, glob or URL.")
        url = absolute_url(given)
        _check_name(url)
        before = len(found.skipped)
        matched = _expand_local(given, url, found) if is_local(url) else _expand_remote(given, url, found)
        if not matched:
            skipped = len(found.skipped) - before
            raise InputError(
                f"{given!r} holds no file that can be read ({skipped} hidden or of unknown kind were skipped). "
                f"Known are {_known()}."
            )
    files = tuple(sorted(found.files.values()))
    if all(file.size == 0 for file in files):
        raise InputError(f"every input file is empty (zero bytes): {', '.join(file.url for file in files[:5])}.")
    return Listing(files, len(found.skipped - found.files.keys()))


def with_validation(inputs: Listing, validation: Sequence[str]) -> Listing:
    """``inputs`` and, after them, the files that ``validation`` names, of the validation split.

    A file that both name is a validation file: so a held-out part may lie in the folder of the whole.

    Raises:
        InputError: as `expand_inputs` does; or every input is a validation file.
    """
    if not validation:
        return inputs
    try:
        found = expand_inputs(validation)
    except InputError as error:
        raise InputError(f"--validation: {error}") from error
    held_out = {file.url for file in found.files}
    files = [file for file in inputs.files if file.url not in held_out]
    if not files:
        raise InputError(
            f"every input is a --validation input as well ({', '.join(sorted(held_out)[:3])}): "
            "nothing is left to retrieve from."
        )
    return Listing((*files, *(replace(file, split=VALIDATION) for file in found.files)), inputs.skipped + found.skipped)


def outside(files: Sequence[InputFile], database: str) -> tuple[InputFile, ...]:
    """``files`` without those of the database itself, which may lie inside an input folder: they are no documents.

    Args:
        files: as listed.
        database: the database's URL.

    Raises:
        InputError: nothing else is there.
    """
    kept = tuple(file for file in files if not f"{file.url}/".startswith(f"{database}/"))
    if not kept:
        raise InputError(f"all inputs lie inside {database}, the database itself: name others, or another database.")
    return kept


def _known() -> str:
    return f"{', '.join(EXTENSIONS)}, each also with {', '.join(COMPRESSED_EXTENSIONS)}"


def _has_glob(url: str) -> bool:
    return not _GLOB_CHARACTERS.isdisjoint(url)


def _check_name(url: str) -> None:
    """File names are stored in tables and in the manifest, so they must be text. Raises InputError."""
    try:
        url.encode()
    except UnicodeEncodeError:
        raise InputError(f"the file name {url!r} is not valid UTF-8: rename the file.") from None


def _named_format(given: str, name: str) -> Format:
    kind = format_of(name)
    if kind is None:
        raise InputError(f"{given!r} has an unknown extension. Known are {_known()}.")
    return kind


# -- local ---------------------------------------------------------------------------------------------------------


def _expand_local(given: str, path: str, found: _Found) -> bool:
    """Whether any file was found; ``found`` receives them."""
    try:
        if os.path.isdir(path):
            return _add_all(_walk(path, found, frozenset()), found)
        if os.path.lexists(path):
            if not stat_modes.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{given!r} is neither a regular file nor a folder.")
            return _add_all(iter([_local_file(path, _named_format(given, path))]), found)
        if _has_glob(path) and (matches := sorted(glob.glob(path, recursive=True))):
            return _add_all(_matches(matches, found), found)
    except OSError as error:
        raise InputError(f"cannot list {given!r}: {error}.") from error
    raise InputError(f"there is no file, folder or match for the input {given!r} (looked at {path}).")


def _add_all(files: Iterator[InputFile], found: _Found) -> bool:
    count = 0
    for count, file in enumerate(files, 1):  # noqa: B007 the last value is the number of files
        found.files[file.url] = file
    return count > 0


def _matches(paths: list[str], found: _Found) -> Iterator[InputFile]:
    for path in paths:
        clean = os.path.abspath(path)
        if os.path.isdir(clean):
            yield from _walk(clean, found, frozenset())
        else:
            yield from _candidate(clean, found)


def _walk(folder: str, found: _Found, ancestors: frozenset[tuple[int, int]]) -> Iterator[InputFile]:
    """All readable files below ``folder``. Links are followed, except one that leads back to where we came from."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            found.skipped.add(path)
        elif os.path.isdir(path):
            yield from _walk(path, found, ancestors | {here})
        else:
            yield from _candidate(path, found)


def _candidate(path: str, found: _Found) -> Iterator[InputFile]:
    """The file at ``path`` if it is a regular one of a known kind; dangling links and sockets are skipped."""
    kind = format_of(path)
    if kind is None or not os.path.isfile(path):
        found.skipped.add(path)
        return
    _check_name(path)
    yield _local_file(path, kind)


def _local_file(path: str, kind: Format) -> InputFile:
    stamp, size = local_stamp(path)
    return InputFile(path, kind, size, stamp)


# -- remote --------------------------------------------------------------------------------------------------------


def _expand_remote(given: str, url: str, found: _Found) -> bool:
    """Whether any file was found; ``found`` receives them."""
    filesystem, path = filesystem_of(url)
    remote = _Remote(filesystem, "::" + url.split("::", 1)[1] if "::" in url else "", found)
    try:
        filesystem.invalidate_cache()
        if filesystem.isfile(path):
            return _add_all(iter([remote.file(path, _named_format(given, path), filesystem.info(path))]), found)
        if filesystem.isdir(path):
            return _add_all(remote.below(path), found)
        if _has_glob(path) and (matches := dict(filesystem.glob(path, detail=True))):
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
            return _add_all(remote.matches(matches, fixed), found)
    except InputError:
        raise
    except FileNotFoundError:
        pass  # what gcsfs says of a bucket that does not exist, where s3fs finds nothing
    except Exception as error:  # s3fs, gcsfs and http raise their own
        raise InputError(f"cannot list {given!r}: {type(error).__name__}: {error}.") from error
    if not remote.chain and has_buckets(filesystem):
        ObjectStore(filesystem, url).check_bucket(path)
    raise InputError(f"there is no file, folder or match for the input {given!r}.")


@dataclass(frozen=True)
class _Remote:
    """Lists one fsspec filesystem; ``chain`` is the rest of a chained URL (``zip://..::s3://..``)."""

    filesystem: AbstractFileSystem
    chain: str
    found: _Found

    def matches(self, matches: Mapping[str, Mapping[str, Any]], folder: str) -> Iterator[InputFile]:
        for path, info in matches.items():
            if info.get("type") == "directory":
                yield from self.below(path)
            else:
                yield from self._candidate(path, info, folder)

    def below(self, folder: str) -> Iterator[InputFile]:
        for path, info in dict(self.filesystem.find(folder, detail=True)).items():
            yield from self._candidate(path, info, folder)

    def _candidate(self, path: str, info: Mapping[str, Any], folder: str) -> Iterator[InputFile]:
        """The file at ``path`` if its kind is known and nothing in its path below ``folder`` is hidden."""
        kind = format_of(path)
        inside = path.removeprefix(folder).split("/")
        if kind is None or any(part.startswith(".") for part in inside):
            self.found.skipped.add(path)
        else:
            yield self.file(path, kind, info)

    def file(self, path: str, kind: Format, info: Mapping[str, Any]) -> InputFile:
        url = self.filesystem.unstrip_protocol(path) + self.chain
        _check_name(url)
        known = [f"{key}={info[key]}" for key in _IDENTITY_KEYS if info.get(key) not in (None, "")]
        size = -1 if info.get("size") is None else int(info["size"])
        return InputFile(url, kind, size, "|".join([f"size={size}", *known]) if known else "")
