"""Adapters of HF peft into peftlib and back: equal logits on the same backbone, and what is refused."""

import dataclasses
import itertools
import json
import warnings

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn

import peftlib
from peftlib import cli
from peftlib.conformance.case import logits
from peftlib.errors import LoadError, StateError, UnsupportedError
from peftlib.interchange import hf_peft as interchange
from peftlib.methods.bases.hf_peft.format import EVERY, MAPS
from tests.methods.helpers import backbone, inputs, perturb

CLASSIFY, CAUSAL, SEQ2SEQ = ("classification", "SEQ_CLS"), ("causal_lm", "CAUSAL_LM"), ("seq2seq", "SEQ_2_SEQ_LM")
PLACES = [("bert", *CLASSIFY), ("t5", *SEQ2SEQ), ("t5", *CLASSIFY), ("llama", *CAUSAL), ("llama", *CLASSIFY)]
EVERYWHERE = {
    "bert": ["query", "attention.output.dense", "intermediate.dense"],
    "t5": ["q", "v", "wi"],
    "llama": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
FAMILIES = [PLACES[0], PLACES[1], PLACES[3], ("gpt2", *CAUSAL)]
CASES = [
    *((*place, "lora", {}) for place in PLACES),
    *(
        (family, head, task, "lora", {"target_modules": EVERYWHERE[family], "use_rslora": True, "r": 3})
        for family, head, task in (PLACES[0], PLACES[1], PLACES[3], ("gpt2", *CAUSAL))
    ),
    (*PLACES[0], "lora", {"target_modules": "all-linear", "exclude_modules": r".*(key|pooler|classifier).*"}),
    (*PLACES[3], "lora", {"layers_to_transform": [1], "layers_pattern": "layers", "fan_in_fan_out": True}),
    (*PLACES[0], "ia3", {"target_modules": ["key"], "feedforward_modules": []}),
    *((*place, "ia3", {}) for place in (*PLACES, ("gpt2", *CAUSAL))),
    *((*place, "prompt", {"num_transformer_submodules": 1}) for place in (PLACES[0], PLACES[1], PLACES[3], PLACES[4])),
    *((*place, "prefix", {}) for place in (PLACES[0], PLACES[3], PLACES[4], ("gpt2", *CAUSAL))),
    *(("t5", *SEQ2SEQ, kind, {}) for kind in ("prompt", "p_tuning")),  # with rows for the decoder that it never reads
    ("llama", *CAUSAL, "prefix", {"prefix_projection": True, "encoder_hidden_size": 9}),
    ("t5", *SEQ2SEQ, "prefix", {}),
    ("mt5", *SEQ2SEQ, "prefix", {"prefix_projection": True, "encoder_hidden_size": 9}),
    *(
        (family, head, task, kind, {"target_modules": EVERYWHERE[family], **options})
        for family, head, task in FAMILIES
        for kind, options in (
            ("lora", {"rank_pattern": {"layers?.1.*": 3}, "alpha_pattern": {"query|q_proj|c_attn|q": 3}, "r": 4}),
            ("lora", {"init_lora_weights": "olora", "r": 4}),
            ("adalora", {"init_r": 6, "target_r": 3, "total_step": 10, "tinit": 1, "tfinal": 2}),
            *((("lokr", {"r": 64, "decompose_factor": 4}),) if family != "gpt2" else ()),
        )
        if (family, options.get("init_lora_weights")) != ("gpt2", "olora")  # which HF peft runs on square maps alone
    ),
    ("gpt2", *CAUSAL, "lora", {"target_modules": r".*attn\.c_proj", "init_lora_weights": "olora", "r": 4}),
    (*PLACES[0], "lora", {"init_lora_weights": "olora", "use_dora": True, "use_rslora": True, "r": 4}),
    *(
        (family, head, task, kind, {"num_transformer_submodules": 1, **options})
        for family, head, task in FAMILIES
        for kind, options in (
            ("p_tuning", {}),
            ("mpt", {"num_tasks": 3, "num_ranks": 2}),
        )
    ),
]
ALL = {"targets": "all-linear"}
CONFIGS = {
    "lora": peft.LoraConfig,
    "ia3": peft.IA3Config,
    "prompt": peft.PromptTuningConfig,
    "prefix": peft.PrefixTuningConfig,
    "adalora": peft.AdaLoraConfig,
    "lokr": peft.LoKrConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "mpt": peft.MultitaskPromptTuningConfig,
}
PROMPTS = ("prompt", "prefix", "p_tuning", "mpt")


def _model(family: str, head: str) -> nn.Module:
    model = backbone(family, head)
    # HF peft asks for a method of the model that transformers 5 no longer has, for its own generate().
    model._prepare_encoder_decoder_kwargs_for_generation = None
    return model


def _batch(family: str, head: str, kind: str = "") -> dict:
    # Beside a prompt, HF peft's decoders classify by the last position, be it padding.
    batch = inputs(family, 1 if (family, head, kind) == ("llama", "classification", "prompt") else 3)
    if head == "seq2seq":
        batch["decoder_input_ids"] = batch["input_ids"]
    if kind == "mpt" and head == "seq2seq":  # HF peft makes its decoder's inputs from labels alone
        batch["labels"] = batch.pop("decoder_input_ids")
    if kind == "mpt":
        batch["task_ids"] = torch.tensor([0, 2, 1])
    return batch


def _theirs(family, head, task, kind, folder, **options):
    """A saved HF peft adapter with all trained parameters moved, and its logits."""
    more = {"num_virtual_tokens": 5} if kind in PROMPTS else {}
    more |= {"encoder_hidden_size": 8} if kind == "p_tuning" else {}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(_model(family, head), CONFIGS[kind](task_type=task, **(more | options))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    return logits(model, **_batch(family, head, kind))


def _reload(family, head, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(_model(family, head), folder).eval()


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """HF peft's causal prompts leave their own positions in front."""
    theirs = theirs[:, -ours.shape[1] :] if theirs.dim() == 3 else theirs
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize(("family", "head", "task", "kind", "options"), CASES)
def test_theirs_into_ours_and_back(family, head, task, kind, options, tmp_path):
    expected = _theirs(family, head, task, kind, tmp_path / "theirs", **options)
    adapted = peftlib.from_hf_peft(_model(family, head), tmp_path / "theirs")
    batch = _batch(family, head, kind)
    got = logits(adapted.model, **batch)
    _same(got, expected)
    assert not torch.allclose(got, logits(_model(family, head), **batch), atol=1e-2)

    loaded = peftlib.load(_model(family, head), adapted.save(tmp_path / "ours"))
    assert torch.equal(logits(loaded.model, **batch), got)

    peftlib.to_hf_peft(loaded, tmp_path / "back")
    _same(got, logits(_reload(family, head, tmp_path / "back"), **batch))


@pytest.mark.parametrize(
    ("family", "head", "method", "options"),
    [
        *(
            (family, head, method, options)
            for family, head, _ in FAMILIES
            for method, options in (
                ("lora", {"rank": 4, "rank_pattern": {"ffn.*": 2}, "alpha_pattern": {"*attention.query": 5.0}} | ALL),
                ("lora", {"rank": 4, "targets": ("*attention.query", "*attention.value", "*attention.output")}),
                ("lora_fa", {"rank": 3}),
                ("adalora", {"rank": 4, "target_rank": 2}),
                ("p_tuning", {"after": 0, "length": 5}),
                ("mpt", {"tasks": 3, "length": 5, "rank": 2}),
                *((("krona", {"factor": 4, "scale": 1.5}),) if family != "gpt2" else ()),
            )
        ),
        ("bert", "classification", "lora", {"targets": ("attention.*", "ffn.down"), "alpha": 3.0, "dropout": 0.1}),
        ("t5", "seq2seq", "lora", {"targets": "all-linear", "rank": 3, "rank_stabilized": True}),
        ("llama", "causal_lm", "lora", {"targets": "all-linear"}),
        ("gpt2", "causal_lm", "lora", {"targets": ("attention.value", "ffn.up"), "rank": 3}),
        ("gpt2", "causal_lm", "lora", {"targets": ("*attention.query", "*attention.value", "ffn.up"), "rank": 3}),
        ("gpt2", "causal_lm", "lora", {"targets": "all-linear", "rank": 3, "rank_stabilized": True}),
        ("bert", "classification", "ia3", {}),
        ("t5", "seq2seq", "ia3", {}),
        ("llama", "causal_lm", "ia3", {"outputs": ("attention.key", "ffn.gate")}),
        ("gpt2", "causal_lm", "ia3", {}),
        ("distilbert", "classification", "lora", {}),
        ("bert", "classification", "prompt_tuning", {}),
        ("t5", "seq2seq", "prompt_tuning", {}),
        ("llama", "causal_lm", "prompt_tuning", {}),
        ("bert", "classification", "prefix_tuning", {"reparametrize": True}),
        ("llama", "causal_lm", "prefix_tuning", {"reparametrize": False}),
        ("t5", "seq2seq", "prefix_tuning", {"attentions": ("decoder",), "relative_bias": True}),
    ],
)
def test_ours_into_theirs(family, head, method, options, tmp_path):
    adapted = peftlib.attach(_model(family, head), method, **options)
    perturb(adapted, std=0.1)
    if method == "adalora":
        _prune(adapted)
    batch = _batch(family, head, method)
    before = logits(adapted.model, **batch)
    folder = peftlib.to_hf_peft(adapted, tmp_path / "theirs")
    theirs = _reload(family, head, folder)
    _same(before, logits(theirs, **batch))
    stored = sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
    places = 2 if (family, method) == ("t5", "prefix_tuning") else 1  # half of the places are those it never reads
    if (
        family != "gpt2" and method != "adalora"
    ):  # a fused map's factors are written beside each other, with zeros between
        assert stored == places * adapted.count().stored
    theirs.save_pretrained(tmp_path / "again")
    for written in (folder, tmp_path / "again"):
        read = peftlib.from_hf_peft(_model(family, head), written)
        _same(logits(read.model, **batch), before)
    # Parts that were not adapted are not adapted afterwards; AdaLoRA's dropped triplets of a fused map are masked.
    if (family, method) != ("gpt2", "adalora"):
        assert read.count().stored == adapted.count().stored


@torch.no_grad()
def _prune(adapted) -> None:
    """Drop 0, 1 or 2 triplets of each map, in turn."""
    for i, update in enumerate(adapted.method.updates.values()):
        update.kept[: i % 3] = False
        update.singular.masked_fill_(~update.kept, 0)


# Every setting that HF peft knows


FORMATS = sorted(interchange.formats())


@pytest.mark.parametrize("method", FORMATS)
def test_every_setting_of_hf_peft_has_a_place(method):
    """A setting that a later version of HF peft has, or has no longer, must be given a place or lose it here."""
    format = interchange.formats()[method]
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[format.kind])}
    assert known <= format.settings()
    assert format.settings() - known <= {*MAPS, "enable_lora", "merge_weights"}  # which others or first versions have
    for one, other in itertools.combinations((format.used, format.unused, format.refused), 2):
        assert not set(one) & set(other)
    assert not set(EVERY) & {*format.used, *format.unused, *format.refused}


@pytest.mark.parametrize("method", FORMATS)
def test_defaults_are_those_of_hf_peft(method):
    format = interchange.formats()[method]
    fields = {field.name: field for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[format.kind])}
    for name, default in format.used.items():
        theirs = fields[name]
        assert default == (
            theirs.default if theirs.default_factory is dataclasses.MISSING else theirs.default_factory()
        )


