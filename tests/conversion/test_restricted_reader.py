"""Files of torch.save and pickles give torch's own tensors; damaged ones give a ValueError that names the file."""

import contextlib
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_efficient.conversion.restricted_pickle import InertRecord
from hf_efficient.conversion.restricted_reader import LEGACY_MAGIC, StoredTensor, is_state_dict, read_restricted

CONTAINERS = {"zip": True, "legacy": False}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def save(content, path: Path, container: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=CONTAINERS[container])
    return path


def read_tensors(path: Path):
    """Root with each stored tensor in a dict or list read."""
    file = read_restricted(path)
    root = file.root
    if isinstance(root, dict):
        return {key: file.tensor(value) for key, value in root.items()}
    return [file.tensor(value) for value in root]


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_of_every_dtype_and_layout(tmp_path, container):
    base = torch.arange(24.0).view(2, 3, 4)
    views = [base.transpose(0, 2), base[1, :, 1:3], base[..., ::2], torch.tensor(5.0), torch.empty(0, 3), base]
    tensors = [torch.arange(7).to(dtype) for dtype in DTYPES] + views
    found = read_tensors(save(tensors, tmp_path / "file", container))
    for one, other in zip(found, tensors, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert torch.equal(one, other)


@pytest.mark.parametrize("container", CONTAINERS)
def test_parameters_and_shared_memory(tmp_path, container):
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    file = read_restricted(
        save({"weight": weight, "tied": weight, "view": weight.data[1]}, tmp_path / "file", container)
    )
    assert file.root["tied"] is file.root["weight"]
    assert file.root["view"].storage == file.root["weight"].storage
    assert torch.equal(file.tensor(file.root["weight"]), weight.data)
    assert torch.equal(file.tensor(file.root["view"]), weight.data[1])


@pytest.mark.parametrize("container", CONTAINERS)
def test_module_is_read_without_its_class(tmp_path, container):
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    file = read_restricted(save(module, tmp_path / "model.pt", container))
    linear = file.root.fields["_modules"]["0"]
    assert isinstance(file.root, InertRecord)
    assert linear.class_name == "torch.nn.modules.linear.Linear"
    assert linear.fields["in_features"] == 2
    assert torch.equal(file.tensor(linear.fields["_parameters"]["weight"]), module[0].weight)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": torch.zeros(1)}, True),
        ({}, False),
        ([torch.zeros(1)], False),
        ({"a": torch.zeros(1), "b": 1}, False),
        ({1: torch.zeros(1)}, False),
    ],
)
def test_state_dicts_are_told_from_other_things(tmp_path, content, expected):
    assert is_state_dict(read_restricted(save(content, tmp_path / "file", "zip")).root) is expected


def test_plain_pickle(tmp_path):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps({"sym2idx": {"a": 0}}))
    assert read_restricted(path).root == {"sym2idx": {"a": 0}}


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nothing.pt"):
        read_restricted(tmp_path / "nothing.pt")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("container", CONTAINERS)
def test_code_beside_tensors_never_runs(tmp_path, container):
    target = tmp_path / "made"
    path = save({"code": Malicious(target), "weight": torch.ones(2)}, tmp_path / "model.pt", container)
    file = read_restricted(path)
    assert isinstance(file.root["code"], InertRecord)
    assert torch.equal(file.tensor(file.root["weight"]), torch.ones(2))
    assert not target.exists()
    torch.load(path, weights_only=False)  # what it would have done elsewhere
    assert target.exists()


# --- damage -----------------------------------------------------------------------------------------------


def complaint(path: Path) -> str | None:
    """What reading the file and each tensor in it complains of, None if nothing."""
    try:
        read_tensors(path)
    except ValueError as error:
        return str(error)
    return None


def refused(path: Path) -> bool:
    """Whether the file, or a tensor in it, gives the error; it must name the file and the mend."""
    message = complaint(path)
    assert message is None or (str(path) in message and "fetch or save it again" in message)
    return message is not None


@pytest.fixture(params=CONTAINERS)
def tensor_file(request, tmp_path) -> Path:
    """A file with three small tensors."""
    return save([torch.arange(5.0), torch.ones(3, 4), torch.arange(9)], tmp_path / "model.pt", request.param)


