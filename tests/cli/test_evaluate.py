"""Figures of a saved model: as the trainer measured them, with and without memory, as a table and as JSON."""

import json

import pytest

from hf_efficient.cli.__main__ import main


def figures_of(arguments, capsys):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_agrees_with_the_trainer(finished_run, text_file, capsys):
    figures = figures_of([finished_run, "--text", text_file, "--segment_length", 16, "--batch_size", 2], capsys)
    validation = json.loads((finished_run / "report.json").read_text())["validation"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(validation[name], rel=1e-6)
    assert figures["bits_per_character"] == figures["bits_per_byte"]
    assert figures["num_bytes"] == text_file.stat().st_size


def test_memory_off_is_memory_zero(finished_run, text_file, capsys):
    common = [finished_run, "--text", text_file, "--segment_length", 16]
    off, zero, on = (figures_of([*common, *flags], capsys) for flags in (["--no_memory"], ["--mem_len", 0], []))
    assert off["loss"] == pytest.approx(zero["loss"], rel=1e-6)
    assert off["loss"] != pytest.approx(on["loss"], rel=1e-6)
    assert (off["memory"], on["memory"], on["mem_len"], zero["mem_len"]) == (False, True, 8, 0)


def test_same_length_does_not_depend_on_the_segment(finished_run, text_file, capsys):
    protocol = [finished_run, "--text", text_file, "--same_length", "--mem_len", 12, "--clamp_len", 10]
    short, long = (figures_of([*protocol, "--segment_length", length], capsys) for length in (8, 40))
    assert short["loss"] == pytest.approx(long["loss"], rel=1e-5)
    assert (short["same_length"], short["clamp_len"]) == (True, 10)


def test_table_and_json_file(finished_run, text_file, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main(["evaluate", str(finished_run), "--text", str(text_file), "--json", str(path)]) == 0
    table = capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert f"{figures['bits_per_byte']:.4f}" in table
    assert "perplexity" in table
    assert "memory carried        yes" in table


def test_characters_are_counted_as_unicode(finished_run, tmp_path, capsys):
    path = tmp_path / "umlauts.txt"
    path.write_text("Ünïcödé " * 50, encoding="utf-8")
    figures = figures_of([finished_run, "--text", path], capsys)
    assert figures["bits_per_character"] / figures["bits_per_byte"] == pytest.approx(12 / 8)