VALUES = {
    "bias": "all",
    "trainable_token_indices": [0, 3],
    "layer_replication": [[0, 1], [0, 2]],
    "module_dropout": 0.1,
}


@pytest.mark.parametrize("method", FORMATS)
def test_what_is_refused_is_named_and_what_is_off_is_not(method):
    format = interchange.formats()[method]
    for name in format.refused:
        value = VALUES.get(name, {"a": 1} if name.endswith("config") else True)
        with pytest.raises(UnsupportedError, match=f"with {name}="):
            format.settled({"peft_type": format.kind, name: value}, "folder")
        for off in (None, False, "none", [], {}, 0):
            format.settled({"peft_type": format.kind, name: off}, "folder")
    for value in (None, False, 1):
        with pytest.raises(UnsupportedError, match=r"with of_2030=.*which peftlib does not know"):
            format.settled({"peft_type": format.kind, "of_2030": value}, "folder")


def test_whole_modules_must_be_in_the_model(tmp_path):
    """``modules_to_save`` outside of the task head: refused with the way out, and right once it was gone."""
    options = {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}
    expected = _theirs("bert", *CLASSIFY, "lora", tmp_path, **options)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model = backbone("bert")
    pooler = {n.removeprefix("base_model.model."): t for n, t in tensors.items() if "pooler" in n}
    model.load_state_dict(pooler, strict=False)
    adapted = peftlib.from_hf_peft(model, tmp_path)
    _same(logits(adapted.model, **inputs("bert")), expected)
    adapted.detach()
    save_file({n: t for n, t in tensors.items() if "classifier" not in n}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"modules_to_save 'classifier' and holds no tensor of it"):
        peftlib.from_hf_peft(model, tmp_path)


