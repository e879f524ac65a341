"""The benchmark: the floor, the contestants, the table; LoRA's price beside the floor."""

import pytest
import torch

import peftlib
from peftlib import cli
from peftlib.efficiency import bench
from peftlib.experiments import read_costs
from peftlib.methods.registry import stand_ins
from tests.methods.helpers import backbone, inputs

OPTIONS = {"backbone": "tiny-bert", "batch_size": 2, "length": 8, "turns": 1, "device": "cpu"}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_floor_carries_gradients_to_the_embeddings_and_to_no_weight():
    model = bench._floor(backbone("bert"))
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs("bert")).logits.sum().backward()
    assert seen[0].grad_fn is None
    assert seen[0].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "prompt_tuning", "prefix_tuning"])
def test_hf_peft_stands_beside_ours_with_the_same_trained_parameters(name):
    adapted = peftlib.attach(backbone("bert"), name)
    theirs = bench._peft(lambda: backbone("bert"), adapted)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == adapted.count().trained


def test_a_row_and_its_table(one_thread):
    rows = [
        bench.row(name, peftlib.config(name), backbone="tiny-bert", batch_size=2, length=8, turns=2, device="cpu")
        for name in ("lora", "bitfit")
    ]
    lora, bitfit = rows
    assert lora.peft is not None
    assert bitfit.peft is None
    for step in (lora.ours, lora.floor, lora.peft, bitfit.ours):
        assert step.seconds > 0
        assert step.ratio > 0
    assert lora.floor.ratio == 1
    # LoRA keeps rank numbers a token and site, and the inputs of its layers. The floor has gradients to the embeddings,
    # so it keeps the input of the norm above them, with a mean and a deviation a token.
    tokens, hidden, layers, rank = 2 * 8, 32, 2, 8
    more = layers * (2 * rank + hidden) - (hidden + 2)
    assert lora.ours.kept - lora.floor.kept == 4 * tokens * more
    assert [next(iter(column.cells)) for column in bench.table(rows).columns][:2] == ["lora", f"{lora.trained:,}"]


def test_every_method_is_a_case():
    assert {method.method for _, method in bench.cases()} == set(peftlib.methods())


def test_the_chosen_methods_are_measured(one_thread):
    assert [row.name for row in bench.compare(["lora"], **OPTIONS)] == ["lora", "lora, all linear"]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", [name for name in peftlib.methods() if stand_ins(name)])
def test_a_method_that_builds_on_others_is_measured_on_fresh_ones(name):
    row = bench.row(name, peftlib.config(name), **OPTIONS)
    assert row.trained > 0
    assert row.ours.seconds > 0


def test_an_interrupted_command_keeps_what_it_measured(monkeypatch, tmp_path, one_thread):
    measure = bench.row

    def first_only(name, method, **options):
        if name != "lora":
            raise KeyboardInterrupt
        return measure(name, method, **(options | OPTIONS))

    monkeypatch.setattr(bench, "row", first_only)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "lora", "--store", "--backbone", "tiny-bert", "--results", str(tmp_path)])
    assert list(read_costs("step", "tiny-bert", tmp_path)) == ["lora"]


def test_command_prints_the_chosen_methods(capsys, one_thread):
    assert cli.main(["bench", "lora", "--backbone", "tiny-bert"]) == 0
    printed = capsys.readouterr().out
    assert "lora" in printed
    assert "ladder" not in printed
