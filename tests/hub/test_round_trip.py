"""Pushed over HTTP, loaded in a process of its own: with this package, and where it is not installed."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hub.loopback_hub import TOKEN, USER, Fault
from hub.published_models import QUICK_ROWS, ROWS, model_type, own_tokenizer, save_expected, save_published

from hf_efficient.hub import publish
from hf_efficient.hub.model_card import PAPERS
from hf_efficient.hub.remote_code import architecture_classes

LOADER = Path(__file__).parent / "load_published.py"
# Runs a program with the installed libraries, but without what .pth files add: this package, installed for editing.
ISOLATED = "import sys, runpy; sys.path.append(sys.argv[1]); del sys.argv[0]; sys.argv.pop(0); "
ISOLATED += "runpy.run_path(sys.argv[0], run_name='__main__')"


def push(rows, tmp_path, with_code):
    """Publish a small model for each row, and return the folder with what they compute."""
    expected = tmp_path / "expected"
    expected.mkdir()
    for row in rows:
        saved = save_published(row, tmp_path / "saved" / row.name, own_tokenizer(row.architecture))
        save_expected(row, saved, expected / f"{USER}--{row.name}--{row.auto_class}.safetensors")
        publish(saved, row.name, with_code=with_code)
    return expected


def load(python, expected, mode, hub, tmp_path, timeout=280):
    """Run the loader in a process that knows nothing but the Hub's address; the modules it reports."""
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    run = subprocess.run(
        [*python, LOADER, expected, mode],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def isolated_python():
    """A Python that sees torch and transformers as they are installed here, and not hf_efficient."""
    return [sys.executable, "-I", "-S", "-c", ISOLATED, sysconfig.get_path("purelib")]


def test_loads_and_trains_with_code_where_the_package_is_not_installed(hub, tmp_path):
    """The second model arrives although its download is cut."""
    expected = push(QUICK_ROWS, tmp_path, with_code=True)
    cut = Fault("GET", f"/{USER}/{QUICK_ROWS[1].name}/resolve/", cut_after=200, of_answer=True, times=1)
    hub.faults.append(cut)
    modules = load(isolated_python(), expected, "train", hub, tmp_path)
    assert len(modules) == len(QUICK_ROWS)
    assert all(module.startswith("transformers_modules.") for module in modules.values())
    assert cut.times == 0


def test_loads_without_code_where_the_package_is_installed(hub, tmp_path):
    """And push_to_hub works as ever; what it leaves out, a later publication adds."""
    expected = push(QUICK_ROWS, tmp_path, with_code=False)
    assert not any(name.endswith(".py") for repository in hub.repositories for name in hub.files(repository))
    modules = load([sys.executable], expected, "push", hub, tmp_path)
    assert len(modules) == len(QUICK_ROWS)
    assert all(module.startswith("hf_efficient.") for module in modules.values())
    row = QUICK_ROWS[0]
    pushed, published = f"{USER}/{row.name}-pushed", hub.files(f"{USER}/{row.name}")
    assert hub.files(pushed)["model.safetensors"] == published["model.safetensors"]
    publish(tmp_path / "saved" / row.name, pushed, exist_ok=True)
    assert hub.files(pushed).keys() == published.keys()


def test_every_auto_class_has_a_row():
    for architecture in PAPERS:
        covered = {row.auto_class for row in ROWS if row.architecture == architecture}
        assert covered == architecture_classes(model_type(architecture)).keys() - {"AutoConfig"}, architecture


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("mode", ["trust", "installed"])
def test_every_class_in_a_clean_environment(hub, tmp_path, mode):
    """`make test-hub` names the Python of an environment that has torch and transformers alone."""
    clean = os.environ.get("HF_EFFICIENT_CLEAN_PYTHON")
    if mode == "trust" and clean is None:
        pytest.skip("run by `make test-hub`, which makes the environment")
    expected = push(ROWS, tmp_path, with_code=mode == "trust")
    modules = load([clean if mode == "trust" else sys.executable], expected, mode, hub, tmp_path, timeout=800)
    assert len(modules) == len(ROWS)