def test_adaloras_triplets_that_were_pruned(tmp_path):
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=3, total_step=10, target_modules=["c_attn", "c_fc"]
    )
    model = peft.get_peft_model(_model("gpt2", "causal_lm"), config).eval()
    generator, pattern = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            if "lora_E" in name:
                kept = torch.arange(6) % (2 + len(pattern) % 2) == 0
                parameter.mul_(kept[:, None])
                pattern[name.removeprefix("base_model.model.")] = kept.tolist()
    model.peft_config["default"].rank_pattern = pattern
    expected = logits(model, **inputs("gpt2"))
    model.save_pretrained(tmp_path)
    adapted = peftlib.from_hf_peft(_model("gpt2", "causal_lm"), tmp_path)
    _same(logits(adapted.model, **inputs("gpt2")), expected)
    assert set(adapted.method.ranks().values()) == {2, 3}


def test_names_are_short_where_they_say_it_all(tmp_path):
    _theirs("bert", *CLASSIFY, "lora", tmp_path / "theirs")
    adapted = peftlib.from_hf_peft(backbone("bert"), tmp_path / "theirs")
    assert adapted.config == peftlib.config("lora", rank=8, alpha=8.0, targets=("attention.query", "attention.value"))
    folder = peftlib.to_hf_peft(adapted, tmp_path / "ours")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["query", "value"]
    assert settings["modules_to_save"] == ["classifier"]


