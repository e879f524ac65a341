"""Folders of the library ``adapters``: the stored weights in its layout give what it computed with them."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertForSequenceClassification

import peftlib
from peftlib.errors import LoadError, UnsupportedError
from tests.golden.test_adapters import backbone, states, stored

# What adapters writes: every field of its configs.
BOTTLENECK = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 4,
    "non_linearity": "gelu",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
    "architecture": None,
}
DOUBLE = BOTTLENECK | {"mh_adapter": True}
SINGLE = BOTTLENECK | {"original_ln_before": True}
PARALLEL = BOTTLENECK | {"is_parallel": True, "scaling": 4.0, "non_linearity": "relu", "init_weights": "mam_adapter"}
PREFIX = {
    "architecture": "prefix_tuning",
    "encoder_prefix": True,
    "cross_prefix": True,
    "leave_out": [],
    "flat": False,
    "prefix_length": 5,
    "bottleneck_size": 16,
    "non_linearity": "tanh",
    "dropout": 0.0,
    "use_gating": False,
    "shared_gating": True,
    "init_weights_seed": None,
}
LORA = {
    "architecture": "lora",
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 4,
    "alpha": 4,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "init_weights": "lora",
    "init_weights_seed": None,
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
}
FUSION = {
    "key": True,
    "query": True,
    "value": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value_before_softmax": True,
    "value_initialized": True,
    "dropout_prob": None,
    "architecture": None,
}


def union(*configs):
    return {"architecture": "union", "configs": list(configs)}


CONFIGS = {
    "sequential": DOUBLE,
    "pfeiffer": SINGLE,
    "parallel": PARALLEL,
    "compacter": DOUBLE | {"phm_layer": True, "phm_rank": 2},
    "mam": union(PREFIX, PARALLEL),
    "unipelt": union(
        PREFIX | {"use_gating": True},
        SINGLE | {"use_gating": True, "non_linearity": "relu"},
        LORA | {"use_gating": True},
    ),
}


def write(folder, config, tensors, name="one", fusion=False, pickled=False, **more):
    """A folder as ``save_adapter`` and ``save_adapter_fusion`` write it."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"config": config, "name": name, "model_type": "bert", "model_class": "BertModel", "hidden_size": 32}
    document |= {"model_name": "golden", "version": "adapters.1.3.1", **more}
    (folder / f"adapter{'_fusion' * fusion}_config.json").write_text(json.dumps(document))
    mine = {n: t.clone() for n, t in tensors.items() if f".{name}." in n and ("fusion" in n) == fusion}
    if pickled:
        torch.save(mine, folder / ("pytorch_model_adapter_fusion.bin" if fusion else "pytorch_adapter.bin"))
    else:
        save_file(mine, folder / f"{'model_' * fusion}adapter{'_fusion' * fusion}.safetensors")
    return folder


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", CONFIGS)
def test_their_folders_give_their_states(case, pickled, tmp_path):
    folder = write(tmp_path / "theirs", CONFIGS[case], stored(case), pickled=pickled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peftlib.from_adapters(backbone(), folder)
    assert [w for w in caught if "average over padding" in str(w.message)] if case == "unipelt" else not caught
    theirs = stored(case)["output"]
    torch.testing.assert_close(states(adapted.model), theirs, atol=1e-6, rtol=0)
    assert not any("LayerNorm" in name for name in adapted.trainable())
    loaded = peftlib.load(backbone(), adapted.save(tmp_path / "ours"))
    torch.testing.assert_close(states(loaded.model), theirs, atol=1e-6, rtol=0)


def test_a_fusion_and_its_adapters(tmp_path):
    tensors = stored("fusion")
    sources = [write(tmp_path / name, SINGLE, tensors, name=name) for name in ("one", "two")]
    folder = write(tmp_path / "fusion", FUSION, tensors, name="one,two", fusion=True)
    adapted = peftlib.from_adapters(backbone(), folder, sources=sources)
    torch.testing.assert_close(states(adapted.model), tensors["output"], atol=1e-6, rtol=0)
    for given in ([], sources[::-1]):
        with pytest.raises(LoadError, match="one"):
            peftlib.from_adapters(backbone(), folder, sources=given)


def test_a_model_with_a_head(tmp_path):
    """Names begin with the base model's, or not; a head of transformers' own is taken, another one is refused."""
    plain = backbone()
    model = BertForSequenceClassification(copy.deepcopy(plain.config)).eval()
    model.bert.load_state_dict(plain.state_dict())
    theirs = stored("sequential")
    for prefix in ("", "bert."):
        folder = write(tmp_path / f"a{prefix}", DOUBLE, {f"{prefix}{n}": t for n, t in theirs.items()})
        head = {"classifier.weight": torch.randn(2, 32), "classifier.bias": torch.randn(2)}
        (folder / "head_config.json").write_text("{}")
        save_file(head, folder / "model_head.safetensors")
        adapted = peftlib.from_adapters(model, folder)
        torch.testing.assert_close(states(model.bert), theirs["output"], atol=1e-6, rtol=0)
        assert torch.equal(model.classifier.weight, head["classifier.weight"])
        assert set(adapted.head_names) == {*head}
        adapted.detach()
    save_file({"heads.one.1.weight": torch.zeros(2, 32)}, folder / "model_head.safetensors")
    with pytest.raises(UnsupportedError, match=r"head_config.json out of the folder"):
        peftlib.from_adapters(model, folder)


@pytest.mark.parametrize(("version", "scale"), [("adapters.1.3.1", 3.0), ("adapters.1.0.1", 1.0)])
def test_lora_and_its_scale_before_version_1_1(version, scale, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors, model = {}, backbone()
    for layer in range(2):
        for name, sizes in (("attention.self.key", (32, 32)), ("intermediate.dense", (64, 32))):
            path = f"encoder.layer.{layer}.{name}"
            A, B = torch.randn(4, sizes[1], generator=generator), torch.randn(sizes[0], 4, generator=generator)
            tensors |= {f"{path}.loras.one.lora_A": A, f"{path}.loras.one.lora_B": B}
            with torch.no_grad():
                model.get_submodule(path).weight.add_(B @ A, alpha=scale)
    config = LORA | {"alpha": 12, "attn_matrices": ["k"], "intermediate_lora": True}
    adapted = peftlib.from_adapters(backbone(), write(tmp_path, config, tensors, version=version))
    torch.testing.assert_close(states(adapted.model), states(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "changes", "error", "match"),
    [
        *(
            ("pfeiffer", {name: value}, UnsupportedError, f"{name}=")
            for name, value in {
                "ln_before": True,
                "ln_after": True,
                "original_ln_after": False,
                "inv_adapter": "nice",
                "leave_out": [0],
                "dropout": 0.1,
                "stochastic_depth": 0.1,
                "use_gating": True,
                "residual_before_ln": "post_add",
                "adapter_residual_before_ln": True,
                "scaling": "learned",
                "cross_adapter": True,
                "of_2030": None,
                "non_linearity": "leakyrelu",
            }.items()
        ),
        ("pfeiffer", {"original_ln_before": False}, UnsupportedError, "a place where none"),
        ("pfeiffer", {"architecture": "reft"}, UnsupportedError, "reft of adapters"),
        ("compacter", {"factorized_phm_rule": True}, UnsupportedError, "factorized_phm_rule=True"),
        ("mam", {"configs": [PREFIX | {"flat": True}, PARALLEL]}, UnsupportedError, "flat=True"),
        ("mam", {"configs": [PREFIX, PREFIX]}, UnsupportedError, "unites prefix_tuning, prefix_tuning"),
        ("sequential", {"mh_adapter": False, "original_ln_before": True}, UnsupportedError, "without a place"),
        ("pfeiffer", {"mh_adapter": True, "original_ln_before": False}, LoadError, "has no encoder.layer.0.attention"),
    ],
)
def test_what_ours_lacks_is_refused_by_name(case, changes, error, match, tmp_path):
    folder = write(tmp_path, CONFIGS[case] | changes, stored(case))
    model = backbone()
    with pytest.raises(error, match=match):
        peftlib.from_adapters(model, folder)
    assert not hasattr(model, "peftlib_adapted")


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_is_executed(tmp_path):
    folder = write(tmp_path, SINGLE, stored("pfeiffer"), pickled=True)
    torch.save({"a": torch.zeros(1), "b": Trap()}, folder / "pytorch_adapter.bin")
    with pytest.raises(LoadError, match="does not hold tensors alone"):
        peftlib.from_adapters(backbone(), folder)
    with pytest.raises(LoadError, match="does not hold tensors alone"):
        peftlib.inspect(folder)


def test_another_backbone(tmp_path):
    folder = write(tmp_path, SINGLE, stored("pfeiffer"), model_type="roberta")
    with pytest.raises(LoadError, match="made for roberta; this model is bert"):
        peftlib.from_adapters(backbone(), folder)
    (folder / "adapter_config.json").write_text(json.dumps({"config": "pfeiffer", "name": "one"}))
    with pytest.raises(LoadError, match="has no config and name"):
        peftlib.from_adapters(backbone(), folder)
