"""Preparing SmolLM2: once, complete or not at all, and with one clear line where it cannot be had."""

from pathlib import Path

import pytest

from data import smollm2


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_from_hub", lambda out: None)


def write(out: Path) -> str:
    out.mkdir()
    (out / "config.json").write_text("{}")
    return "package"


def test_a_prepared_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None):
    calls = []
    monkeypatch.setattr(smollm2, "_from_package", lambda out: calls.append(out) or write(out))
    assert [smollm2.prepare(tmp_path / "model") for _ in range(2)] == ["package"] * 2
    assert len(calls) == 1 and (tmp_path / "model" / "config.json").exists()


def test_an_interrupted_preparation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None):
    def interrupted(out: Path) -> str:
        write(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_from_package", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(smollm2, "_from_package", write)
    assert smollm2.prepare(tmp_path / "model") == "package"


def test_a_missing_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_hub: None
):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    assert smollm2.main([str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "run make demo-llm" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
