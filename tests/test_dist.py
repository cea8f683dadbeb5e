"""What `make dist` builds: it holds the package alone and installs without tools, and README's first programs run."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
FIRST_PROGRAMS = re.findall(r"^```python\n(.*?)^```", README.split("\n## ")[1], re.MULTILINE | re.DOTALL)
# What a released model needs, and nothing that trains, plots, tests or builds.
REQUIRED = ("torch", "transformers", "safetensors", "huggingface_hub")

pytestmark = pytest.mark.slow


def run(command: list, folder: Path) -> str:
    """Run a command in a folder, without what the environment tells Python; its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def package_files() -> set[str]:
    """Paths of all that belongs to the package, tracked or about to be."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "hf_efficient"], ROOT).split()
    return {path for path in listed if (ROOT / path).exists()}


def needed_distributions(names: tuple[str, ...]) -> set[str]:
    """Names of what pip installs with these: they, what they require here, what that requires and so on."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, distribution(name).requires or [])
            waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def lend(names: set[str], site: Path) -> None:
    """Let another environment's packages folder see these installed distributions, and no others."""
    for name in names:
        here = distribution(name)
        for part in {file.parts[0] for file in here.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / part).exists():
                (site / part).symlink_to(here.locate_file(part))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel; the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    return folder


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory) -> Path:
    """The programs of a fresh environment into which the wheel was installed; pip finds its requirements there."""
    home = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(home, with_pip=True)
    bin = home / "bin"
    site = Path(run([bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    lend(needed_distributions(REQUIRED), site)
    (wheel,) = built.glob("*.whl")
    run([bin / "python", "-m", "pip", "install", "--no-index", wheel], home)
    return bin


def test_wheel_is_the_package_alone(built):
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert "hf_efficient/py.typed" in names


def test_sdist_is_the_package_and_what_builds_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    written = {name for name in names if name.startswith("hf_efficient.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - written == package_files() | {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}


def test_twine_finds_nothing_amiss(built):
    run([sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], built)


def test_no_tool_is_there(fresh):
    """Otherwise the tests below would prove little."""
    tools = ("accelerate", "datasets", "matplotlib", "pytest", "ruff", "mypy", "sacrebleu")
    program = f"from importlib.util import find_spec; print([name for name in {tools} if find_spec(name)])"
    assert run([fresh / "python", "-I", "-c", program], fresh) == "[]\n"


@pytest.mark.parametrize("index", range(len(FIRST_PROGRAMS)))
def test_readme_program_runs(fresh, index, tmp_path):
    """And imports the installed package, not the sources."""
    said = run([fresh / "python", "-I", "-W", "error", "-c", FIRST_PROGRAMS[index]], tmp_path)
    assert said.strip()


def test_the_installed_package_is_imported(fresh, tmp_path):
    program = "import hf_efficient; print(hf_efficient.__file__)"
    assert Path(run([fresh / "python", "-I", "-c", program], tmp_path).strip()).is_relative_to(fresh.parent)


def test_every_architecture_and_operation_is_imported(fresh, tmp_path):
    program = "import hf_efficient, hf_efficient.ops, hf_efficient.hub; "
    program += "[getattr(hf_efficient, name) for name in hf_efficient.__all__]"
    run([fresh / "python", "-I", "-W", "error", "-c", program], tmp_path)


def test_command_is_there(fresh, tmp_path):
    assert "publish" in run([fresh / "hf-efficient", "--help"], tmp_path)
