"""Stored measurements: what was measured, where, and nothing lost."""

import dataclasses

import pytest

from peftlib import cli
from peftlib.efficiency.memory import Memory
from peftlib.errors import DataError
from peftlib.experiments import read_costs, write_costs

ROW = Memory("lora", trained=10, calibration=0, training=300, gradients=40, optimizer=80, device="cpu")


def test_measurements_come_back_with_where_they_were_made(tmp_path):
    assert read_costs("memory", "tiny-bert", tmp_path) == {}
    path = write_costs("memory", "tiny-bert", [ROW], tmp_path)
    assert path == tmp_path / "costs/memory-tiny-bert.json"
    found = read_costs("memory", "tiny-bert", tmp_path)["lora"]
    assert found.pop("provenance")["versions"]["torch"]
    assert found == dataclasses.asdict(ROW)


def test_other_methods_stay_and_the_same_one_is_replaced(tmp_path):
    write_costs("memory", "tiny-bert", [ROW, dataclasses.replace(ROW, name="full")], tmp_path)
    write_costs("memory", "tiny-bert", [dataclasses.replace(ROW, training=200)], tmp_path)
    found = read_costs("memory", "tiny-bert", tmp_path)
    assert {name: row["training"] for name, row in found.items()} == {"full": 300, "lora": 200}


def test_a_damaged_file_is_named(tmp_path):
    path = write_costs("memory", "tiny-bert", [ROW], tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="memory-tiny-bert"):
        read_costs("memory", "tiny-bert", tmp_path)


def test_the_command_stores_on_request(tmp_path, capsys):
    call = ["bench", "lora", "--memory", "--backbone", "tiny-bert", "--results", str(tmp_path)]
    assert cli.main(call) == 0
    assert read_costs("memory", "tiny-bert", tmp_path) == {}
    assert cli.main([*call, "--store"]) == 0
    assert read_costs("memory", "tiny-bert", tmp_path)["lora"]["trained"] > 0
