"""CODA: the soft top-k, layers that see only the chosen tokens, what that saves, and the conversion phase."""

import copy
import math

import pytest
import torch

import peftlib
from peftlib import anatomy, backbones, conversion, sources
from peftlib.efficiency.speed import count_flops
from peftlib.errors import DataError, LoadError, UnknownNameError, UnsupportedError
from peftlib.methods.additive.adapters.coda.layer import Temperature, soft_top_k
from peftlib.methods.additive.adapters.parallel_adapter import Parallel
from peftlib.methods.base import ConfigError
from peftlib.training import objectives
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, zeros
from tests.methods.helpers import backbone, inputs, perturb

ENCODERS = ("bert", "roberta", "electra", "distilbert", "t5", "bart")


def attached(family, head="classification", std=0.3, **options):
    adapted = peftlib.attach(backbone(family, head), "coda", bottleneck=4, **options)
    perturb(adapted, std)
    return adapted


def encoder_layers(model):
    return [layer for layer in anatomy.of(model).layers if layer.stack == "encoder"]


def logits(model, data):
    with torch.no_grad():
        return model.eval()(**data).logits


def states(model, data):
    """Input and output of each encoder layer, as the rest of the model sees them."""
    seen = []
    inside, handles = [], []
    for layer in encoder_layers(model):
        before, after = layer.module.register_forward_pre_hook, layer.module.register_forward_hook
        handles.append(before(lambda m, args: inside.append(args[0]), prepend=True))
        handles.append(after(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)))
    logits(model, data)
    for handle in handles:
        handle.remove()
    return list(zip(inside, seen))


# The equations, one row at a time, without gathering anything back


def optimum(scores, k, epsilon):
    """The weights w in [0, 1] with sum k that maximize <s, w> + epsilon H(w), by bisection: w = min(1, exp((s + a) /
    epsilon)) for the one a with which the sum is right."""
    low, high = -1e3, 1e3
    for _ in range(200):
        a = (low + high) / 2
        weights = [min(1.0, math.exp(min(0.0, (s + a) / epsilon))) for s in scores]
        low, high = (a, high) if sum(weights) < k else (low, a)
    return weights


def coordinate_ascent(scores, k, epsilons):
    """The paper's steps for a list of scores, with an epsilon for each."""
    b = [0.0] * len(scores)
    for epsilon in epsilons:
        a = epsilon * math.log(k) - epsilon * math.log(sum(math.exp((s + x) / epsilon) for s, x in zip(scores, b)))
        b = [min(-s - a, 0.0) for s in scores]
    return [math.exp((s + a + x) / epsilons[-1]) for s, x in zip(scores, b)]


def falling(last, steps=20, first=4.0, decay=0.7):
    """The epsilons of the steps."""
    return [max(last, first * decay**step) for step in range(steps)]


def conditional_layer(h, h_bar, w, adapter, layer, reduction, epsilons, keep_first):
    """h + adapter(h_bar) + lambda (Layer(h_S) - h_S) for one row h (n, d), and S. ``layer(S)`` gives the frozen layer's
    output (k, d) for the chosen positions, ``adapter`` is a function of the normed states."""
    n = len(h)
    k = math.ceil(n / reduction)
    scores = [float(state @ w) for state in h_bar]
    if k == n:
        weights = [1.0] * n
    elif not keep_first:
        weights = coordinate_ascent(scores, k, epsilons)
    else:
        weights = [1.0, *(coordinate_ascent(scores[1:], k - 1, epsilons) if k > 1 else [0.0] * (n - 1))]
        scores[0] = math.inf
    chosen = sorted(sorted(range(n), key=lambda i: -scores[i])[:k])
    y = h + adapter(h_bar)
    for i, out in zip(chosen, layer(chosen)):
        y[i] = y[i] + weights[i] * (out - h[i])
    return y, chosen


