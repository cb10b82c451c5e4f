"""The command line: friendly errors with exit code 2, and nothing heavy imported for small commands."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from app import cli
from app.cli import main
from app.listening import CannotListen, bind

REPOSITORY = Path(__file__).parents[2]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
SAY_MUCH = [["check-config", "--json"], ["check-config"], ["--help"]]


def test_check_config_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--set", "server.port=9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["server.port"] == {"value": 9, "source": "--set"}
    assert main(["check-config"]) == 0
    assert "engine.max_batch_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_bad_configuration_is_exit_code_2_and_a_line_a_problem(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--set", "server.prot=9", "--set", "engine.block_size=5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 3
    assert "did you mean server.port?" in error


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_bad_key_file_is_told_beside_other_mistakes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[[key]]\nname = "a"\nsha256 = "sk-1"\nrole = "king"\n')
    assert main([command, "--set", f"server.keys_file={keys}", "--set", "server.prot=9"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 4
    assert "sha256 is no hash" in error
    assert "role" in error


def test_check_config_shows_where_keys_come_from_but_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "a"\nsha256 = "{"ab" * 32}"\n')
    assert main(["check-config", "--set", f"server.keys_file={keys}", "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["server.keys_file"] == {"value": str(keys), "source": "--set"}
    assert "abab" not in shown


def test_a_port_that_is_taken_is_one_line_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--set", f"server.port={port}", "--set", "model.path=/nowhere"]) == 2
    error = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1 is taken" in error
    assert error.count("\n") == 1


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(CannotListen, match=r"server\.host|cannot listen"):
        bind("256.0.0.1", 0)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check-config", "--json"]])
def test_small_commands_do_not_import_torch_or_the_server(arguments: list[str]) -> None:
    program = (
        "import sys; from app.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'aiohttp', 'tokenizers'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("command", ["serve", "chat", "cache stat", "bench serve"])
def test_an_argument_that_a_command_does_not_know_is_told_with_its_own_usage(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--wrong"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"usage: sluice {command} ")
    assert error.endswith(f"sluice {command}: error: unrecognized arguments: --wrong\n")


def test_ctrl_c_is_a_line_and_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "check-config", interrupted)
    assert main(["check-config"]) == 130
    assert capsys.readouterr().err == "sluice: interrupted\n"


def told(arguments: list[str], out: int | IO[bytes]) -> tuple[int, str]:
    """Exit code and standard error of a process of its own."""
    command = [sys.executable, "-m", "app", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=BUFFERED, stdout=out, stderr=subprocess.PIPE, check=False
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("arguments", SAY_MUCH)
def test_who_reads_no_further_ends_a_command_without_a_word(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert told(arguments, writing) == (1, "")
    finally:
        os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("arguments", SAY_MUCH)
def test_output_that_finds_no_room_is_a_line_and_exit_code_1(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        code, error = told(arguments, full)
    assert (code, error.count("\n")) == (1, 1)
    assert "No space left on device" in error


def test_a_command_without_a_standard_output_says_it_to_nobody() -> None:
    closed = f"'{sys.executable}' -m app check-config --json >&-"
    done = subprocess.run(closed, shell=True, cwd=REPOSITORY, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
