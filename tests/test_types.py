"""What `make types` checks: everything but model bodies; what stands beside a body in its folder is named."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = (ROOT / "pyproject.toml").read_text("utf-8")
BESIDE_BODIES = ("configuration_*.py", "presets.py", "tokenization_*.py", "checkpoint_names_*.py")
PATHS = sorted(path for name in BESIDE_BODIES for path in (ROOT / "hf_efficient" / "models").glob(f"*/{name}"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_no_model_body_is_checked(path):
    """Otherwise mypy would pass over a new architecture's configuration."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert f'    "{module}",\n' in SETTINGS, f"add {module} to the modules with ignore_errors = false"