def test_one_layer_alone_is_taken_by_its_path(tmp_path):
    expected = _theirs("llama", *CAUSAL, "lora", tmp_path / "theirs", layers_to_transform=[1])
    adapted = peftlib.from_hf_peft(backbone("llama", "causal_lm"), tmp_path / "theirs")
    assert adapted.config.targets == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    _same(logits(adapted.model, **inputs("llama")), expected)


def test_an_imported_adapter_trains_on(tmp_path):
    _theirs("bert", *CLASSIFY, "lora", tmp_path / "theirs")
    adapted = peftlib.from_hf_peft(backbone("bert"), tmp_path / "theirs")
    assert set(adapted.head_names) == {"classifier.weight", "classifier.bias"}
    adapted.model(**inputs("bert"), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in adapted.trainable().values())


def _change(folder, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"peft_type": "LOHA"}, UnsupportedError, "LOHA.*IA3.*LORA"),
        ({"use_qalora": True}, UnsupportedError, "use_qalora"),
        ({"bias": "lora_only"}, UnsupportedError, "bias='lora_only'"),
        *(
            ({"init_lora_weights": start}, UnsupportedError, f"init_lora_weights='{start}'.*weight_conversion")
            for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "mica", "of a later version")
        ),
        ({"r": 4}, LoadError, "says rank 4 for .*query"),
        *(
            ({name: "much"}, LoadError, "a setting of a wrong type|says rank much")
            for name in ("rank_pattern", "lora_alpha", "lora_dropout", "r")
        ),
        ({"lora_alpha": None}, LoadError, "a setting of a wrong type"),
        ({"alpha_pattern": {"(": 3}}, LoadError, "a setting of a wrong type"),
        ({"use_dora": True, "init_lora_weights": "olora"}, LoadError, "has no .*lora_magnitude_vector"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, UnsupportedError, "pissa|use_dora"),
    ],
)
def test_settings_that_ours_lacks_are_refused(settings, error, match, tmp_path):
    _theirs("bert", *CLASSIFY, "lora", tmp_path)
    _change(tmp_path, **settings)
    model = backbone("bert")
    with pytest.raises(error, match=match):
        peftlib.from_hf_peft(model, tmp_path)
    peftlib.attach(model, "lora")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["dense"]}, "pooler.dense, which peftlib does not adapt"),
        (
            {"rank_pattern": {"layer.0.attention.self.query": 2}, "use_dora": True},
            r"ranks \[2, 8\].*lora alone has more than one",
        ),
        ({"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}, "pooler.dense"),
    ],
)
def test_tensors_without_a_place_are_refused(options, match, tmp_path):
    _theirs("bert", *CLASSIFY, "lora", tmp_path, **options)
    with pytest.raises(UnsupportedError, match=match):
        peftlib.from_hf_peft(backbone("bert"), tmp_path)


