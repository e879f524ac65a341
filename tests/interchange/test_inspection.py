"""``peftlib inspect``: what folders of three libraries hold, what is odd in them, and that nothing of them runs."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftlib
from peftlib import cli
from peftlib.errors import LoadError
from tests.golden.test_adapters import stored
from tests.interchange.test_adapters import SINGLE, Trap, write
from tests.methods.helpers import backbone, perturb


@pytest.fixture
def ours(tmp_path):
    adapted = peftlib.attach(backbone("llama", "causal_lm"), "lora", rank=3)
    perturb(adapted)
    return adapted, adapted.save(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], rank_pattern={"query": 2})
    model = peft.get_peft_model(backbone("bert"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("default.bias"):
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def norm(tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def test_one_of_ours(ours):
    adapted, folder = ours
    found = peftlib.inspect(folder)
    assert (found.library, found.method, found.rank, found.head) == ("peftlib", "lora", (3,), "causal_lm")
    assert found.base.startswith("LlamaForCausalLM")
    count = adapted.count()
    assert (found.parameters, found.bytes, found.dtypes) == (
        count.stored,
        count.stored_bytes,
        {"float32": count.stored},
    )
    assert [part.name for part in found.parts] == ["model.layers.0", "model.layers.1"]
    state = adapted.state()
    for part in found.parts:
        mine = [t for n, t in state.items() if n.startswith(f"{part.name}.")]
        assert part.parameters == sum(t.numel() for t in mine)
        assert part.norm == pytest.approx(norm(mine))
        assert part.largest == pytest.approx(max(float(t.abs().max()) for t in mine))
    assert not found.odd


def test_one_of_hf_pefts(theirs):
    found = peftlib.inspect(theirs)
    assert (found.library, found.method, found.rank, found.head) == ("HF peft", "lora (LORA)", (2, 8), "classification")
    assert found.options["rank_pattern"] == {"query": 2}
    assert [part.name for part in found.parts] == ["bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"]
    tensors = load_file(theirs / "adapter_model.safetensors")
    assert found.parts[0].norm == pytest.approx(norm(t for n, t in tensors.items() if "layer.0." in n))
    assert not found.odd


def test_one_of_adapters(tmp_path):
    found = peftlib.inspect(write(tmp_path, SINGLE, stored("pfeiffer")))
    assert (found.library, found.method, found.rank, found.head) == ("adapters", "pfeiffer", (8,), "base")
    assert (found.base, len(found.parts), found.odd) == ("BertModel golden", 2, ())


def test_what_is_odd(theirs, ours):
    path = theirs / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second, third, fourth, fifth, *_ = (name for name in tensors if "lora" in name)
    tensors[first][0, 0] = math.nan
    tensors[second][0, 0] = -math.inf
    tensors[third].zero_()
    tensors[fourth][0, 0] = 1e4
    tensors[fifth] = torch.empty(0, 4)
    save_file(tensors, path)
    (theirs / "modeling.py").write_text("raise SystemExit('executed')")
    settings = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(settings | {"of_2030": 1}))
    odd = peftlib.inspect(theirs).odd
    for text, name in (
        ("with NaN", first),
        ("with infinite", second),
        ("all zero", third),
        ("above 1000", fourth),
        ("without any number", fifth),
        ("from_hf_peft() refuses it", "of_2030=1"),
        ("was not opened", "modeling.py"),
    ):
        assert [line for line in odd if text in line and name in line], (text, odd)
    _, folder = ours
    tensors = load_file(folder / "adapter.safetensors")
    name = next(n for n in tensors if n.endswith("1.self_attn.q_proj.lora.A"))
    save_file(tensors | {name: tensors[name] * 2e3}, folder / "adapter.safetensors")
    odd = peftlib.inspect(folder).odd
    assert any("peftlib.load() refuses it" in line and "SHA-256" in line for line in odd)
    assert any("1000 times the norm" in line and name in line for line in odd)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "holds no adapter"),
        ({"adapter_config.json": "["}, "not a JSON object"),
        ({"adapter_config.json": "[" * 100_000}, "not a JSON object"),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, "has no adapter_model.safetensors"),
        ({"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": "x"}, "not a readable"),
        ({"config.json": "{}", "adapter.safetensors": "x"}, "not a readable"),
        ({"adapter_config.json": '{"config": 3}'}, "has no config and name"),
    ],
)
def test_folders_that_cannot_be_read(files, match, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LoadError, match=match):
        peftlib.inspect(tmp_path)


def test_a_pickled_file_of_hf_peft(theirs):
    tensors = load_file(theirs / "adapter_model.safetensors")
    (theirs / "adapter_model.safetensors").unlink()
    torch.save(tensors, theirs / "adapter_model.bin")
    assert peftlib.inspect(theirs).parameters == sum(t.numel() for t in tensors.values())
    torch.save(tensors | {"x": Trap()}, theirs / "adapter_model.bin")
    with pytest.raises(LoadError, match="does not hold tensors alone"):
        peftlib.inspect(theirs)


def test_the_command(ours, theirs, capsys):
    _, folder = ours
    assert cli.main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "lora in " in text
    assert "model.layers.1" in text
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "lora"
    # What a file says is neither markup nor a command for the terminal.
    settings = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "[red]\x1b[2J[/x]"}))
    assert cli.main(["inspect", str(theirs)]) == 0
    text = capsys.readouterr().out
    assert "[red]\N{REPLACEMENT CHARACTER}[2J[/x]" in text
    assert cli.main(["inspect", str(folder / "nowhere")]) == 2
    assert "holds no adapter" in capsys.readouterr().err


@pytest.mark.parametrize(("head", "task"), [("causal_lm", "CAUSAL_LM"), ("classification", "SEQ_CLS")])
def test_export_and_import_take_the_head_from_the_files(head, task, tmp_path):
    model = peftlib.backbones.load("tiny-llama", head=head).model
    folder = peftlib.attach(model, "lora", rank=2).save(tmp_path / "ours")
    more = ["--backbone", "tiny-llama"]
    assert cli.main(["export", str(folder), str(tmp_path / "hf"), *more]) == 0
    assert json.loads((tmp_path / "hf" / "adapter_config.json").read_text())["task_type"] == task
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "back"), *more]) == 0
    assert peftlib.inspect(tmp_path / "back").head == head
    settings = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    (tmp_path / "hf" / "adapter_config.json").write_text(json.dumps(settings | {"task_type": None}))
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "none"), *more]) == 2
