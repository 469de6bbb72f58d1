"""`m3i push`: what goes to the Hub, and what keeps it from going."""

from __future__ import annotations

import huggingface_hub
import pytest

from m3i_scale.cli import main
from m3i_scale.transfer import push


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "exported"
    (made / "more").mkdir(parents=True)
    for name, size in (("README.md", 10), ("model.safetensors", 2000), ("more/[a]*.txt", 3)):
        (made / name).write_bytes(bytes(size))
    (made / ".cache").mkdir()
    (made / ".cache" / "hidden").write_bytes(b"1")
    (made / ".hidden").write_bytes(b"1")
    return made


@pytest.fixture
def hub(monkeypatch):
    """Calls of the client, which reaches no network; there is a token."""
    calls = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            name,
            lambda self, *words, name=name, **options: calls.append((name, words, options)),
        )
    return calls


def test_a_dry_run_shows_what_would_go_and_sends_nothing(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        ["10", "README.md"],
        ["2,000", "model.safetensors"],
        ["3", "more/[a]*.txt"],
    ]
    assert " ".join(lines[3]) == "2,013 bytes in 3 files would go to me/model"
    assert hub == []


def test_the_shown_files_go(folder, hub):
    assert main(["push", str(folder), "me/model", "--private"]) == 0
    (made, _, options), (uploaded, _, upload) = hub
    assert (made, uploaded) == ("create_repo", "upload_folder")
    assert (options["private"], options["exist_ok"]) == (True, True)
    assert upload["repo_id"] == "me/model"
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=upload["allow_patterns"]
    )
    assert set(chosen) == {"README.md", "model.safetensors", "more/[a]*.txt"}


def refused(words, capsys):
    assert main(["push", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_without_a_token(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no Hugging Face token: run `hf auth login`" in refused(
        [str(folder), "me/model"], capsys
    )
    assert hub == []


def test_without_huggingface_hub(folder, monkeypatch, capsys):
    monkeypatch.setattr(push.importlib.util, "find_spec", lambda name: None)
    assert "pip install huggingface_hub" in refused([str(folder), "me/model"], capsys)


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", "-me/model", "https://hf.co/me/m"])
def test_names_that_the_hub_does_not_allow(folder, hub, capsys, name):
    assert "epo" in refused(["--dry-run", "--", str(folder), name], capsys)
    assert hub == []


def test_other_folders_are_refused(tmp_path, hub, capsys):
    assert "there is no folder" in refused([str(tmp_path / "x"), "me/model"], capsys)
    (tmp_path / "README.md").write_text("mine")
    assert "is no exported folder" in refused([str(tmp_path), "me/model"], capsys)


def test_what_the_hub_says_is_passed_on(folder, hub, monkeypatch, capsys):
    class ClientError(Exception):  # as errors of an HTTP library are
        pass

    def unreachable(*words, **options):
        raise ClientError("no route\nto the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    line = refused([str(folder), "me/model"], capsys)
    assert "the upload did not succeed (no route to the Hub)" in line
