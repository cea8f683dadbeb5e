"""The commands of README and of the first pages do what they say: run one after the other, with little work each."""

import io

import pytest
from docs_pages import ROOT, cheap, commands, prepare

from hf_efficient.cli.__main__ import main

# Run by tests of their own, or on files that are not at hand.
ELSEWHERE = {
    "demo": "tests/cli/test_demo.py",
}


PAGES = ["README.md", "docs/quick_start.md", "docs/sharing.md", "docs/architectures/evolved_transformer.md"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, tmp_path, monkeypatch, capsys, trained_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
    prepare(tmp_path)
    shown = [words[1:] for words in commands(ROOT / page) if words[0] == "hf-efficient"]
    assert shown
    if page == "docs/sharing.md":
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "mine").symlink_to(trained_model)
    for words in shown:
        if words[0] not in ELSEWHERE:
            assert main(cheap(words)) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("path", ELSEWHERE.values())
def test_tests_of_the_others_are_there(path):
    assert (ROOT / path).is_file()
