"""The script that says what a newer transformers broke: silent on what holds, one line for what does not."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / ".ci" / "what_broke.py"
CHECKS = """
def test_holds():
    pass


def test_symbol_is_there():
    assert False, "transformers.gone is gone"
"""


def test_names_what_broke(tmp_path):
    checks = tmp_path / "test_checks.py"
    checks.write_text(CHECKS, encoding="utf-8")
    finished = subprocess.run([sys.executable, SCRIPT, checks], capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    lines = finished.stdout.splitlines()
    assert "transformers" in lines[0]
    assert lines[1:] == ["BROKE  test_symbol_is_there: transformers.gone is gone", "1 checks hold, 1 do not"]


def test_is_content_where_all_holds(tmp_path):
    checks = tmp_path / "test_checks.py"
    checks.write_text(CHECKS.partition("\n\n\ndef test_symbol")[0], encoding="utf-8")
    finished = subprocess.run([sys.executable, SCRIPT, checks], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[1:] == ["1 checks hold, 0 do not"]


def test_a_file_that_cannot_be_imported_is_a_finding(tmp_path):
    checks = tmp_path / "test_checks.py"
    checks.write_text("from transformers.gone import Gone\n", encoding="utf-8")
    finished = subprocess.run([sys.executable, SCRIPT, checks], capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "No module named 'transformers.gone'" in finished.stdout
