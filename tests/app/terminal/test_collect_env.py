"""`sluice collect-env`: what a report says, and what it never says."""

from pathlib import Path

import pytest

from app.cli import main
from app.terminal.collect_env import HIDDEN, hidden

HASH = "a" * 64


def test_it_tells_versions_machine_and_what_was_configured_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.toml"
    file.write_text(
        f'[model]\npath = "{tmp_path}/models/x"\n[[class]]\nname = "paying"\napi_keys = ["{HASH}"]\n'
    )
    arguments = ["--config", str(file), "--set", "server.port=9", "--api-key", "hush"]
    assert main(["collect-env", *arguments]) == 0
    out = capsys.readouterr().out
    for told in ("sluice", "Python 3.", "torch", "CPU", "GiB available", 'model.path = "~/models/x"', "server.port = 9",
                 "paying", HIDDEN, "no server answers at http://127.0.0.1:9"):  # fmt: skip
        assert told in out, told
    assert HASH not in out
    assert "hush" not in out
    assert str(tmp_path) not in out


def test_what_may_be_a_secret_is_hidden_however_deep() -> None:
    assert hidden("server.api_key", "x") == HIDDEN
    assert hidden("server.api_key", "") == "", "that there is none may be told"
    assert hidden("engine.max_batch_tokens", 5) == 5
    assert hidden("class", [{"api_keys": ["x"], "name": "y"}]) == [{"api_keys": HIDDEN, "name": "y"}]
    assert hidden("kvstore.remote.url", "redis://me:pass@host/0") == f"redis://{HIDDEN}@host/0"
