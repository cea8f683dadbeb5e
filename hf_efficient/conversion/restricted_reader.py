"""Reads the files of earlier releases, pickles and `torch.save` files, without running anything in them.

Four forms are told apart by their content, whatever the file is called: a plain pickle (`vocab.pkl`), one
compressed with gzip (trax), the zip container that torch writes since 1.6, and the container before it, which
the original Transformer-XL release used. Classes become inert records (see `restricted_pickle`). A tensor is
read only when it is asked for, after its size has been checked against the file; an array of NumPy is a record
that `stored_arrays` reads.
"""

import gzip
import io
import math
import mmap
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .restricted_pickle import GlobalName, MalformedPickle, read_pickle

# The first three pickles of a file in the container before torch 1.6 (torch/serialization.py).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_DIMENSIONS = 8

GZIP_MAGIC = b"\x1f\x8b"
# Numbers hardly shrink; only a file made to fill a disk grows by more than this and a little.
MAX_GZIP_GROWTH = 100
SMALL_FILE = 1 << 24


@dataclass(frozen=True)
class Storage:
    """A stretch of numbers in a file as the pickle describes it. Tensors that share memory share its key."""

    key: str
    dtype: torch.dtype
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet: a view, in numbers and not bytes, that lies within its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class RestrictedFile:
    """Content of a pickle or torch file.

    Attributes:
        path: The file.
        root: What was saved: plain data, `InertRecord`s, and a `StoredTensor` in the place of each tensor.
        read_storage: Returns the bytes of a storage, which may be too few.
    """

    path: Path
    root: Any
    read_storage: Callable[[Storage], bytes]

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Read one tensor, as a contiguous copy of its own.

        Raises:
            ValueError: the file holds another number of bytes for it than its size needs.
        """
        storage = stored.storage
        try:
            content = bytearray(self.read_storage(storage))
            if len(content) != storage.num_bytes:
                raise MalformedPickle(
                    f"storage {storage.key!r} has {len(content)} bytes, and {storage.num_elements} numbers of "
                    f"{storage.dtype} take {storage.num_bytes}"
                )
        except MalformedPickle as error:
            raise _damaged(self.path, error) from None
        if math.prod(stored.shape) == 0:
            return torch.zeros(stored.shape, dtype=storage.dtype)
        numbers = torch.frombuffer(content, dtype=storage.dtype)
        view = numbers.as_strided(stored.shape, stored.strides, stored.offset)
        return view.clone(memory_format=torch.contiguous_format)


def read_restricted(path: str | Path) -> RestrictedFile:
    """Read a pickle or a torch file. Nothing in it is imported or run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, was changed, or is none of the four forms.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a pickle or of a torch file.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic == b"PK\x03\x04":
                return _read_zip_container(path)
            if magic.startswith(GZIP_MAGIC):
                return _read_compressed_pickle(path)
            if path.stat().st_size == 0:
                raise MalformedPickle("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                return _read_pickle_or_legacy_container(path, stream)
    except MalformedPickle as error:
        raise _damaged(path, error) from None


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """A gzip file's content, in a temporary file.

    Raises:
        MalformedPickle: it is cut off, was changed, or grows out of all proportion.
    """
    limit = path.stat().st_size * MAX_GZIP_GROWTH + SMALL_FILE
    with tempfile.TemporaryFile() as content:
        try:
            with gzip.open(path, "rb") as stream:
                while content.tell() <= limit and (block := stream.read(1 << 20)):
                    content.write(block)
        except (OSError, EOFError, zlib.error) as error:
            raise MalformedPickle(f"it cannot be unpacked ({error})") from None
        if content.tell() > limit:
            raise MalformedPickle(f"it unpacks to more than {MAX_GZIP_GROWTH} times its size")
        content.seek(0)
        yield content


def is_state_dict(root: Any) -> bool:
    """Whether what a file holds is tensors by name, and at least one."""
    if not isinstance(root, dict) or not root:
        return False
    return all(isinstance(name, str) and isinstance(value, StoredTensor) for name, value in root.items())


def _damaged(path: Path, reason: MalformedPickle) -> ValueError:
    return ValueError(
        f"{path} cannot be read: {reason}. The file is truncated, was changed, or is neither a pickle nor a "
        "file of torch.save; fetch or save it again."
    )


# --- containers -------------------------------------------------------------------------------------------


def _read_zip_container(path: Path) -> RestrictedFile:
    """torch 1.6 and later: a zip file of `NAME/data.pkl` and `NAME/data/KEY`, nothing in it compressed."""
    members = _zip_members(path)
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise MalformedPickle("it is a zip file without exactly one data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    byte_order = f"{folder}byteorder"
    if byte_order in members and _read_zip_member(path, byte_order) != b"little":
        raise MalformedPickle("its numbers are not little-endian")
    with io.BytesIO(_read_zip_member(path, pickles[0])) as stream:
        root = read_pickle(stream, _TENSORS, _persistent_storage)

    def read_storage(storage: Storage) -> bytes:
        name = f"{folder}data/{storage.key}"
        if name not in members:
            raise MalformedPickle(f"storage {storage.key!r} is missing")
        return _read_zip_member(path, name)

    return RestrictedFile(path, root, read_storage)


def _zip_members(path: Path) -> set[str]:
    """Names of the members, once none of them claims to be larger than the whole file."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except _ZIP_ERRORS as error:
        raise MalformedPickle(f"its zip container is broken ({error})") from None
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if not stored or member.file_size > size:
            raise MalformedPickle(f"member {member.filename!r} of its zip container has an impossible size")
    return {member.filename for member in members}


def _read_zip_member(path: Path, name: str) -> bytes:
    """Content of a member; zipfile checks it against its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except _ZIP_ERRORS as error:
        raise MalformedPickle(f"member {name!r} of its zip container is broken ({error})") from None


# What zipfile is seen to raise for damaged files, beside its own error.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError)


def _read_compressed_pickle(path: Path) -> RestrictedFile:
    with unpacked(path) as content:
        if content.seek(0, io.SEEK_END) == 0:
            raise MalformedPickle("it is empty")
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            return RestrictedFile(path, read_pickle(stream), _no_storage)


def _read_pickle_or_legacy_container(path: Path, stream: mmap.mmap) -> RestrictedFile:
    """A plain pickle, or the container before torch 1.6: three header pickles, the object, its storages."""
    root = read_pickle(stream)
    if root != LEGACY_MAGIC:
        return RestrictedFile(path, root, _no_storage)
    protocol, system = read_pickle(stream), read_pickle(stream)
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise MalformedPickle("its torch container has an unknown version or is not little-endian")

    storages: dict[str, Storage] = {}

    def persistent(identifier: Any) -> Any:
        if isinstance(identifier, tuple) and len(identifier) == 4 and identifier[0] == "module":
            return identifier[1]  # the class; its source text, which may follow, is not looked at
        storage = _persistent_storage(identifier)
        if storages.setdefault(storage.key, storage) != storage:
            raise MalformedPickle(f"storage {storage.key!r} is described in two ways")
        return storage

    root = read_pickle(stream, _TENSORS, persistent)
    spans = _legacy_spans(stream, storages)

    def read_storage(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(spans[storage.key])
            return file.read(storage.num_bytes)

    return RestrictedFile(path, root, read_storage)


def _legacy_spans(stream: mmap.mmap, storages: dict[str, Storage]) -> dict[str, int]:
    """First byte of each storage's numbers. They follow the pickles in the order of a list of their keys."""
    keys = read_pickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise MalformedPickle("it has no list of storages")
    if len(keys) != len(storages) or set(keys) != set(storages):
        raise MalformedPickle("its list of storages is not that of its tensors")
    spans = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        spans[key] = stream.tell()
        end = spans[key] + storages[key].num_bytes
        if count != storages[key].num_elements or end > len(stream):
            raise MalformedPickle(f"storage {key!r} is not the {storages[key].num_elements} numbers it should be")
        stream.seek(end)
    return spans


def _no_storage(storage: Storage) -> bytes:
    raise MalformedPickle("a plain pickle holds no storages")


# --- tensors ----------------------------------------------------------------------------------------------


def _persistent_storage(identifier: Any) -> Storage:
    """The storage of a persistent id `("storage", type, key, device, number of elements[, view])`."""
    parts = identifier if isinstance(identifier, tuple) else ()
    if len(parts) not in (5, 6) or parts[0] != "storage" or not isinstance(parts[1], GlobalName):
        raise MalformedPickle("a reference to outside data that is no tensor's")
    _, kind, key, _, num_elements, *view = parts
    name = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)", kind.name)
    dtype = DTYPES.get(name.group(1)) if name else None
    if dtype is None or not isinstance(key, str) or not _is_size(num_elements):
        raise MalformedPickle(f"a storage of an unknown kind ({kind.name[:80]!r})")
    if view not in ([], [None]):
        raise MalformedPickle("a storage that is a view of another, which only torch before 0.4 wrote")
    return Storage(key, dtype, num_elements)


def _rebuild_tensor(*arguments: Any) -> StoredTensor:
    """Of `(storage, offset, shape, strides, ...)`; a view may not leave its storage, nor hold more than it."""
    storage, offset, shape, strides = (arguments + (None,) * 4)[:4]
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not sizes or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, (offset, *shape, *strides))):
        raise MalformedPickle("a tensor without a legal shape")
    if not isinstance(storage, Storage):
        raise MalformedPickle("a tensor without a storage")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count > 0 and (count > storage.num_elements or last >= storage.num_elements):
        raise MalformedPickle(f"a tensor of shape {list(shape)} that does not fit into its storage")
    return StoredTensor(storage, offset, shape, strides)


def _rebuild_parameter(*arguments: Any) -> StoredTensor:
    if not arguments or not isinstance(arguments[0], StoredTensor):
        raise MalformedPickle("a parameter that is no tensor")
    return arguments[0]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
}
