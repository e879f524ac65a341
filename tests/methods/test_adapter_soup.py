"""AdapterSoup: the average, which domains are chosen, what becomes of task heads."""

from dataclasses import replace

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import backbone, inputs, logits
from peftlib.errors import DataError, UnknownNameError
from peftlib.methods.additive.adapters.adapter_soup import nearest
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Trains
from tests.methods.helpers import perturb

DOMAINS = {
    "films": ["The film was great.", "A weak plot and a dull cast.", "This movie bored me.", "An actor's best role."],
    "cooking": ["Boil the rice.", "Add salt to the soup.", "Bake the bread for an hour.", "Chop the onions finely."],
    "football": ["The striker scored.", "A late goal won the match.", "The keeper saved it.", "They lost the final."],
}
NEW = ["What a boring movie.", "The director made a fine film."]


def adapter(seed, method="residual_adapter", **options):
    adapted = peftlib.attach(backbone("bert"), method, seed=seed, **options)
    perturb(adapted, seed=seed)
    return replace(adapted.snapshot(), name=f"domain{seed}")


@pytest.mark.parametrize("method", ["residual_adapter", "sequential_adapter", "parallel_adapter"])
def test_the_soup_is_the_average_of_the_chosen_at_the_cost_of_one(method):
    sources = [adapter(seed, method) for seed in range(3)]
    model = backbone("bert")
    plain = model.state_dict()
    soup = peftlib.attach(model, "adapter_soup", sources=sources, chosen=("domain0", "domain2"))
    one = peftlib.load(backbone("bert"), sources[0])
    assert soup.count().method == one.count().method
    assert [n for n, _ in soup.model.named_modules()] == [n for n, _ in one.model.named_modules()]
    for name, parameter in soup.trainable().items():
        expected = plain[name] if name in soup.head_names else (sources[0].state[name] + sources[2].state[name]) / 2
        torch.testing.assert_close(parameter.detach(), expected)
    copies = [sources[1], replace(sources[1], name="again")]
    same = peftlib.attach(backbone("bert"), "adapter_soup", sources=copies, heads="average")
    alone = peftlib.load(backbone("bert"), sources[1])
    assert torch.equal(logits(same.model, **inputs("bert")), logits(alone.model, **inputs("bert")))


def test_heads_are_the_models_own_or_averaged_and_come_back():
    model = backbone("bert")
    before = {n: p.clone() for n, p in model.named_parameters()}
    sources = [adapter(seed) for seed in range(2)]
    soup = peftlib.attach(model, "adapter_soup", sources=sources, heads="average")
    for name in soup.head_names:
        torch.testing.assert_close(soup.trainable()[name], (sources[0].state[name] + sources[1].state[name]) / 2)
    soup.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    wide = backbones.load("tiny-bert", num_labels=3, dropout=0.0).model
    with pytest.raises(ConfigError, match="'domain0' has no task head like this model's"):
        peftlib.attach(wide, "adapter_soup", sources=sources, heads="average")


def test_a_domain_below_the_least_similarity_is_left_out():
    text = torch.tensor([[1.0, 0.0]])
    domains = {"near": torch.tensor([[1.0, 0.5]]), "far": torch.tensor([[0.1, 1.0]])}
    assert nearest(text, domains) == ("near", "far")
    assert nearest(text, domains, least=0.5) == ("near",)


@pytest.mark.parametrize("by", ["similarity", "clusters"])
def test_the_sentence_encoder_finds_the_related_domain(by):
    vectors = {name: backbones.embed(texts) for name, texts in DOMAINS.items()}
    assert nearest(backbones.embed(NEW), vectors, top=1, by=by) == ("films",)
    assert nearest(backbones.embed(["Fry the eggs with salt."]), vectors, by=by)[0] == "cooking"


def test_domains_share_clusters():
    torch.manual_seed(0)
    places = 20 * torch.eye(3)

    def around(*counts):
        return torch.cat([place + torch.randn(n, 3) for n, place in zip(counts, places)])

    domains = {"a": around(40, 0, 0), "b": around(0, 20, 20), "c": around(0, 0, 40)}
    assert nearest(around(9, 0, 0), domains, by="clusters") == ("a",)
    assert nearest(around(0, 0, 9), domains, by="clusters") == ("c", "b")
    assert nearest(around(0, 0, 9), domains, by="clusters", share=0.5) == ("c",)


def test_an_embedding_does_not_depend_on_the_batch():
    texts = [t for texts in DOMAINS.values() for t in texts]
    whole = backbones.embed(texts)
    torch.testing.assert_close(whole, backbones.embed(texts, batch_size=5), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(texts)))
    with pytest.raises(DataError, match="no text"):
        backbones.embed([])


def test_what_does_not_fit_is_named():
    sources = [adapter(seed) for seed in range(2)]
    with pytest.raises(UnknownNameError, match="source of adapter_soup 'domain7'"):
        peftlib.attach(backbone("bert"), "adapter_soup", sources=sources, chosen=("domain7",))
    with pytest.raises(ConfigError, match="sources of one bottleneck, and 'domain0' has bottleneck=64, 'domain3'"):
        peftlib.attach(backbone("bert"), "adapter_soup", sources=[sources[0], adapter(3, bottleneck=8)])
    with pytest.raises(ConfigError, match="names a source twice"):
        peftlib.config("adapter_soup", chosen=("a", "a"))
    with pytest.raises(UnknownNameError, match="way to choose 'hope'"):
        nearest(torch.ones(1, 2), {"a": torch.ones(1, 2)}, by="hope")


# The published facts


def check_average():
    sources = [adapter(seed) for seed in range(3)]
    adapted = peftlib.attach(backbone("bert"), "adapter_soup", sources=sources)
    for name, parameter in adapted.host.trained().items():
        if name not in adapted.head_names:
            torch.testing.assert_close(parameter, torch.stack([s.state[name] for s in sources]).mean(0))


FACTS = Facts(
    "adapter_soup",
    Default("chosen", (), "section 2.2: which ones, nearest() says"),
    Default("heads", "keep", "chosen here; the paper's domains have no heads"),
    Holds("the soup is the average with equal weights", check_average, "section 2.2"),
    Trains(("*.residual_adapter.*",), "section 2.1: the adapter of Bapna and Firat"),
    Count("roberta-base", 12 * (2 * 768 * 64 + 64 + 768 + 2 * 768), "an adapter and its norm a layer"),
    Count("t5-base", 24 * (2 * 768 * 64 + 64 + 768 + 2 * 768), "an adapter and its norm a layer"),
    Count("llama-7b", 32 * (2 * 4096 * 64 + 64 + 4096 + 2 * 4096), "an adapter and its norm a layer"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
