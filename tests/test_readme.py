"""The README's commands, example and links, held to what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from convexlm.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a page that are marked with `language`."""
    found, fence = [], None
    for line in text.splitlines(keepends=True):
        if not line.startswith("```"):
            if fence is not None:
                fence[1].append(line)
        elif fence is None:
            fence = (line[3:].strip(), [])
        else:
            found.append(fence)
            fence = None
    return ["".join(lines) for name, lines in found if name == language]


COMMANDS = [line for block in blocks(README) for line in block.splitlines() if line.startswith("convexlm ")]


def test_the_two_make_commands_are_targets():
    commands = [line.split("#")[0].split() for line in blocks(README)[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for command in commands:
        done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (
        "convexlm demo"
        in subprocess.run(["make", "demo", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_verbs_and_options_that_exist(command, capsys):
    verb = command.split()[1]
    assert verb in VERBS
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    usage = capsys.readouterr().out
    for option in re.findall(r"--\w+", command):
        assert option in usage, f"`convexlm {verb}` has no {option}"


def test_every_verb_is_in_the_readme():
    named = {command.split()[1] for command in COMMANDS}
    assert set(VERBS) - named <= {"demo", "diagnose", "export"}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        found = page.parent / target if target else page
        assert found.exists(), target
        if heading:  # as GitHub makes anchors of headings
            titles = re.findall(r"(?m)^#+ (.+)$", found.read_text(encoding="utf-8"))
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{target}#{heading}"


def test_the_trl_example_trains(tmp_path, monkeypatch, tiny_llama):
    """The example as it stands, with the hub's model and data set replaced by small local ones."""
    import datasets
    import trl

    model_path = tmp_path / "model"
    shutil.copytree(tiny_llama, model_path)
    # The template of the example's model, as its tokenizer has it: TRL knows where its assistant's turns are.
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    shutil.copyfile(template, model_path / "chat_template.jinja")
    turns = [{"role": role, "content": "one two"} for role in ("user", "assistant") * 2]  # as in Capybara
    rows = [{"messages": turns}] * 4
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    (example,) = blocks(README, "python")[:1]
    assert len(example.splitlines()) <= 10
    example = example.replace('"Qwen/Qwen3-0.6B"', repr(str(model_path)))
    fewer = f"output_dir={str(tmp_path / 'out')!r}, max_steps=2, report_to='none'"
    example = example.replace('output_dir="out"', fewer)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(example, "README", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 2
    labels = next(iter(namespace["trainer"].get_train_dataloader()))["labels"]
    trained = namespace["trainer"].processing_class.decode(labels[labels != -100])
    assert "user" not in trained and trained.count("one two") >= 2, "the turns of the assistant, and all of them"


def test_the_objective_of_contributing_is_found_by_name(tmp_path):
    from convexlm import get_objective
    from convexlm.plugins import load_plugins

    (source,) = [block for block in blocks(CONTRIBUTING, "python") if "@register_objective" in block]
    assert len([line for line in source.splitlines() if line.strip()]) < 15
    plugin = tmp_path / "my_objectives.py"
    plugin.write_text(source.replace('"reciprocal"', '"reciprocal_of_contributing"'), encoding="utf-8")
    load_plugins([str(plugin)])
    import torch

    objective = get_objective("reciprocal_of_contributing", scale=2.0)
    m = torch.tensor([-2.0, -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    objective.value(m).sum().backward()
    assert torch.allclose(-m.grad, objective.weight(m.detach()))
    assert objective.value(torch.zeros(())) == 0