# The soft top-k


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_soft_top_k_approaches_the_optimum(epsilon):
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    real = torch.ones_like(scores, dtype=torch.bool)
    k = torch.tensor([[1.0], [3], [5], [8], [11]]).double()
    weights = soft_top_k(scores, k, real, Temperature(epsilon, epsilon, steps=3000))
    for row, count, found in zip(scores.tolist(), k.flatten().tolist(), weights):
        expected = torch.tensor(optimum(row, count, epsilon)).double()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_soft_top_k_is_the_papers_steps_and_ignores_padding():
    generator = torch.Generator().manual_seed(1)
    scores, lengths, k = torch.randn(3, 9, generator=generator).double(), (9, 6, 4), (3, 2, 4)
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    weights = soft_top_k(scores, torch.tensor(k)[:, None].double(), real, Temperature(0.5))
    for row, (length, count) in enumerate(zip(lengths, k)):
        expected = coordinate_ascent(scores[row, :length].tolist(), count, falling(0.5))
        if count == length:
            expected = [1.0] * length
        torch.testing.assert_close(weights[row, :length], torch.tensor(expected).double())
        assert not weights[row, length:].any()


def test_soft_top_k_has_gradients_and_a_small_epsilon_is_hard():
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.4]], requires_grad=True)
    real = torch.ones_like(scores, dtype=torch.bool)
    soft = soft_top_k(scores, torch.tensor([[2.0]]), real, Temperature(1.0))
    soft[0, 1].backward()
    assert scores.grad[0, 1] > 0
    assert scores.grad[0, 2] < 0
    hard = soft_top_k(scores.detach(), torch.tensor([[2.0]]), real, Temperature(0.02, steps=200))
    torch.testing.assert_close(hard, torch.tensor([[1.0, 1, 0, 0, 0]]), atol=1e-3, rtol=0)


# The layer


@pytest.mark.parametrize("attention", ["k-to-k", "k-to-all"])
@pytest.mark.parametrize(("family", "keep_first"), [(f, None) for f in ENCODERS] + [("bert", False), ("t5", True)])
def test_a_layer_is_the_frozen_one_on_the_chosen_tokens_alone(family, keep_first, attention):
    adapted = attached(family, attention=attention, reduction=2.5, train_norms=False, keep_first=keep_first)
    keep_first = family not in ("t5", "bart") if keep_first is None else keep_first
    adapted.model.double()
    data, parts = inputs(family, 3), adapted.host.anatomy
    plain = anatomy.of(backbone(family).double())
    for place, (x, y) in enumerate(states(adapted.model, data)):
        layer, frozen = parts.layers[place], plain.layers[place].module.eval()
        child = layer.module.coda
        for row, mask in enumerate(data["attention_mask"]):
            real = mask.nonzero().flatten().tolist()
            own = x[row, real]
            n = len(real)
            options = {"attention_mask": None} if family == "bart" else {}
            bias = plain.layers[0].attention.compute_bias(n, n) if family == "t5" else None

            def run(chosen, own=own, frozen=frozen, options=options, bias=bias):
                if attention == "k-to-k":
                    given = own[chosen][None]
                    extra = {} if bias is None else {"position_bias": bias[:, :, chosen][..., chosen]}
                else:
                    given, extra = own[None], {} if bias is None else {"position_bias": bias}
                out = frozen(given, **options, **extra)
                out = (out[0] if isinstance(out, tuple) else out)[0]
                return out if attention == "k-to-k" else out[chosen]

            with torch.no_grad():
                normed = own if not layer.pre_norm else plain.layers[place].norms["attention"](own)
                expected, chosen = conditional_layer(
                    own, normed, child.router, child.adapter.delta, run, 2.5, falling(1.0), keep_first
                )
            assert not keep_first or chosen[0] == 0
            assert 0 < len(chosen) < n
            torch.testing.assert_close(y[row, real], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_all_tokens_and_gates_of_one_are_a_parallel_adapter(family):
    adapted = attached(family, reduction=1, train_norms=False, train_head=False)
    data = inputs(family)
    before = logits(adapted.model, data)
    model = backbone(family)
    for layer, mine in zip(anatomy.of(model).layers, adapted.host.anatomy.layers):
        parallel = Parallel(adapted.host.anatomy.d, 4)
        parallel.load_state_dict(mine.module.coda.adapter.state_dict())

        def beside(module, args, output, parallel=parallel, layer=layer):
            h = args[0] if not layer.pre_norm else layer.norms["attention"](args[0])
            if isinstance(output, tuple):
                return (parallel(h, output[0]), *output[1:])
            return parallel(h, output)

        layer.module.register_forward_hook(beside)
    torch.testing.assert_close(logits(model, data), before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, logits(backbone(family), data), atol=1e-2)


def test_padding_is_never_chosen_before_a_real_token():
    adapted = attached("bert", reduction=1.2)
    child = adapted.host.anatomy.layers[0].module.coda
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 10, adapted.host.anatomy.d, generator=generator)
    lengths = torch.randint(1, 11, (50, 1), generator=generator)
    real = torch.arange(10) < lengths
    # Padding that the router likes best.
    states[~real] = 10 * child.router.detach()
    for mask in (real[:, None, None], torch.zeros(50, 1, 10, 10).masked_fill(~real[:, None, None], -3e38)):
        mask = mask if mask.dtype == torch.bool else mask.clamp(min=torch.finfo(mask.dtype).min)
        mask = mask if mask.dtype == torch.bool else torch.where(mask < 0, torch.finfo(mask.dtype).min, 0.0)
        chosen = child.choose(states, mask)
        assert (chosen.valid.sum(-1, keepdim=True) == (lengths.double() / 1.2).ceil()).all()
        assert real.gather(1, chosen.index)[chosen.valid].all()
        assert not chosen.gate[~chosen.valid].any()