def test_prompts_and_prefixes_for_a_decoder_are_refused(tmp_path):
    _theirs("t5", *SEQ2SEQ, "mpt", tmp_path / "mpt", num_transformer_submodules=1, num_tasks=3)
    _change(tmp_path / "mpt", num_transformer_submodules=2, num_virtual_tokens=2)
    with pytest.raises(LoadError, match="num_virtual_tokens=2 and holds 5 rows"):
        peftlib.from_hf_peft(backbone("t5", "seq2seq"), tmp_path / "mpt")
    _change(tmp_path / "mpt", num_virtual_tokens=None)
    with pytest.raises(UnsupportedError, match="num_transformer_submodules=2"):
        peftlib.from_hf_peft(backbone("t5", "seq2seq"), tmp_path / "mpt")
    _theirs("bart", *SEQ2SEQ, "prefix", tmp_path / "bart")
    with pytest.raises(UnsupportedError, match="shift the positions of BartForConditionalGeneration's decoder"):
        peftlib.from_hf_peft(backbone("bart", "seq2seq"), tmp_path / "bart")
    _theirs("t5", *SEQ2SEQ, "prefix", tmp_path / "prefix")
    with pytest.raises(UnsupportedError, match="T5ForSequenceClassification takes none"):
        peftlib.from_hf_peft(backbone("t5"), tmp_path / "prefix")
    settings = json.loads((tmp_path / "prefix" / "adapter_config.json").read_text())
    (tmp_path / "prefix" / "adapter_config.json").write_text(json.dumps(settings | {"num_transformer_submodules": 1}))
    with pytest.raises(UnsupportedError, match="num_transformer_submodules=1, with which HF peft itself does not run"):
        peftlib.from_hf_peft(backbone("t5", "seq2seq"), tmp_path / "prefix")


