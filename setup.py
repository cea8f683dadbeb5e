"""Package metadata; tool settings live in pyproject.toml, the versions that CI uses in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "hf_efficient" / "__init__.py").read_text("utf-8")
VERSION = re.search(r'^__version__ = "(.+?)"$', INIT, re.MULTILINE).group(1)

# The models need only these: a checkpoint loads and generates without any extra. Names without a range
# (tokenizers too, below) come with transformers, which states the range it works with.
REQUIRES = ["torch>=2.8", "transformers>=5.21,<6", "safetensors", "huggingface_hub"]

EXTRAS = {
    # hf_efficient.data, hf_efficient.training and the commands that use them
    "train": ["accelerate>=1.10", "datasets>=4.0", "tokenizers", "pyyaml", "sacrebleu>=2.4", "tqdm"],
    # hf_efficient.plots
    "plots": ["matplotlib>=3.8"],
    # Moses rules of the legacy Transformer-XL tokenizer
    "legacy": ["sacremoses>=0.1"],
}
EXTRAS["dev"] = [
    *(requirement for group in EXTRAS.values() for requirement in group),
    "onnx>=1.19",
    "onnxscript>=0.5",
    "optimum-quanto>=0.2.7",
    "build>=1.2",
    "mypy>=1.18",
    "parameterized>=0.9",
    "peft>=0.18",
    "psutil>=6.0",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "twine>=6.1",
]

# `make docs`; its pages print the commands' help and draw figures, so it needs what those need.
EXTRAS["docs"] = [*EXTRAS["train"], *EXTRAS["plots"], "mkdocs-material>=9.6,<10", "mkdocstrings-python>=1.16"]

# `make notebooks`
EXTRAS["notebooks"] = [*EXTRAS["train"], *EXTRAS["plots"], "ipykernel>=6.29", "nbclient>=0.10", "peft>=0.18"]

setup(
    name="hf_efficient",
    version=VERSION,
    description="Transformer-XL and its efficient relatives as working Hugging Face models",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["transformers", "transformer-xl", "reformer", "universal-transformer", "long-context"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["hf_efficient", "hf_efficient.*"]),
    package_data={"hf_efficient": ["py.typed"], "hf_efficient.hub": ["*.md", "*.txt"]},
    python_requires=">=3.10",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-efficient=hf_efficient.cli.__main__:main"]},
)