@pytest.mark.parametrize("attention", ["k-to-k", "k-to-all"])
def test_only_k_tokens_enter_the_layer_and_flops_fall_with_them(attention):
    n, r, rows = 48, 4, 2
    data = {"input_ids": torch.randint(5, 20, (rows, n)), "attention_mask": torch.ones(rows, n, dtype=torch.long)}
    for reduction in (1.0, 2.0, 4.0):
        adapted = peftlib.attach(backbone("bert"), "coda", bottleneck=r, reduction=reduction, attention=attention)
        d, f = adapted.host.anatomy.d, adapted.host.anatomy.f
        k = math.ceil(n / reduction)
        shapes = []
        for layer in adapted.host.anatomy.layers:
            for site in ("attention.query", "ffn.up"):
                module = layer.sites[site].module
                module.register_forward_hook(lambda m, args, out, shapes=shapes: shapes.append(args[0].shape[1]))
        layers = adapted.host.anatomy.holder("encoder")
        hidden = torch.randn(rows, n, d)
        found = count_flops(lambda layers=layers, hidden=hidden: layers(hidden))
        assert set(shapes) == {k}
        keys = n if attention == "k-to-all" else k
        linear = 2 * (2 * d * d + 2 * d * f) * k + 2 * (2 * d * d) * keys
        products = 2 * 2 * k * keys * d
        adapter = 2 * 2 * d * r * n
        router = 0 if k == n else 2 * d * n
        assert found == rows * len(adapted.host.anatomy.layers) * (linear + products + adapter + router)
        assert logits(adapted.model, data).isfinite().all()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_of_two_stacks_have_the_adapter_alone(family):
    adapted = attached(family, "seq2seq")
    routers = [n for n in adapted.trainable() if n.endswith("router")]
    adapters = {n.partition(".coda.")[0] for n in adapted.trainable() if ".coda.adapter." in n}
    assert len(routers) == 2
    assert all("encoder" in n for n in routers)
    assert len(adapters) == 4


def test_the_router_learns_which_token_matters():
    """One token of each text carries the label and stands anywhere: its score rises above the others'."""
    torch.manual_seed(0)
    adapted = peftlib.attach(backbone("bert"), "coda", reduction=4, bottleneck=4, keep_first=False)
    child = adapted.host.anatomy.layers[0].module.coda
    d = adapted.host.anatomy.d
    mark = torch.randn(d)
    optimizer = torch.optim.Adam([child.router], lr=0.05)

    def gate(states, places):
        chosen = child.choose(states, None)
        return (chosen.gate * (chosen.index == places)).sum(-1)

    for _ in range(60):
        states, places = torch.randn(32, 12, d), torch.randint(12, (32, 1))
        states = states.scatter(1, places[..., None].expand(-1, -1, d), mark.expand(32, 1, d))
        loss = -gate(states, places).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gate(states, places).min() > 0.9


# Conversion