def test_every_truncation_is_refused(tensor_file):
    content = tensor_file.read_bytes()
    assert not refused(tensor_file)
    for length in range(0, len(content), max(1, len(content) // 300)):
        tensor_file.write_bytes(content[:length])
        assert refused(tensor_file), f"the first {length} of {len(content)} bytes were accepted"


def count_refused(path: Path, rounds: int, seed: int) -> int:
    content = path.read_bytes()
    generator = random.Random(seed)
    count = 0
    for _ in range(rounds):
        damaged = bytearray(content)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        # The two others are of the test's own walk, over a root that has become something else.
        with contextlib.suppress(TypeError, AttributeError):
            count += refused(path)
    return count


def test_changed_bits_give_tensors_or_the_one_error(tensor_file):
    assert count_refused(tensor_file, rounds=400, seed=0) > 20


@pytest.mark.slow
def test_many_changed_bits_give_tensors_or_the_one_error(tensor_file):
    assert count_refused(tensor_file, rounds=5000, seed=1) > 250


def test_changed_numbers_in_a_zip_container_are_noticed(tmp_path):
    path = save([torch.full((100,), 7.0)], tmp_path / "model.pt", "zip")
    content = path.read_bytes()
    numbers = struct.pack("<f", 7.0) * 100
    assert content.count(numbers) == 1
    path.write_bytes(content.replace(numbers, numbers[:-4] + struct.pack("<f", 8.0)))
    assert refused(path)


def rebuild_zip(path: Path, change) -> None:
    """Write the zip file anew with `change(members)` in place of its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def replace_member(suffix: str, old: bytes, new: bytes):
    def change(members):
        name = next(name for name in members if name.endswith(suffix))
        assert old in members[name]
        members[name] = members[name].replace(old, new)

    return change


def drop_member(suffix: str):
    return lambda members: members.pop(next(name for name in members if name.endswith(suffix)))


ZIP_DAMAGE = {
    "fewer numbers than the pickle says": (replace_member("/data/0", bytes(20), bytes(16)), "has 16 bytes"),
    "no pickle": (drop_member("/data.pkl"), "exactly one data.pkl"),
    "a storage missing": (drop_member("/data/0"), "is missing"),
    "big-endian": (replace_member("/byteorder", b"little", b"big"), "little-endian"),
    "tensor larger than its storage": (replace_member("/data.pkl", b"K\x05\x85", b"K\x06\x85"), "does not fit"),
    "unknown storage": (replace_member("/data.pkl", b"FloatStorage", b"CloatStorage"), "unknown kind"),
    "reference to something else": (replace_member("/data.pkl", b"storage", b"storbge"), "no tensor's"),
}


@pytest.mark.parametrize("kind", ZIP_DAMAGE)
def test_tampered_zip_container(tmp_path, kind):
    change, reason = ZIP_DAMAGE[kind]
    path = save([torch.zeros(5)], tmp_path / "model.pt", "zip")
    rebuild_zip(path, change)
    with pytest.raises(ValueError, match=reason):
        read_tensors(path)


def test_compressed_zip_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ValueError, match="impossible size"):
        read_restricted(path)


LEGACY_DAMAGE = {
    "more numbers than the pickle says": (struct.pack("<q", 5), struct.pack("<q", 6), "is not the 5 numbers"),
    "big-endian": (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "little-endian"),
    "container version": (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xea\x03.", "unknown version"),
    "tensor larger than its storage": (b"K\x05\x85", b"K\x06\x85", "does not fit"),
}


@pytest.mark.parametrize("kind", LEGACY_DAMAGE)
def test_tampered_legacy_container(tmp_path, kind):
    old, new, reason = LEGACY_DAMAGE[kind]
    path = save([torch.zeros(5)], tmp_path / "model.pt", "legacy")
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=reason):
        read_tensors(path)


def test_legacy_container_needs_its_list_of_storages(tmp_path):
    path = tmp_path / "model.pt"
    header = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True}, [1], ["7"])]
    path.write_bytes(b"".join(header))
    with pytest.raises(ValueError, match="list of storages"):
        read_restricted(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((6,), (1,), 0),
        ((5,), (2,), 0),
        ((5,), (1,), 1),
        ((3, 3), (0, 1), 0),
        ((-1,), (1,), 0),
        ((1,) * 9, (1,) * 9, 0),
    ],
)
def test_views_outside_their_storage_are_refused(tmp_path, shape, strides, offset):
    class Forged:
        def __reduce__(self):
            storage = torch.zeros(5)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, None)

    path = tmp_path / "model.pt"
    torch.save([Forged()], path)
    with pytest.raises(ValueError, match=r"does not fit|legal shape"):
        read_restricted(path)


def test_stored_tensor_is_read_only_when_asked_for(tmp_path):
    path = save([torch.zeros(5), torch.ones(3)], tmp_path / "model.pt", "zip")
    rebuild_zip(path, drop_member("/data/1"))
    file = read_restricted(path)
    assert all(isinstance(stored, StoredTensor) for stored in file.root)
    assert torch.equal(file.tensor(file.root[0]), torch.zeros(5))
