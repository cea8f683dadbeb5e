"""Package metadata; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "hf_efficient" / "__init__.py").read_text()).group(1)

setup(
    name="hf_efficient",
    version=VERSION,
    packages=find_packages(include=["hf_efficient", "hf_efficient.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.8", "transformers>=5.21,<6", "safetensors", "huggingface_hub"],
    entry_points={"console_scripts": ["hf-efficient=hf_efficient.cli.__main__:main"]},
)