@pytest.mark.parametrize(("family", "head"), [("bert", "masked_lm"), ("t5", "seq2seq")])
def test_a_task_starts_from_what_the_conversion_phase_gave(family, head, tmp_path):
    lm = attached(family, head, std=0.1)
    task = peftlib.attach(backbone(family), "coda", bottleneck=4, reduction=2)
    start = {n: p.detach().clone() for n, p in task.trainable().items()}
    task.method.start_from(peftlib.read(lm.save(tmp_path / "converted")))
    for theirs, mine in zip(lm.host.anatomy.layers, task.host.anatomy.layers):
        state = mine.module.coda.state_dict()
        assert state.keys() == theirs.module.coda.state_dict().keys()
        assert all(torch.equal(t, state[n]) for n, t in theirs.module.coda.state_dict().items())
        for kind, norm in theirs.norms.items():
            assert torch.equal(norm.weight, mine.norms[kind].weight)
    assert all(torch.equal(task.trainable()[n], start[n]) for n in task.head_names)


TEXTS = ["a dull film with a weak plot", "the cast was great", "so good", "it was the boring one and so was the end"]


def converted(name, tmp_path, monkeypatch, steps=4, **options):
    monkeypatch.setattr(sources, "cache_root", lambda: tmp_path)
    return peftlib.convert(name, "coda", TEXTS, steps=steps, batch_size=2, **({"bottleneck": 4} | options))


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta"])
def test_a_backbone_is_converted_once_and_a_task_starts_from_it(name, tmp_path, monkeypatch):
    first = converted(name, tmp_path, monkeypatch)
    facts = first.notes["conversion"]
    assert facts["objective"] == "states" and facts["steps"] == 4
    (folder,) = (tmp_path / "conversions").iterdir()
    monkeypatch.setattr(conversion, "_train", None)  # what is in the cache is not made again
    again = converted(name, tmp_path, monkeypatch)
    assert again.name == first.name and folder.name == f"coda-{first.name}"
    assert all(torch.equal(t, again.state[n]) for n, t in first.state.items())
    task = peftlib.attach(backbones.load(name, head="classification").model, "coda", bottleneck=4)
    head = {n: task.trainable()[n].detach().clone() for n in task.head_names}
    task.start_from(again)
    mine = {n.partition(".")[2]: p for n, p in task.trainable().items() if n not in head}
    assert mine.keys() == again.state.keys()
    assert all(torch.equal(p, again.state[n]) for n, p in mine.items())
    assert all(torch.equal(p, task.trainable()[n]) for n, p in head.items())
    assert task.snapshot().notes["conversion"] == facts


def test_a_conversion_is_repeatable_and_is_another_with_other_settings(tmp_path, monkeypatch):
    one, two = converted("tiny-bert", tmp_path / "a", monkeypatch), converted("tiny-bert", tmp_path / "b", monkeypatch)
    assert all(torch.equal(t, two.state[n]) for n, t in one.state.items())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    other = converted("tiny-bert", tmp_path / "a", monkeypatch, reduction=2)
    assert other.name != one.name and converted("tiny-bert", tmp_path / "a", monkeypatch, steps=5).name != one.name
    assert torch.equal(torch.get_rng_state(), state)


def test_a_converted_backbone_is_nearer_to_itself(tmp_path, monkeypatch):
    """The states that the routed network gives come nearer to the backbone's."""
    start, end = (converted("tiny-bert", tmp_path, monkeypatch, steps=steps, learning_rate=1e-2) for steps in (1, 60))

    def distance(adapter):
        loaded = backbones.load("tiny-bert", head="base", dropout=0.0)
        goal = objectives.States(loaded.model, loaded.tokenizer)
        peftlib.attach(loaded.model, "coda", bottleneck=4).start_from(adapter)
        with torch.no_grad():
            return float(goal.loss([loaded.tokenizer(t)["input_ids"] for t in TEXTS]))

    assert distance(end) < 0.8 * distance(start)


def test_a_backbone_with_its_head_goes_on_with_its_own_objective(tmp_path, monkeypatch):
    bert = backbones.load("tiny-bert", head="masked_lm")
    before = {n: p.clone() for n, p in bert.model.named_parameters()}
    found = converted(bert, tmp_path, monkeypatch)
    assert found.notes["conversion"]["objective"] == "masked"
    assert all(torch.equal(p, before[n]) for n, p in bert.model.named_parameters())
    task = peftlib.attach(backbone("bert"), "coda", bottleneck=4)
    task.start_from(found)
    t5 = backbones.load("tiny-t5", head="seq2seq")
    with pytest.raises(UnsupportedError, match="no <extra_id_0>"):
        converted(t5, tmp_path, monkeypatch)
    t5.tokenizer.add_tokens([f"<extra_id_{i}>" for i in range(4)])
    t5.model.resize_token_embeddings(len(t5.tokenizer))
    assert converted(t5, tmp_path, monkeypatch).notes["conversion"]["objective"] == "spans"


