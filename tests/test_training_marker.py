"""What identifies the files that a training is made from."""

from __future__ import annotations

from convexlm import training_marker
from convexlm.files import file_sha256
from convexlm.training_marker import content_of


def test_small_files_count_whole_and_large_ones_by_size_and_parts(tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_bytes(bytes(range(256)) * 40)
    assert content_of(file) == file_sha256(file)
    monkeypatch.setattr(training_marker, "_WHOLE", 100)
    monkeypatch.setattr(training_marker, "_PART", 16)
    known = content_of(file)
    assert known == content_of(file) != file_sha256(file)
    raw = file.read_bytes()
    for changed in (b"x" + raw[1:], raw[:-1] + b"x", raw + b"\0", raw[:5000] + bytes(200) + raw[5200:]):
        file.write_bytes(changed)
        assert content_of(file) != known


def test_a_folder_counts_by_the_files_asked_for_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text("weights")
        (tmp_path / name / "sub" / "shard.jsonl").write_text("{}")
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    (tmp_path / "b" / "sub" / "shard.jsonl").write_text("[]")
    assert content_of(tmp_path / "a") != content_of(tmp_path / "b")
    assert content_of(tmp_path / "a", "*.safetensors") == content_of(tmp_path / "b", "*.safetensors") is not None
    assert content_of(tmp_path / "a", "*.bin") is None and content_of(tmp_path / "none") is None
