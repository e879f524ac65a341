"""KronA: the formed product, that it is never formed, parity with HF peft's LoKr, the forms beside the FFN."""

import warnings

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import peftlib
from peftlib.conformance.case import batch, train
from peftlib.errors import MergeError, PeftlibError
from peftlib.methods.reparameterized.low_rank.krona import Kronecker
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb


def kronecker(A, B):
    """A kron B, entry by entry."""
    p, q = B.shape
    product = torch.empty(len(A) * p, A.shape[1] * q, dtype=torch.float64)
    for i in range(len(product)):
        for j in range(product.shape[1]):
            product[i, j] = A[i // p, j // q] * B[i % p, j % q]
    return product


def test_equation_on_one_site():
    model = backbone("bert")
    adapted = peftlib.attach(model, "krona", factor=4, scale=1.5, targets="ffn.up")
    perturb(adapted)
    model.double()
    site = adapted.host.anatomy.layers[1].sites["ffn.up"]
    spy = Spy(site.module)
    with torch.no_grad():
        model(**inputs("bert"))
    x, y = spy[site.module]
    A, B = site.module.krona.A.detach(), site.module.krona.B.detach()
    expected = linear(site, x) + 1.5 * x @ kronecker(A, B).T
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("into", "out", "factor"), [(12, 30, 3), (30, 12, 6), (16, 16, 4)])
def test_values_and_gradients_are_those_of_the_formed_product(into, out, factor):
    torch.manual_seed(0)
    update = Kronecker(into, out, factor, scale=0.7)
    torch.nn.init.normal_(update.B)
    x, y = torch.randn(2, 5, into, requires_grad=True), torch.randn(2, 5, out, requires_grad=True)
    direction = torch.randn(2, 5, out)
    wanted = (x, y, update.A, update.B)
    mine = torch.autograd.grad((update(x, y) * direction).sum(), wanted)
    formed = y + 0.7 * x @ torch.kron(update.A, update.B).T
    torch.testing.assert_close(update(x, y), formed, atol=1e-5, rtol=1e-5)
    for a, b in zip(mine, torch.autograd.grad((formed * direction).sum(), wanted)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(update.delta(), 0.7 * torch.kron(update.A, update.B).detach())


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def test_the_product_is_never_formed():
    """Forward and backward of 8 tokens at 512 x 512: nothing larger than the tokens, and a sixteenth of the work."""
    update = Kronecker(512, 512, 16, scale=1.0)
    x, y = torch.randn(8, 512, requires_grad=True), torch.randn(8, 512, requires_grad=True)
    with Largest() as largest, FlopCounterMode(display=False) as flops:
        update(x, y).sum().backward()
    assert largest.size == 8 * 512
    forward = 2 * 8 * (16 * 32 * 32 + 16 * 16 * 32)
    assert flops.get_total_flops() == 3 * forward
    assert forward < 2 * 8 * 512 * 512 / 10


def test_parity_with_hf_pefts_lokr():
    adapted = peftlib.attach(backbone("bert"), "krona", factor=4, scale=1.5, train_head=False, targets="all-linear")
    perturb(adapted)
    modules = ["query", "key", "value", "dense"]
    config = peft.LoKrConfig(r=64, alpha=96, decompose_factor=4, target_modules=modules, exclude_modules=".*pooler.*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(backbone("bert"), config).eval()
    pairs = []
    for site, update in adapted.method.updates.items():
        layer = oracle.get_submodule(f"base_model.model.{site.path}")
        pairs += [(update.A, layer.lokr_w1["default"]), (update.B, layer.lokr_w2["default"])]
    assert len(pairs) == sum(p.requires_grad for p in oracle.parameters())
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    data = inputs("bert")
    ours, reference = adapted.model(**data).logits, oracle(**data).logits
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    ours.square().sum().backward()
    reference.square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4 * float(other.grad.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(("form", "numbers"), [("krona_b", 2 * (16 + 64)), ("krona_b_res", 2 * (16 + 64 + 1))])
def test_beside_the_feed_forward_block(form, numbers, tmp_path):
    model = backbone("bert")
    with torch.no_grad():
        plain = model(**inputs("bert")).logits
    adapted = peftlib.attach(model, "krona", form=form, factor=4, scale=0.5)
    with torch.no_grad():
        assert torch.equal(model(**inputs("bert")).logits, plain)
    assert adapted.count().method == numbers
    assert peftlib.card("krona").trained(L=2, d=32, **vars(adapted.config)) == numbers
    train(adapted, batch("bert"), steps=3)
    layer = adapted.host.anatomy.layers[0]
    up, down = layer.sites["ffn.up"], layer.sites["ffn.down"]
    spy = Spy(up.module, down.module)
    with torch.no_grad():
        before = model(**inputs("bert")).logits
    x, update = spy[up.module][0].double(), down.module.krona
    change = 0.5 * x @ kronecker(update.A.detach(), update.B.detach()).T
    if form == "krona_b_res":
        assert float(update.shortcut.detach()) != 0
        change = change + float(update.shortcut.detach()) * x
    inner, y = spy[down.module]
    torch.testing.assert_close(y.double(), linear(down, inner) + change, atol=1e-5, rtol=1e-5)
    with pytest.raises(MergeError, match=f'form="{form}" has no merge'):
        adapted.merge()
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs("bert")).logits, before)


def test_a_residual_that_starts_at_one():
    model = backbone("bert")
    with torch.no_grad():
        plain = model(**inputs("bert")).logits
        peftlib.attach(model, "krona", form="krona_b_res", factor=4, residual=1.0)
        assert not torch.allclose(model(**inputs("bert")).logits, plain, atol=1e-3)


def test_a_factor_that_does_not_divide_names_those_that_do():
    match = r"factor=5 does not divide bert\S+query \(32 x 32\); choose one of 1, 2, 4, 8, 16, 32"
    with pytest.raises(PeftlibError, match=match):
        peftlib.attach(backbone("bert"), "krona", factor=5)


def test_a_form_that_does_not_exist():
    with pytest.raises(PeftlibError, match="unknown form 'krona_c'"):
        peftlib.config("krona", form="krona_c")


# What is published

NO_CODE = "chosen here: the paper has no public code, and only its abstract and descriptions of it could be had"

FACTS = Facts(
    "krona",
    Default("factor", 32, NO_CODE),
    Default("scale", 1.0, NO_CODE),
    Default("form", "krona", "arXiv:2212.10650, abstract: a Kronecker product in the place of LoRA's low-rank one"),
    Default("targets", ("*attention.query", "*attention.value"), NO_CODE),
    Start("*.krona.A", kaiming_uniform(), NO_CODE),
    Start("*.krona.B", zeros(), NO_CODE),
    Default("residual", 0.0, NO_CODE),
    Trains(("*.krona.A", "*.krona.B"), "arXiv:2212.10650, abstract"),
    Count("roberta-base", 24 * (32 * 32 + 24 * 24), "k k + out in / (k k) a map: 24 maps"),
    Count("t5-base", 72 * (32 * 32 + 24 * 24), "the same: 72 maps"),
    Count("llama-7b", 64 * (32 * 32 + 128 * 128), "the same: 64 maps"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
