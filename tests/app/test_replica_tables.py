"""`[[replica]]` tables: what they may say, and that what they may not say stops the start."""

from pathlib import Path

import pytest

from app.config import Config, ConfigError
from app.config_sources import load
from app.replica_tables import MAX_REPLICAS, ReplicaTable, replicas_of


def read(tmp_path: Path, text: str, *flags: str) -> list[ReplicaTable]:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load(flags, {}, file).config.replicas


def problems(tmp_path: Path, text: str, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *flags)
    return caught.value.problems


def test_tables_are_read_in_order_and_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    tables = read(
        tmp_path,
        """
        [[replica]]
        device = "cuda:1"
        role = "long"
        kv_blocks = 100
        [[replica]]
        limit_tokens = 512
        """,
    )
    assert tables == [
        ReplicaTable(device="cuda:1", role="long", kv_blocks=100, limit_tokens=0),
        ReplicaTable(device="", role="any", kv_blocks=0, limit_tokens=512),
    ]


def test_without_a_table_there_is_one_replica() -> None:
    assert Config().replicas == []
    assert replicas_of([]) == (ReplicaTable(),)
    assert replicas_of([ReplicaTable(role="burst")] * 2) == (ReplicaTable(role="burst"),) * 2


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("rolle = 1", "[[replica]] 1: unknown key rolle; did you mean role?"),
        ('role = "short"', "[[replica]] 1: role"),
        ('device = "gpu"', "[[replica]] 1: device"),
        ('device = "cpu "', "[[replica]] 1: device"),
        ("kv_blocks = -1", "[[replica]] 1: kv_blocks = -1"),
        ("limit_tokens = 1.5", "[[replica]] 1: limit_tokens = 1.5"),
        ("[[replica]]\n" * MAX_REPLICAS, f"at most {MAX_REPLICAS} are taken"),
    ],
)
def test_a_bad_table_is_refused_and_says_why(tmp_path: Path, table: str, reason: str) -> None:
    (problem,) = problems(tmp_path, f"[[replica]]\n{table}\n")
    assert problem.startswith(str(tmp_path / "config.toml"))
    assert reason in problem


def test_every_bad_table_is_told_at_once_beside_other_mistakes(tmp_path: Path) -> None:
    found = problems(tmp_path, '[[replica]]\nrole = "x"\n[[replica]]\nx = 1\n[[replicas]]\n[sever]\n')
    assert len(found) == 4
    assert any("did you mean [[replica]]?" in problem for problem in found)


def test_tables_are_set_in_the_file_only(tmp_path: Path) -> None:
    assert "in the file only" in problems(tmp_path, "", "replica.role=long")[0]