def test_what_cannot_be_converted_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="lora has no phase before the task"):
        peftlib.convert("tiny-bert", "lora", TEXTS)
    with pytest.raises(DataError, match="no text"):
        peftlib.convert("tiny-bert", "coda", [])
    with pytest.raises(UnknownNameError, match="'spam'"):
        converted("tiny-bert", tmp_path, monkeypatch, objective="spam")
    with pytest.raises(ConfigError, match="needs a backbone with head='seq2seq'"):
        converted(backbones.load("tiny-bert", head="base"), tmp_path, monkeypatch, objective="spans")
    with pytest.raises(ConfigError, match="lora has no phase before the task, so there is nothing"):
        peftlib.attach(backbone("bert"), "lora").start_from(converted("tiny-bert", tmp_path, monkeypatch))
    with pytest.raises(LoadError, match="roberta"):
        peftlib.attach(backbone("roberta"), "coda").start_from(converted("tiny-bert", tmp_path, monkeypatch))


def test_a_start_that_does_not_fit_is_refused():
    lm = attached("bert", "masked_lm")
    before = lm.snapshot()
    task = peftlib.attach(backbone("bert"), "coda", bottleneck=5)
    start = copy.deepcopy(task.state())
    with pytest.raises(LoadError, match=r"router|adapter|weight.*same bottleneck"):
        task.method.start_from(before)
    assert all(torch.equal(t, start[n]) for n, t in task.state().items())
    other = peftlib.attach(backbone("bert"), "bitfit")
    with pytest.raises(ConfigError, match=r"adapter of bitfit; start from one of coda"):
        task.method.start_from(other.snapshot())


def test_count():
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "coda")
    assert adapted.count().method == 12 * (768 + 2 * 768 * 64 + 64 + 768 + 4 * 768)
    plain = peftlib.attach(backbones.shapes("roberta-base"), "coda", train_norms=False)
    assert adapted.count().method - plain.count().method == 12 * 4 * 768


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_decoders_are_refused(family):
    with pytest.raises(UnsupportedError, match=r"coda chooses.*later ones.*use an encoder"):
        peftlib.attach(backbone(family), "coda")


def test_bad_options():
    for option, value in (("reduction", 0.5), ("epsilon", 0), ("iterations", 0), ("bottleneck", 0)):
        with pytest.raises(ConfigError, match=f"{option}={value}"):
            peftlib.config("coda", **{option: value})
    with pytest.raises(UnknownNameError, match=r"'k-to-n'.*Known: k-to-k, k-to-all"):
        peftlib.config("coda", attention="k-to-n")


# The published facts

THIRD = "re-implementations; no code of the authors is known"

FACTS = Facts(
    "coda",
    Default("reduction", 3.0, "table 1: MNLI at 3.2 times the speed"),
    Default("iterations", 20, f"appendix C, as in {THIRD}"),
    Default("epsilon", 1.0, f"chosen here; 0.02 to 1 in {THIRD}"),
    Default("attention", "k-to-all", "chosen here"),
    Default("bottleneck", 64, "chosen here"),
    Default("activation", "relu", "chosen here"),
    Default("train_norms", True, "from memory of section 4, not confirmed"),
    Start("*.coda.router", normal(lambda fan_in: fan_in**-0.5), "chosen here: scores of unit variance"),
    Start("*.coda.adapter.down.weight", kaiming_uniform(), "chosen here"),
    Start("*.coda.adapter.up.*", zeros(), "chosen here"),
    Start("*.coda.adapter.down.bias", zeros(), "chosen here"),
    Trains(("*.coda.router", "*.coda.adapter.*", "*LayerNorm*"), "section 3: router, adapter, norms"),
    Count("roberta-base", 12 * (768 + 2 * 768 * 64 + 64 + 768 + 4 * 768), "chosen here: r = 64"),
    # Adapters in both stacks, routers in the encoder, norms without bias: two a layer there, three in the decoder.
    Count("t5-base", 24 * (2 * 768 * 64 + 64 + 768) + 12 * 768 + 12 * 5 * 768, "chosen here: r = 64"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
