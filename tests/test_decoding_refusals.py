"""Outputs that decoding does not write over: another job's, a user's own, a damaged part, one that two would write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from convexlm.decoding import decode_jobs
from convexlm.errors import UserError
from decoding_helpers import SOURCES, EchoBackend, fake_checkpoint, make_job, read, run_echo, stop_after, use_echo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    return use_echo(monkeypatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"num_beams": 4}}, "search num_beams: 1 there, 4 now"),
        ({"sources": [*SOURCES[:-1], "another"]}, "sources_sha256"),
        ({"sources": SOURCES[:4]}, "num_sentences: 9 there, 4 now"),
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 now"),
        ({"weights": b"other"}, "checkpoint_sha256"),
        ({"search": {"add_bos": True}}, "prompt add_bos"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_an_output_of_another_job_is_refused(
    echo: EchoBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
    finished: bool,
):
    if finished:
        run_echo(tmp_path)
    else:
        with monkeypatch.context() as patch:
            stop_after(patch, echo, 1)
            with pytest.raises(KeyboardInterrupt):
                run_echo(tmp_path, batch_size=3)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    change = dict(change)
    with pytest.raises(UserError, match=message) as error:
        run_echo(tmp_path, change.pop("sources", SOURCES), **change)
    assert "nothing was overwritten" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_files_that_are_not_ours_are_left_alone(echo: EchoBackend, tmp_path: Path):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    out.write_text("my notes\n")
    with pytest.raises(UserError, match=r"exists, without the out.meta.json"):
        run_echo(tmp_path)
    assert out.read_text() == "my notes\n"
    out.unlink()
    meta = tmp_path / "out.meta.json"
    meta.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is not the meta record of a decode file"):
        run_echo(tmp_path)
    assert meta.read_text() == '{"mine": 1}' and not part.exists()
    meta.unlink()
    for text, message in (
        ("my notes\n", "line 1: damaged"),
        ('{"a": 1}\n', "no header"),
        ("[]\n", "line 1"),
        ("a", "not a part"),
    ):
        part.write_text(text)
        with pytest.raises(UserError, match=message):
            run_echo(tmp_path)
        assert part.read_text() == text
    part.unlink()
    run_echo(tmp_path)
    out.write_text(out.read_text().replace("answer", "better answer"))
    with pytest.raises(UserError, match="was changed after it was written"):
        run_echo(tmp_path)
    out.unlink()  # made anew on purpose, though the meta record is still there
    assert run_echo(tmp_path, search={"num_beams": 2}).resumed == 0
    out.unlink()
    out.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        run_echo(tmp_path)


def test_a_damaged_line_in_the_middle_is_named(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, echo, 2)
    with pytest.raises(KeyboardInterrupt):
        run_echo(tmp_path, batch_size=2)
    part = tmp_path / "out.jsonl.part"
    lines = part.read_bytes().split(b"\n")
    for damage in (b'{"id": "0", "hyp', b"\xff\xfe", b'{"id": "77", "hypothesis": "x"}'):
        part.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(UserError, match="out.jsonl.part, line 3"):
            run_echo(tmp_path, batch_size=2)


def test_two_runs_at_once_on_one_output(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = EchoBackend.generate
    refusals = []

    def generate(self: EchoBackend, prompts: Any, search: Any) -> Any:
        if not refusals:
            refusals.append(None)
            with pytest.raises(UserError, match="another process is decoding into it right now"):
                run_echo(tmp_path)
        return original(self, prompts, search)

    monkeypatch.setattr(EchoBackend, "generate", generate)
    run_echo(tmp_path, batch_size=4)
    assert refusals
    assert len(read(tmp_path / "out.jsonl")) == len(SOURCES)


def test_refusals_come_before_the_model_and_leave_nothing(echo: EchoBackend, tmp_path: Path):
    run_echo(tmp_path)
    loads = echo.loads
    with pytest.raises(UserError, match="belongs to another job"):
        run_echo(tmp_path, search={"num_beams": 2})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="out.jsonl.part: cannot be written"):
        jobs = [make_job(tmp_path / "first.jsonl"), make_job(tmp_path / "file" / "out.jsonl")]
        decode_jobs(tmp_path / "model", jobs, device="cpu")
    assert echo.loads == loads
    assert not list(tmp_path.glob("*.part"))


def test_jobs_that_would_share_an_output_are_refused(echo: EchoBackend, tmp_path: Path):
    jobs = [make_job(tmp_path / "out.jsonl", length_penalty=penalty) for penalty in (1.0, 2.0)]
    with pytest.raises(UserError, match="would both be written"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), jobs, device="cpu")
    empty = make_job(tmp_path / "out.jsonl", [])
    with pytest.raises(UserError, match="nothing to decode"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), [empty], device="cpu")
