"""`convexlm theory` as people and scripts call it."""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from convexlm.cli import main
from convexlm.verbs import theory

if TYPE_CHECKING:
    from pathlib import Path

DATA = ["--probabilities", ".4", ".3", ".2", ".1"]


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["theory", *words, "--json"]) == 0
    out, _ = capsys.readouterr()
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["theory", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().split("\n")) == 1
    return err


def shown(*words: str, width: int = 100) -> str:
    out = io.StringIO()
    theory.show(theory.run(theory.make_parser("t").parse(list(words))), Console(file=out, width=width))
    return out.getvalue()


def test_json_has_what_scripts_rely_on(capsys):
    result = as_json(capsys, *DATA, "--length", "10", "--objective", "convex", "--k", "1", "5", "10")
    assert [best["k"] for best in result["optima"]] == [1, 5, 10]
    assert result["optima"][1]["probabilities"] == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert result["optima"][1]["temperature"] == 0.5
    assert result["optima"][2]["probabilities"] == [1, 0, 0, 0]
    assert [best["method"] for best in result["optima"]] == ["closed form"] * 3
    for best in result["optima"]:
        assert best["entropy"] == pytest.approx(-sum(p * math.log(p) for p in best["probabilities"] if p), abs=1e-12)
        assert best["mode_mass"] == max(best["probabilities"])
    assert result["data"]["probabilities"] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert result["data"]["lengths"] == [10] * 4
    assert result["objective"]["name"] == "convex"


@pytest.mark.parametrize(("k", "nats"), [("1", 1.280), ("0.5", 1.160), ("0.2", 0.033)])
def test_known_entropies(capsys, k, nats):
    (best,) = as_json(capsys, *DATA, "--length", "10", "--objective", "power", "--k", k)["optima"]
    assert best["entropy"] == pytest.approx(nats, abs=5e-4)


def test_every_setting_reaches_the_objective(capsys):
    words = ["--length", "5", "10", "10", "20", "--k", "2", "--level", "sequence", "--mle_mix", "0.2"]
    by_sequence = as_json(capsys, *DATA, *words, "--length_weighting", "sequence")
    by_token = as_json(capsys, *DATA, *words, "--length_weighting", "token")
    assert by_sequence["optima"][0]["probabilities"] != pytest.approx(by_token["optima"][0]["probabilities"], abs=0.01)
    assert by_sequence["objective"] == {
        "name": "convex", "level": "sequence", "length_weighting": "sequence", "mle_mix": 0.2
    }  # fmt: skip
    token = as_json(capsys, *DATA, "--length", "1", "--k", "0.5", "--level", "token")
    assert token["optima"][0]["temperature"] == 0.5
    assert as_json(capsys, *DATA, "--length", "9", "--objective", "mle")["optima"][0]["k"] is None
    assert as_json(capsys, *DATA, "--length", "9", "--objective", "dft")["optima"][0]["probabilities"][0] == 1
    assert as_json(capsys, *DATA, "--length", "9", "--objective", "power")["optima"][0]["k"] == 0.5


def test_config_file_and_plugin(capsys, tmp_path):
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n"
        "from convexlm.objectives import Objective, register_objective\n"
        "@register_objective('theory-own')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Own(Objective):\n"
        "    def value(self, m): return m / (m - 1)\n"
        "    def weight(self, m): return 1 / (m - 1) ** 2\n"
    )
    (tmp_path / "c.yaml").write_text("probabilities: [0.5, 0.3, 0.2]\nlength: 4\nobjective: theory-own\n")
    result = as_json(capsys, "--config", str(tmp_path / "c.yaml"), "--plugins", str(tmp_path / "own.py"))
    (best,) = result["optima"]
    assert best["method"] == "solved"
    assert best["kkt_residual"] < 1e-9
    assert best["entropy"] < result["data"]["entropy"]
    from convexlm import objectives

    del objectives._registry["theory-own"]


def test_the_page_is_written(capsys, tmp_path: Path):
    path = tmp_path / "new" / "theory.html"
    assert as_json(capsys, *DATA, "--length", "10", "--k", "5", "1", "--page", str(path))["page"] == str(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert '"k": 5.0' in text
    assert main(["theory", "--page", str(path)]) == 0
    capsys.readouterr()
    path.write_text("<!doctype html>mine", encoding="utf-8")
    assert "is there, and is no earlier page" in refused(capsys, "--page", str(path))
    assert path.read_text(encoding="utf-8") == "<!doctype html>mine"


def test_what_people_see():
    text = shown(*DATA, "--length", "10", "--k", "1", "5", "11")
    assert "0.533" in text
    assert "1.078 nats" in text
    assert "█" in text
    assert "k = 11: not concave" in text
    assert "T = 10" in text
    unequal = shown(*DATA, "--length", "5", "10", "10", "20", "--k", "2")
    assert "solved" in unequal
    assert " T " in unequal
    narrow = shown(*DATA, "--length", "10", "--k", "1", "2", "3", "4", width=60)
    assert "0.400" in narrow
    assert max(map(len, narrow.split("\n"))) <= 60
    assert "maximum likelihood" not in shown(*DATA, "--length", "10", "--objective", "mle")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--probabilities and --length missing"),
        (["--probabilities", "1"], "--length missing"),
        (["--length", "4"], "--probabilities missing"),
        (["--probabilities", ".5", ".6", "--length", "4"], "sum to 1.1"),
        (["--probabilities", "-.5", "1.5", "--length", "4"], "probability 1 is -0.5"),
        (["--probabilities", "nan", "1", "--length", "4"], "probability 1 is nan"),
        (["--probabilities", "a", "--length", "4"], "invalid float value"),
        (["--probabilities", "--length", "4"], "expected at least one"),
        ([*DATA, "--length", "0"], "above 0"),
        ([*DATA, "--length", "inf"], "above 0"),
        ([*DATA, "--length", "1", "2"], "2 lengths for 4"),
        ([*DATA, "--length", "4", "--k", "0"], "k must be"),
        ([*DATA, "--length", "4", "--k", "nan"], "k must be"),
        ([*DATA, "--length", "4", "--objective", "power", "--k", "2"], "k must be"),
        ([*DATA, "--length", "4", "--objective", "dft", "--k", "2"], "is `convex` with k=1.0"),
        ([*DATA, "--length", "4", "--objective", "mle", "--k", "1"], "has no k"),
        ([*DATA, "--length", "4", "--objective", "nope"], "unknown objective `nope`"),
        ([*DATA, "--length", "4", "--mle_mix", "2"], "mle_mix must be"),
        ([*DATA, "--length", "4", "--level", "word"], "invalid choice"),
        ([*DATA, "--length", "4", "--plugins", "no_such.py"], "no such file"),
        ([*DATA, "--length", "4", "--page", "/proc/none/page.html"], "cannot be written"),
        ([*DATA, "--length", "20000", "--page", "x.html"], "lengths up to"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert message in refused(capsys, *words)
