"""The command that draws the plot of docs/objectives.md."""

from __future__ import annotations

from convexlm.plot_objectives import CURVES, main


def test_the_plot_is_drawn_twice_the_same(tmp_path, capsys):
    first, second = tmp_path / "new" / "a.svg", tmp_path / "b.svg"
    assert main([str(first)]) == 0 and main([str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"<?xml") and len(CURVES) >= 5
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_drawn_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "plot.docx")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "plot.docx" in error
