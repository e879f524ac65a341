"""(IA)³: its equations on BERT, parity with HF peft, the survey's count, its exact merge."""

import warnings

import peft
import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import TargetError
from tests.methods.facts import Count, Default, Facts, Start, Trains, ones
from tests.methods.helpers import Spy, backbone, inputs, perturb

# What HF peft adapts by default (bert, t5, llama), or what does the same as the paper.
PEFT_TARGETS = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bart": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}
AS_PEFT = {"bert": ("attention.output", "ffn.down"), "roberta": ("attention.output", "ffn.down")}


def attention(Q, K, V, l_k, l_v):
    """Liu et al. 2022: softmax(Q (l_k * K)^T / sqrt(p)) (l_v * V) of one head; Q, K, V (n, p), vectors (p)."""
    scores = [[sum(a * (s * b) for a, s, b in zip(q, l_k, k)) / len(k) ** 0.5 for k in K] for q in Q]
    weights = torch.softmax(torch.stack([torch.stack(row) for row in scores]), dim=-1)
    values = torch.stack([torch.stack([s * a for s, a in zip(l_v, v)]) for v in V])
    return torch.stack([sum(w * value for w, value in zip(row, values)) for row in weights])


def feed_forward(x, W_1, b_1, W_2, b_2, l_f, act):
    """W_2 (l_f * act(W_1 x + b_1)) + b_2 of one token x (d)."""
    inner = torch.stack([s * act(sum(w * v for w, v in zip(row, x)) + b) for row, b, s in zip(W_1, b_1, l_f)])
    return torch.stack([sum(w * v for w, v in zip(row, inner)) + b for row, b in zip(W_2, b_2)])


@torch.no_grad()
def test_equations_on_one_layer_of_bert():
    model = backbone("bert")
    adapted = peftlib.attach(model, "ia3")
    perturb(adapted)
    model.double()
    layer = adapted.host.anatomy.layers[1]
    s = layer.sites
    key, value, down = (s[n].module for n in ("attention.key", "attention.value", "ffn.down"))
    output, up = s["attention.output"].module, s["ffn.up"].module
    spy = Spy(key, output, up, down)
    model(**{k: v[:1] for k, v in inputs("bert").items()})
    n = int(inputs("bert")["attention_mask"][0].sum())
    x = spy[key][0][0, :n]
    q, k, v = (x @ s[f"attention.{m}"].weight.T + s[f"attention.{m}"].bias for m in ("query", "key", "value"))
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        expected = attention(q[:, part], k[:, part], v[:, part], key.ia3.scale[part], value.ia3.scale[part])
        torch.testing.assert_close(spy[output][0][0, :n, part], expected, atol=1e-12, rtol=1e-10)
    token = spy[up][0][0, 2]
    gelu = torch.nn.functional.gelu
    expected = feed_forward(token, up.weight, up.bias, down.weight, down.bias, down.ia3.scale, gelu)
    torch.testing.assert_close(spy[down][1][0, 2], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", list(PEFT_TARGETS))
def test_parity_with_hf_peft(family):
    data = inputs(family)
    adapted = peftlib.attach(backbone(family), "ia3", inputs=AS_PEFT.get(family, ("ffn.down",)))
    perturb(adapted)
    targets, feedforward = PEFT_TARGETS[family]
    config = peft.IA3Config(
        task_type="SEQ_CLS",
        target_modules=targets,
        feedforward_modules=feedforward,
        # The name of this head is not among those that HF peft trains by itself.
        modules_to_save=["classification_head"] if family in ("t5", "bart") else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(backbone(family), config).eval()
    theirs = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in theirs.values()) == adapted.count().trained
    ours = adapted.trainable()
    with torch.no_grad():
        for name, parameter in ours.items():
            their_name = name.replace("ia3.scale", "ia3_l.default")
            if name in adapted.head_names:
                owner, _, last = name.partition(".")
                their_name = f"{owner}.modules_to_save.default.{last}"
            found = theirs.pop(f"base_model.model.{their_name}")
            found.copy_(parameter.reshape(found.shape))
    assert not theirs
    with torch.no_grad():
        mine, other = adapted.model(**data).logits, oracle(**data).logits
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine, backbone(family)(**data).logits, atol=1e-3)


def test_count_of_the_surveys_table():
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "ia3", inputs=("attention.output", "ffn.down"))
    assert adapted.count().trained == 656_642
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "ia3")
    assert adapted.count().method == 12 * (2 * 768 + 3072)


def test_vectors_of_grouped_keys_are_as_wide_as_the_keys():
    adapted = peftlib.attach(backbones.shapes("mistral-7b", head="causal_lm"), "ia3")
    assert adapted.count().trained == 32 * (2 * 1024 + 14336)


def test_decoder_layers_with_cross_attention_have_five_vectors():
    adapted = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "ia3")
    assert adapted.count().trained == 12 * (2 * 768 + 3072) + 12 * (4 * 768 + 3072)


@pytest.mark.parametrize("family", list(backbones.tiny.FAMILIES))
def test_merge_is_exact(family):
    data = inputs(family)
    model = backbone(family).double()
    adapted = peftlib.attach(model, "ia3", outputs=("*attention.key", "*attention.value", "ffn.up"))
    perturb(adapted)
    before = model(**data).logits
    merged = adapted.merge()
    torch.testing.assert_close(merged(**data).logits, before, atol=1e-12, rtol=1e-10)


def test_a_target_that_matches_nothing():
    with pytest.raises(TargetError, match=r"'attention\.keys'.*attention\.key"):
        peftlib.attach(backbone("bert"), "ia3", outputs=("attention.keys",))


# The published facts

T_FEW = "r-three/t-few, configs/ia3.json"

FACTS = Facts(
    "ia3",
    Default("outputs", ("*attention.key", "*attention.value"), f"{T_FEW}: k, v of both attentions"),
    Default("inputs", ("ffn.down",), f"{T_FEW}: the output of wi_1, which multiplies the input of wo alike"),
    Start("*.ia3.scale", ones(), "r-three/t-few, src/models/lora.py: multi_lora_b"),
    Trains(("*.key.ia3.scale", "*.value.ia3.scale", "*.output.dense.ia3.scale"), "section 3.3"),
    # Section 3.3: L_enc (d_k + d_v + d_ff) + L_dec (2 d_k + 2 d_v + d_ff).
    Count("t5-base", 12 * (2 * 768 + 3072) + 12 * (4 * 768 + 3072), "section 3.3"),
    Count("roberta-base", 12 * (2 * 768 + 3072), "section 3.3"),
    Count("llama-7b", 32 * (2 * 4096 + 11_008), "section 3.3"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
