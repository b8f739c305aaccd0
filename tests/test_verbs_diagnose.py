"""`convexlm diagnose` as a user runs it."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

from convexlm.cli import main
from convexlm.instructions import load_records
from convexlm.tokenization import PromptSettings, tokenize_records
from diagnosis_helpers import forward_by_hand, make_checkpoint, make_data
from training_helpers import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "d.jsonl", 60, source=lambda n: ["web", "book"][n % 2])


def words(checkpoint, data, *more):
    return ["diagnose", "--model_name_or_path", str(checkpoint), "--dataset", str(data), *map(str, more)]


def diagnosed(capsys, checkpoint, data, *more):
    assert main([*words(checkpoint, data, *more), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, checkpoint, data, *more):
    capsys.readouterr()
    assert main(words(checkpoint, data, *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("convexlm diagnose: error: ")
    return err


def test_the_json_is_what_a_float64_forward_gives(capsys, checkpoint, data):
    found = diagnosed(capsys, checkpoint, data, "--k", 0.5, 2)
    rows = tokenize_records(load_records(data), tiny_tokenizer(), PromptSettings(), None).rows
    by_hand = forward_by_hand(checkpoint, rows)
    m = np.array([x.mean() for x, _ in by_hand])
    tokens = np.array([len(x) for x, _ in by_hand])
    assert found["data"]["num_target_tokens"] == tokens.sum()
    assert found["data"]["nll"] == pytest.approx(-np.concatenate([x for x, _ in by_hand]).mean(), abs=1e-4)
    assert found["data"]["p_bar"]["quantiles"]["0.5"] == pytest.approx(np.median(np.exp(m)), rel=1e-3)
    assert sum(found["data"]["histogram"]["counts"]) == 60
    assert [entry["k"] for entry in found["objectives"]] == [0.5, 2.0]
    for entry in found["objectives"]:
        w = np.exp(entry["k"] * m)
        assert entry["weight"]["mean"] == pytest.approx(w.mean(), rel=1e-3)
        assert entry["weight"]["effective_sample_size"] == pytest.approx(w.sum() ** 2 / (60 * (w**2).sum()), rel=1e-3)
        assert entry["update_ratio"] == pytest.approx((w * tokens).sum() / tokens.sum(), rel=1e-3)
        assert entry["gets_nothing"]["count"] == (w < 0.01).sum()
        assert [row["index"] for row in entry["neglected"][:3]] == list(np.argsort(m)[:3])
        assert {row["source"] for row in entry["by_source"]} == {"web", "book"}
    assert found["end_p"] == pytest.approx(np.exp(np.mean([x[-1] for x, _ in by_hand])), rel=1e-3)
    worst = found["records"][str(int(np.argmin(m)))]
    assert worst["completion"] == load_records(data)[int(np.argmin(m))].completion
    assert found["advice"] and all(set(one) >= {"finding", "advice", "reason", "evidence"} for one in found["advice"])


def test_the_summary_and_stderr(capsys, checkpoint, data):
    assert main(words(checkpoint, data, "--batch_size", 4)) == 0
    out, err = capsys.readouterr()
    for said in ("convex k=0.5", "convex k=4", "most neglected", "advice", "[derived]", "60 of 60 records"):
        assert said in out
    assert "no convexlm.json" in err and "measured 60/60 records" in err


def test_the_second_run_loads_no_model(capsys, checkpoint, data, monkeypatch):
    first = diagnosed(capsys, checkpoint, data)
    import convexlm.decoding.loading as loading

    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", never)
        second = diagnosed(capsys, checkpoint, data, "--objective", "dft", "--batch_size", 3)
        assert second["cached"] == [True] and first["cached"] == [False]
        assert second["data"] == first["data"]
        for change in (
            ["--seed", 1, "--max_records", 30],
            ["--max_length", 8],
            ["--no_cache"],
            ["--dtype", "bfloat16"],
        ):
            with pytest.raises(AssertionError):
                main(words(checkpoint, data, *change))
        capsys.readouterr()


def test_a_damaged_cache_is_measured_anew(capsys, checkpoint, data, tmp_path):
    first = diagnosed(capsys, checkpoint, data)
    (file,) = (tmp_path / "cache" / "diagnose").iterdir()
    file.write_bytes(b"PK\x03\x04 broken")
    again = diagnosed(capsys, checkpoint, data)
    assert again["cached"] == [False] and again["data"] == first["data"]
    assert diagnosed(capsys, checkpoint, data)["cached"] == [True]


def test_an_unwritable_cache_is_no_reason_to_fail(capsys, checkpoint, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path / "file"))
    assert main(words(checkpoint, data)) == 0
    assert "could not be kept" in capsys.readouterr().err


def test_comparing_two_checkpoints(capsys, tmp_path, data):
    before, after = make_checkpoint(tmp_path / "a", seed=0), make_checkpoint(tmp_path / "b", seed=5)
    PromptSettings("prompt_no_alpaca", True).save(after)
    page = tmp_path / "p.html"
    found = diagnosed(capsys, before, data, "--compare", after, "--page", page)["comparison"]
    rows = tokenize_records(load_records(data), tiny_tokenizer(), PromptSettings(), None).rows
    for key, folder in (("before", before), ("after", after)):
        by_hand = [x for x, _ in forward_by_hand(folder, rows)]
        assert found["all"][f"nll_{key}"] == pytest.approx(-np.concatenate(by_hand).mean(), abs=1e-4)
        assert found["all"][f"p_bar_{key}"] == pytest.approx(np.mean([np.exp(x.mean()) for x in by_hand]), rel=1e-3)
    assert len(found["by_p_bar"]) == 10
    assert "Before and after" in page.read_text(encoding="utf-8")
    same = diagnosed(capsys, before, data, "--compare", before)["comparison"]
    assert same["all"]["nll_before"] == same["all"]["nll_after"]


def test_an_adapter_is_measured_with_its_base_model(capsys, tmp_path, data):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_checkpoint(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    adapted = diagnosed(capsys, tmp_path / "adapter", data)["data"]
    assert adapted["nll"] == pytest.approx(diagnosed(capsys, tmp_path / "merged", data)["data"]["nll"], abs=1e-5)
    assert abs(adapted["nll"] - diagnosed(capsys, base, data)["data"]["nll"]) > 0.1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PREFIX_TUNING"}))
    assert "virtual tokens" in refused(capsys, tmp_path / "adapter", data)


def test_prompts_are_made_as_the_checkpoint_says(capsys, tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"instruction": f"w{i} w1", "output": "w3 w4"} for i in range(30)]), encoding="utf-8")
    default = diagnosed(capsys, folder, path)
    assert default["prompt"] == {"template": "alpaca", "add_bos": True}
    given = diagnosed(capsys, folder, path, "--template", "prompt_no_alpaca")
    PromptSettings("prompt_no_alpaca", False).save(folder)
    own = diagnosed(capsys, folder, path)
    assert own["prompt"] == {"template": "prompt_no_alpaca", "add_bos": False}
    assert len({default["data"]["nll"], given["data"]["nll"], own["data"]["nll"]}) == 3
    assert diagnosed(capsys, folder, path, "--template", "alpaca")["prompt"] == {
        "template": "alpaca",
        "add_bos": False,
    }


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x00\u202eevil\u202c \"' &amp; {{ 7*7 }} \x1b[31m"
)


def test_hostile_text_stays_text(capsys, checkpoint, tmp_path):
    name = 'd"><script>alert(3)<'
    records = [
        {"prompt": f"w{i} {HOSTILE}", "completion": f"{HOSTILE} w{i}", "source": f"<b onclick=x>{i % 2}{HOSTILE}"[:60]}
        for i in range(30)
    ]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    page, output = tmp_path / "p.html", tmp_path / "o.json"
    assert main(words(checkpoint, path, "--page", page, "--output_file", output)) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\u202e" not in out and "\x00" not in out
    text = page.read_text(encoding="utf-8")
    tags = set(re.findall(r"<\s*/?\s*([a-zA-Z][\w-]*)", text))
    assert not tags & {"script", "img", "b onclick", "iframe", "object", "link"}
    assert not re.search(r"<[^>]*\bon\w+\s*=", text) and "49" not in re.findall(r"\{\{.*?\}\}", text)
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069]", text)
    assert "⟨U+0000⟩⟨U+202E⟩evil" in text and html.escape("<img src=x onerror=alert(2)>") in text
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text
    assert str(tmp_path) not in text
    assert json.loads(output.read_text(encoding="utf-8"))["records"]["0"]["completion"].startswith(HOSTILE)


def test_the_page_is_whole_and_well_formed(capsys, checkpoint, data, tmp_path):
    from html.parser import HTMLParser

    page = tmp_path / "p.html"
    objectives = ("--objective", "convex", "power", "dft", "mle")
    assert main(words(checkpoint, data, *objectives, "--page", page)) == 0
    assert "page:" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "br", "input"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert not open_tags
    assert text.count("<svg") >= 4 and "nan" not in re.sub(r"\w*nan\w+|\w+nan\w*", "", text.lower())
    for said in ("convex k=0.5", "power k=0.5", "dft", "Where the gradient goes", "most neglected", "d.jsonl:"):
        assert said in text


def test_a_browser_shows_the_page_without_a_complaint(checkpoint, data, tmp_path):
    from browser import Browser

    page = tmp_path / "p.html"
    assert main(words(checkpoint, data, "--compare", checkpoint, "--page", page)) == 0
    browser = Browser(tmp_path / "profile")
    try:
        for width, theme in ((1180, "light"), (390, "dark")):
            browser.open(page, width=width, theme=theme)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.querySelectorAll('section').length") == 5
            assert browser.problems == []
    finally:
        browser.close()


def test_settings_reach_the_objectives_and_their_labels(capsys, checkpoint, data, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("k: [1, 2]\nlevel: token\nmle_mix: 0.1\nlength_weighting: sequence\n")
    found = diagnosed(capsys, checkpoint, data, "--config", config)["objectives"]
    assert [entry["label"] for entry in found] == [
        "convex k=1 by token mle_mix=0.1",
        "convex k=2 by token mle_mix=0.1",
    ]
    settings = {"name": "convex", "level": "token", "length_weighting": "sequence", "mle_mix": 0.1, "k": 2.0}
    assert found[1]["objective"] == settings
    assert found[0]["weight"]["min"] >= 0.1 and found[0]["weight"]["units"] == "tokens"
    several = diagnosed(capsys, checkpoint, data, "--objective", "mle", "dft", "power", "convex")["objectives"]
    labels = ["mle", "dft", "power k=0.5", *(f"convex k={k}" for k in ("0.5", "1", "2", "4"))]
    assert [entry["label"] for entry in several] == labels


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--k", "0"], "k must be"),
        (["--k", "-1", "2"], "k must be"),
        (["--k", "nan"], "k must be"),
        (["--objective", "power", "--k", "2"], "k must be"),
        (["--objective", "mle", "--k", "1"], "no k"),
        (["--objective", "dft", "--k", "2"], "dft"),
        (["--objective", "nonesuch"], "nonesuch"),
        (["--mle_mix", "2"], "mle_mix"),
        (["--max_records", "0"], "--max_records"),
        (["--max_length", "1"], "--max_length"),
        (["--batch_size", "0"], "--batch_size"),
        (["--template", "nonesuch"], "nonesuch"),
        (["--source_field", "nowhere"], "nowhere"),
        (["--dtype", "int3"], "int3"),
        (["--device", "nonesuch"], "nonesuch"),
        (["--compare", "/no/such/checkpoint"], "no such checkpoint"),
        (["--page", "."], "--page"),
        (["--output_file", "/proc/no/such/o.json"], "--output_file"),
    ],
)
def test_bad_options_are_one_line(capsys, checkpoint, data, more, said):
    assert said in refused(capsys, checkpoint, data, *more).replace("measured", "")


def test_bad_files_are_one_line(capsys, checkpoint, data, tmp_path):
    assert "no such checkpoint" in refused(capsys, tmp_path / "none", data)
    assert "config.json" in refused(capsys, tmp_path, data)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in refused(capsys, checkpoint, empty)
    assert "no such file" in refused(capsys, checkpoint, tmp_path / "none.jsonl")
    empty.write_text('{"prompt": "a"}\n')
    assert "line 1" in refused(capsys, checkpoint, empty)
    empty.write_text('{"prompt": "w1", "completion": "w2", "weight": 0}\n')
    assert "weight 0" in refused(capsys, checkpoint, empty)
    assert "fill" in refused(capsys, checkpoint, data, "--max_length", 2)


def test_checkpoints_of_other_tokenizers_or_prompts_are_not_compared(capsys, checkpoint, data, tmp_path):
    from convexlm.tinyworld.tokenizer import train_tokenizer

    other = make_checkpoint(tmp_path / "other")
    PromptSettings("prompt_input").save(other)
    mine = make_checkpoint(tmp_path / "mine")
    PromptSettings("alpaca").save(mine)
    assert "--template" in refused(capsys, mine, data, "--compare", other)
    (other / "convexlm.json").unlink()
    train_tokenizer(["w1 w2 w3"], vocab_size=300).save_pretrained(other)
    assert "tokenizer" in refused(capsys, mine, data, "--compare", other)


def test_one_record_is_enough(capsys, checkpoint, tmp_path):
    path = make_data(tmp_path / "one.jsonl", 1)
    found = diagnosed(capsys, checkpoint, path, "--page", tmp_path / "p.html")
    assert found["objectives"][0]["weight"]["effective_sample_size"] == pytest.approx(1.0)
    assert "few-records" in {one["rule"] for one in found["advice"]}


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys\nfrom convexlm.cli import main\n"
        "try: main(['diagnose', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--compare" in done.stdout, done.stderr
