"""The corpus that needs no download."""

import pytest

from hf_efficient.data import load_documents


@pytest.fixture(scope="session")
def python_docs(tmp_path_factory):
    """The training split of the Python language reference."""
    return load_documents("python-docs", cache_dir=tmp_path_factory.mktemp("python-docs"))
