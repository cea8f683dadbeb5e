"""A Hub on this machine that the process may talk to, and a model's folder to publish there."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub.loopback_hub import TOKEN, LoopbackHub
from hub.published_models import QUICK_ROWS, save_published
from huggingface_hub.utils import _http, close_session, disable_progress_bars, enable_progress_bars


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub; huggingface_hub in this process takes it for the real one, and waits for nothing."""
    with LoopbackHub() as server:
        for name, value in {"ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # a client of an earlier test knows another server
        disable_progress_bars()
        yield server
        enable_progress_bars()
        close_session()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """A folder as training leaves it. Tests that change it take `folder`."""
    return save_published(QUICK_ROWS[0], tmp_path_factory.mktemp("saved") / "mine")


@pytest.fixture
def folder(saved_model, tmp_path):
    """A copy of `saved_model` to change at will."""
    return shutil.copytree(saved_model, tmp_path / "mine")
