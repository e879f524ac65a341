"""Ladder side-tuning: its equation, the graph it does not build, its initialization, encoder-decoder models, caches."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DynamicCache, StaticCache

import peftlib
from peftlib import backbones
from peftlib.errors import StateError, TargetError, UnknownNameError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import backbone, inputs, perturb

FAMILIES = list(backbones.tiny.FAMILIES)
DECODERS = ["gpt2", "opt", "llama", "mistral", "qwen2"]
SEQ2SEQ = ["t5", "mt5", "bart"]


def ladder(embeddings, outputs, first, downs, alphas, blocks, temperature=0.1):
    """Sung et al. 2022: s_0 = first(embeddings); s_l = block_l(g_l s_{l-1} + (1 - g_l) down_l(h_l)), with the layers'
    own functions handed in."""
    s = first(embeddings)
    for h, down, alpha, block in zip(outputs, downs, alphas, blocks):
        g = 1 / (1 + torch.exp(-alpha / temperature))
        s = block(g * s + (1 - g) * down(h))
    return s


def largest(scores, count):
    """Indices of the ``count`` largest scores, in order."""
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return sorted(best)


def prune_attention(q, k, v, o, columns, heads, r):
    """Rows of one attention block that stay, from importances q, k, v, o (lists of rows), and rows of its output.

    In each head the rows whose products q * k * v, summed over the kept columns, are largest; then the output rows by
    their sum over the kept rows.
    """
    size = len(q) // heads
    rows = []
    for head in range(heads):
        part = range(head * size, (head + 1) * size)
        scores = [sum(q[i][c] * k[i][c] * v[i][c] for c in columns) for i in part]
        rows += [head * size + i for i in largest(scores, size // r)]
    output = largest([sum(row[i] for i in rows) for row in o], len(o) // r)
    return rows, output


def prune_ffn(up, down, columns, r):
    """Rows of the first map that stay, and rows of the second."""
    rows = largest([sum(row[c] for c in columns) for row in up], len(up) // r)
    return rows, largest([sum(row[i] for i in rows) for row in down], len(down) // r)


def attach(model, **options):
    return peftlib.attach(model, "ladder_side_tuning", **{"reduction": 4, "init": "magnitude"} | options)


@pytest.mark.parametrize("dropped", [(), (0,)])
@torch.no_grad()
def test_equation_on_bert(dropped):
    plain, model = (backbone("bert", head="masked_lm").double() for _ in range(2))
    adapted, data = attach(model, dropped_layers=dropped), inputs("bert")
    perturb(adapted, std=0.1)
    model.double()
    states = plain(**data, output_hidden_states=True).hidden_states
    mask = data["attention_mask"][:, None, None, :].bool()
    side = model.bert.encoder.ladder_side_tuning
    last = ladder(
        states[0],
        [states[i + 1] for i in side.kept],
        side.first,
        side.downs,
        side.gates,
        [lambda s, b=block: b(s, mask) for block in side.blocks],
    )
    assert last.shape[-1] == 8
    torch.testing.assert_close(model(**data).logits, plain.cls(side.up(last)), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_side_layers_are_slim_and_of_the_backbones_class(family):
    adapted = attach(backbone(family))
    parts = adapted.host.anatomy
    for stack in parts.stacks:
        side = parts.holder(stack).ladder_side_tuning
        layers = [layer for layer in parts.layers if layer.stack == stack]
        for layer, block in zip(layers, side.blocks, strict=True):
            assert type(block) is type(layer.module)
            slim = parts.like(layer, block)
            for name, site in layer.sites.items():
                assert (4 * slim.sites[name].in_features, 4 * slim.sites[name].out_features) == (
                    site.in_features,
                    site.out_features,
                )


# The graph


def _bytes_kept(model, data) -> int:
    """Bytes that autograd keeps of one training forward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**data).loss
    del loss
    return sum(size for size, _ in kept.values())


