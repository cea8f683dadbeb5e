"""The conditions that conftest.py promises really hold: a guard that does not bite is worse than none."""

import os
import random
import socket

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

FACTORIES = {
    "empty": lambda dtype: torch.empty(2, 3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(2, 3, dtype=dtype)),
    "empty_permuted": lambda dtype: torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (3, 1), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(2, 3),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((2, 3), (3, 1)),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_unwritten_floats_are_nan(name, dtype):
    assert FACTORIES[name](dtype).isnan().all()


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_unwritten_integers_are_the_largest(name, dtype):
    assert (FACTORIES[name](dtype) == torch.iinfo(dtype).max).all()


@pytest.mark.parametrize("name", FACTORIES)
def test_unwritten_booleans_are_true(name):
    assert FACTORIES[name](torch.bool).all()


def test_device_context_still_reaches_the_factories():
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.empty(2).is_meta


def test_unwritten_buffer_is_nan_after_leaving_meta():
    with torch.device("meta"):
        norm = torch.nn.BatchNorm1d(2)
    assert norm.to_empty(device="cpu").running_mean.isnan().all()


def test_factories_keep_requires_grad():
    weight = torch.empty(2, requires_grad=True)
    assert weight.is_leaf
    assert weight.requires_grad


@pytest.fixture
def first_draws():
    return torch.rand(3), np.random.rand(3), random.random()


@pytest.fixture
def second_draws():
    return torch.rand(3), np.random.rand(3), random.random()


@pytest.mark.parametrize("_repetition", range(2))
def test_seed_of_a_test_body_is_fixed(first_draws, _repetition):
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert random.random() == random.Random(0).random()


def test_fixtures_draw_different_values(first_draws, second_draws):
    assert not torch.equal(first_draws[0], second_draws[0])
    assert not np.array_equal(first_draws[1], second_draws[1])
    assert first_draws[2] != second_draws[2]


@pytest.mark.parametrize("address", ["192.0.2.1", "example.org"])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_connections_leave_the_machine_never(address, method):
    with socket.socket() as client, pytest.raises(RuntimeError, match="may not use the network"):
        getattr(client, method)((address, 80))


def test_names_are_not_looked_up():
    with pytest.raises(RuntimeError, match=r"look-up of 'example.org' refused"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_loopback_works():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client,
    ):
        client.sendall(b"x")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1) == b"x"


def test_hub_is_offline_and_caches_are_private():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_CACHE.startswith(os.environ["HF_HOME"])
    with pytest.raises(OSError, match="couldn't connect|offline|locate"):
        AutoTokenizer.from_pretrained("no-such-organisation/no-such-model")
