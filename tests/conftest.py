"""What every test runs under: its own seed, no network, its own caches, and NaN in memory nobody wrote.

Environment variables must be set before the libraries are imported, and `torch.empty` replaced before anyone
takes a reference to it; both are therefore done when pytest imports this file. Child processes that a test
starts inherit the environment (offline, private caches), not the replaced functions.
"""

import atexit
import functools
import ipaddress
import os
import random
import shutil
import socket
import tempfile
import zlib

IN_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
HOME = tempfile.mkdtemp(prefix="hf-efficient-tests-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

for variable in list(os.environ):
    if variable.startswith(("HF_", "ACCELERATE_", "TRANSFORMERS_")) and not variable.startswith("HF_EFFICIENT_"):
        del os.environ[variable]
os.environ.update(
    HF_HOME=os.path.join(HOME, "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=os.path.join(HOME, "matplotlib"),
    TOKENIZERS_PARALLELISM="false",
)
if IN_XDIST_WORKER:  # the workers share the cores already
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if IN_XDIST_WORKER:
    torch.set_num_threads(1)


# --- seeds ------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """Each fixture draws from its own seed, so that its values do not depend on what ran before it."""
    seed_everything(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """Each test's body starts from the same seed, whatever ran before it and in whichever process."""
    seed_everything(0)


# --- no network -------------------------------------------------------------------------------------------


def is_local(family: int, address) -> bool:
    """True for Unix sockets and for loopback addresses."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0]
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that would have to be looked up
        return False


def guard_connections(method):
    """Wrap a connect method of `socket.socket` so that it refuses every address outside this machine."""

    @functools.wraps(method)
    def guarded(self, address):
        if not is_local(self.family, address):
            raise RuntimeError(f"tests may not use the network: connection to {address!r} refused")
        return method(self, address)

    return guarded


def guard_lookups(getaddrinfo):
    """Wrap `socket.getaddrinfo` so that it resolves only names and addresses of this machine."""

    @functools.wraps(getaddrinfo)
    def guarded(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, socket.gethostname()) and not is_local(socket.AF_INET, (name,)):
            raise RuntimeError(f"tests may not use the network: look-up of {name!r} refused")
        return getaddrinfo(host, *args, **kwargs)

    return guarded


socket.socket.connect = guard_connections(socket.socket.connect)
socket.socket.connect_ex = guard_connections(socket.socket.connect_ex)
socket.getaddrinfo = guard_lookups(socket.getaddrinfo)


# --- unwritten memory -------------------------------------------------------------------------------------

UNINITIALISED_FACTORIES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_permuted"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill in place with what no correct result contains: NaN, the largest integer, True."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype is torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)


def poisoning(factory):
    """Wrap a factory of uninitialised tensors so that it returns poisoned ones."""

    @functools.wraps(factory)
    def poisoned(*args, **kwargs):
        return poison(factory(*args, **kwargs))

    return poisoned


# `with torch.device(...)` recognises the factories by identity and looks them up once, at its first use. That
# use has to come before the wrappers are in place, or the original functions would ignore the context.
with torch.device("cpu"):
    torch.empty(0)

for owner, name in UNINITIALISED_FACTORIES:
    setattr(owner, name, poisoning(getattr(owner, name)))