def test_activation_memory_is_well_below_loras():
    config = BertConfig(
        vocab_size=100,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=1024,
        # With dropout there, the CPU keeps attention maps, which do not get smaller: the heads stay as many.
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModelForSequenceClassification.from_config(config).train()
    data = {"input_ids": torch.arange(64).repeat(8, 1), "labels": torch.tensor([0, 1] * 4)}
    kept = {}
    for name, options in {"lora": {}, "ladder_side_tuning": {"init": "random"}}.items():
        adapted = peftlib.attach(model, name, **options)
        kept[name] = _bytes_kept(model, data)
        adapted.detach()
    assert kept["ladder_side_tuning"] < 0.35 * kept["lora"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_in_the_backbone(family):
    """Also where something makes the embeddings require gradients, as Trainers do for checkpointing."""
    model = backbone(family)
    adapted = attach(model)
    model.enable_input_require_grads()
    seen = []
    for layer in adapted.host.anatomy.layers:
        layer.module.register_forward_hook(
            lambda m, args, output: seen.append(
                any(t.requires_grad for t in (args[0], output[0] if isinstance(output, tuple) else output))
            )
        )
    model.train()
    loss = model(**inputs(family), labels=torch.tensor([0, 1, 0])).loss
    assert len(seen) == adapted.host.anatomy.num_layers
    assert not any(seen)
    assert loss.requires_grad
    assert all(
        not part.ladder_side_tuning.now.calls for part in map(adapted.host.anatomy.holder, adapted.host.anatomy.stacks)
    )


# Initialization


def _expected_rows(model, importance):
    """The rows that every map of a BERT keeps, from the importances of its parameters by name."""
    state = importance["bert.embeddings.word_embeddings.weight"]
    columns = sorted(sorted(range(32), key=lambda i: -float(state[:, i].sum()))[:8])
    found = []
    for index in range(2):

        def of(name, index=index):
            return importance[f"bert.encoder.layer.{index}.{name}.weight"].tolist()

        maps = [of(f"attention.self.{n}") for n in ("query", "key", "value")]
        rows, out = prune_attention(*maps, of("attention.output.dense"), columns, heads=4, r=4)
        inner, down = prune_ffn(of("intermediate.dense"), of("output.dense"), out, r=4)
        found.append((columns, rows, out, inner, down))
        columns = down
    return found


def _check_pruned(model, importance):
    layers, side = model.bert.encoder.layer, model.bert.encoder.ladder_side_tuning
    for layer, slim, (columns, rows, out, inner, down) in zip(layers, side.blocks, _expected_rows(model, importance)):
        for name, kept, cols in (
            ("attention.self.query", rows, columns),
            ("attention.self.key", rows, columns),
            ("attention.self.value", rows, columns),
            ("attention.output.dense", out, rows),
            ("intermediate.dense", inner, out),
            ("output.dense", down, inner),
        ):
            big, small = layer.get_submodule(name), slim.get_submodule(name)
            assert torch.equal(small.weight, big.weight[kept][:, cols]), name
            assert torch.equal(small.bias, big.bias[kept]), name
        for name, kept in (("attention.output.LayerNorm", out), ("output.LayerNorm", down)):
            big, small = layer.get_submodule(name), slim.get_submodule(name)
            assert torch.equal(small.weight, big.weight[kept])
            assert torch.equal(small.bias, big.bias[kept])


def test_magnitude_keeps_the_largest_rows_and_columns():
    model = backbone("bert")
    importance = {n: p.detach().double().abs() for n, p in model.named_parameters()}
    attach(model)
    _check_pruned(model, importance)


def test_fisher_keeps_the_rows_with_the_largest_squared_gradients():
    model, data = backbone("bert"), inputs("bert") | {"labels": torch.tensor([0, 1, 1])}
    plain = copy.deepcopy(model)
    adapted = attach(model, init="fisher", samples=2)
    by_magnitude = copy.deepcopy(model.bert.encoder.ladder_side_tuning.state_dict())
    with pytest.raises(StateError, match="calibrate"), adapted.lifecycle(1):
        pass
    adapted.calibrate([data])
    importance = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in plain.named_parameters()}
    for row in range(2):
        plain.zero_grad()
        plain(**{k: v[row : row + 1] for k, v in data.items()}).loss.backward()
        for name, parameter in plain.named_parameters():
            importance[name] += parameter.grad.double() ** 2
    _check_pruned(model, importance)
    after = model.bert.encoder.ladder_side_tuning.state_dict()
    assert any(not torch.equal(after[n], by_magnitude[n]) for n in after)
    frozen = {n: p for n, p in model.named_parameters() if n not in adapted.trainable()}
    assert all(not p.requires_grad and p.grad is None for p in frozen.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_from_its_own_weights(family):
    """Each entry of a side layer is one of the backbone's; fused, grouped, gated and transposed maps included."""
    adapted = attach(backbone(family))
    parts = adapted.host.anatomy
    for layer in parts.layers:
        slim = parts.like(layer, parts.holder(layer.stack).ladder_side_tuning.blocks[layer.index])
        for name, site in layer.sites.items():
            rows = {tuple(r.tolist()) for r in slim.sites[name].weight.detach()}
            assert len(rows) == slim.sites[name].out_features, "rows are repeated"
            assert torch.isin(slim.sites[name].weight, site.weight).all()
        for kind, norm in layer.norms.items():
            assert torch.isin(slim.norms[kind].weight, norm.weight).all()


def test_random_start_differs():
    pruned, random = attach(backbone("bert")), attach(backbone("bert"), init="random")
    name = "bert.encoder.ladder_side_tuning.blocks.0.intermediate.dense.weight"
    assert not torch.equal(pruned.trainable()[name], random.trainable()[name])


# Encoder and decoder, caches


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_side_decoder_reads_the_side_encoder(family):
    model = backbone(family, head="seq2seq")
    adapted = attach(model)
    data = inputs(family)
    encoded = model.get_encoder()(**{k: data[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    plain = backbone(family, head="seq2seq").get_encoder()(**data).last_hidden_state
    assert encoded.shape[-1] == 32 + 8
    torch.testing.assert_close(encoded[..., :32], plain)
    labels = torch.tensor([[5, 6, 7]] * 3)
    before = model(**data, labels=labels).logits
    encoder = adapted.host.anatomy.holder("encoder").ladder_side_tuning
    with torch.no_grad():
        encoder.gates.add_(0.3)
    assert not torch.allclose(model(**data, labels=labels).logits, before, atol=1e-4)
    with pytest.raises(StateError, match=r"width 32.*32 \+ 8"):
        model(encoder_outputs=(plain,), decoder_input_ids=labels)


@pytest.mark.parametrize("family", DECODERS + SEQ2SEQ)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_cache(family, beams):
    model = backbone(family, head="seq2seq" if family in SEQ2SEQ else "causal_lm")
    perturb(attach(model, dropped_layers=(0,)), std=0.1)
    data = {k: v[:2] for k, v in inputs(family).items() if k != "token_type_ids"}
    if family in DECODERS:
        data = {k: v.flip(-1) for k, v in data.items()}  # padding on the left
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True}
    cached, recomputed = (model.generate(**data, use_cache=u, output_logits=True, **options) for u in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)
    for one, other in zip(cached.logits, recomputed.logits):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_side_layers_share_the_cache():
    model = backbone("llama", head="causal_lm")
    attach(model)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [8, 8, 2, 2]
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(UnsupportedError, match=r"StaticCache.*dynamic"):
        model(torch.tensor([[5, 6, 7]]), past_key_values=static)


# Sizes and options


def test_count():
    adapted = attach(backbones.shapes("roberta-base"), reduction=8)
    layer = 4 * 96 * 97 + 2 * 96 * 384 + 384 + 96 + 4 * 96
    assert adapted.count().method == 12 * (layer + 769 * 96 + 1) + 769 * 96 + 97 * 768
    fewer = attach(backbones.shapes("roberta-base"), reduction=8, dropped_layers=(0, 4, 8))
    assert fewer.count().method == 9 * (layer + 769 * 96 + 1) + 769 * 96 + 97 * 768


def test_t5_base_as_in_the_original():
    adapted = attach(backbones.shapes("t5-base", head="seq2seq"), reduction=8, dropped_layers=(0, 4, 8))
    share = adapted.count().percent
    assert 1.5 < share < 2.0  # the paper: 1.74 % with this setting


def test_bad_sizes_and_options():
    with pytest.raises(TargetError, match=r"reduction 3 does not divide.*choose 2 or 4 or 8"):
        attach(backbone("bert"), reduction=3)
    with pytest.raises(TargetError, match=r"reduction 16.*even for rotary.*choose 2 or 4"):
        attach(backbone("llama"), reduction=16)
    with pytest.warns(UserWarning, match=r"reduction=8 becomes 4"):
        peftlib.attach(backbone("llama"), "ladder_side_tuning")
    with pytest.raises(TargetError, match=r"dropped_layers=\(0, 1\) leaves no layer"):
        attach(backbone("bert"), dropped_layers=(0, 1))
    with pytest.raises(UnknownNameError, match=r"'fish'.*'fisher'"):
        peftlib.config("ladder_side_tuning", init="fish")
    with pytest.raises(ConfigError, match="temperature=0"):
        peftlib.config("ladder_side_tuning", temperature=0)
    model = backbones.load("tiny-bart").model
    model.model.encoder.layerdrop = 0.1
    with pytest.raises(UnsupportedError, match="layerdrop"):
        attach(model)


CODE = "ylsung/Ladder-Side-Tuning, seq2seq"
FACTS = Facts(
    "ladder_side_tuning",
    Default("reduction", 8, f"{CODE}/scripts/ladder_side_tuning_base.sh: r=8"),
    Default("temperature", 0.1, f"{CODE}/training_args.py: gate_T"),
    Default("init", "fisher", f"{CODE}/scripts/ladder_side_tuning_base.sh: fisher-v2"),
    Default("samples", 1024, "arXiv:2206.06522, its settings"),
    Default("dropped_layers", (), "none: the layers that the script leaves out are T5-base's"),
    Start("*.gates", zeros(), f"{CODE}/training_args.py: gate_alpha=0"),
    Start("*.downs.*.weight", kaiming_uniform(), f"{CODE}/third_party/models/t5/modeling_side_t5.py: nn.Linear"),
    Trains(("*.gates", "*.blocks.*", "*.first.*", "*.downs.*", "*.up.*"), f"{CODE}: side layers, projections, gates"),
    Count(
        "t5-base",
        3_878_706,
        "1.74 % in the paper; layers 0, 4 and 8 left out as in scripts/ladder_side_tuning_base.sh",
        {"dropped_layers": (0, 4, 8)},
        "1.74",
    ),
    Count("llama-7b", 172_545_056, "all layers kept; the paper is on T5"),
    Count("roberta-base", 2_376_300, "all layers kept; the paper is on T5"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
