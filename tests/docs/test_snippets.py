"""Every Python program on a page runs, in the order of the page, and prints what the comment beside it says."""

import ast
import re
import shutil

import pytest
from docs_pages import PAGES, ROOT, blocks

WITH_PROGRAMS = [path for path in PAGES if blocks(path, "python")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run programs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def promised(program: str) -> list[str]:
    """What comments behind `print(...)` promise: the words up to a colon or the end."""
    comments = re.findall(r"^print\(.*\)  # ([^:\n]+)", program, re.MULTILINE)
    return [comment.strip() for comment in comments]


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_programs_run(page, folder, trained_model, capsys):
    if page.stem == "sharing":
        shutil.copytree(trained_model, folder / "runs" / "mine")
        (folder / "runs" / "mine" / "trainer_state.json").write_text('{"log_history": []}')  # as trainer.save_state()
    names = {}
    for program in blocks(page, "python"):
        capsys.readouterr()
        exec(compile(ast.parse(program), str(page), "exec"), names)
        printed = capsys.readouterr().out
        for words in promised(program):
            assert words in printed


def test_promises_are_read():
    assert promised("print(a)  # (2, 7): steps\nb  # no\nprint(c)  # True") == ["(2, 7)", "True"]