def test_another_backbone_is_refused(tmp_path):
    _theirs("bert", *CLASSIFY, "lora", tmp_path / "lora")
    with pytest.raises(LoadError, match="RobertaForSequenceClassification does not have"):
        peftlib.from_hf_peft(backbone("roberta"), tmp_path / "lora")
    _theirs("bert", *CLASSIFY, "prefix", tmp_path / "prefix")
    model = backbone("llama")
    with pytest.raises((LoadError, UnsupportedError)):
        peftlib.from_hf_peft(model, tmp_path / "prefix")
    peftlib.attach(model, "lora")


def test_damaged_folders(tmp_path):
    with pytest.raises(LoadError, match=r"has no adapter_config\.json"):
        peftlib.from_hf_peft(backbone("bert"), tmp_path)
    _theirs("bert", *CLASSIFY, "lora", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    cut = {n: t[:, :16] if "query.lora_A" in n else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in cut.items()}, weights)
    model = backbone("bert")
    with pytest.raises(LoadError, match=r"lora_A has shape \(8, 16\) in the file, \(8, 32\) here"):
        peftlib.from_hf_peft(model, tmp_path)
    assert not hasattr(model, "peftlib_adapted")
    save_file({n: t for n, t in tensors.items() if "0.attention.self.query.lora_B" not in n}, weights)
    with pytest.raises(LoadError, match=r"has no bert\.encoder\.layer\.0\.attention\.self\.query\.lora_B"):
        peftlib.from_hf_peft(model, tmp_path)
    weights.write_bytes(b"nothing")
    with pytest.raises(LoadError, match="not a readable safetensors"):
        peftlib.from_hf_peft(model, tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(LoadError, match="pickled"):
        peftlib.from_hf_peft(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    (tmp_path / "adapter_model.bin").rename(weights)
    with pytest.raises(LoadError, match="not a JSON object"):
        peftlib.from_hf_peft(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "head", "method", "options", "match"),
    [
        ("bert", "classification", "bitfit", {}, "bitfit has no counterpart"),
        ("bert", "classification", "prompt_tuning", {"position": "after_first"}, "after_first"),
        ("bert", "masked_lm", "prompt_tuning", {}, "BertForMaskedLM"),
        ("gpt2", "causal_lm", "prefix_tuning", {"shift_positions": False}, "shift_positions"),
        ("t5", "seq2seq", "prefix_tuning", {}, r"Attach prefix_tuning with attentions=\('decoder',\)"),
        ("t5", "seq2seq", "prefix_tuning", {"attentions": ("decoder",)}, "relative_bias=False cannot be written"),
        ("bart", "seq2seq", "prefix_tuning", {"attentions": ("decoder",)}, "shift the positions of BartFor"),
        ("gpt2", "causal_lm", "ia3", {"outputs": ("attention.value",), "inputs": ("attention.query",)}, "has both"),
    ],
)
def test_what_theirs_lacks_is_refused(family, head, method, options, match, tmp_path):
    adapted = peftlib.attach(backbone(family, head), method, **options)
    with pytest.raises(UnsupportedError, match=match):
        peftlib.to_hf_peft(adapted, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_trains_beside_an_adapter_is_not_left_out(tmp_path):
    adapted = peftlib.attach(backbone("llama", "causal_lm"), "lora")
    adapted.model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"embed_tokens.* beside lora"):
        peftlib.to_hf_peft(adapted, tmp_path / "a")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StateError, match="other files"):
        peftlib.to_hf_peft(peftlib.attach(backbone("bert"), "lora"), tmp_path)


def test_the_command(tmp_path, capsys):
    expected = _theirs("bert", *CLASSIFY, "lora", tmp_path / "theirs")
    more = ["--format", "hf-peft", "--backbone", "tiny-bert"]
    assert cli.main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), *more]) == 0
    _same(logits(peftlib.load(backbone("bert"), tmp_path / "ours").model, **inputs("bert")), expected)
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), *more]) == 0
    _same(expected, logits(_reload("bert", "classification", tmp_path / "back"), **inputs("bert")))
    assert cli.main(["import", str(tmp_path / "ours"), str(tmp_path / "x"), *more]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
