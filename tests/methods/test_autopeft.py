"""AutoPEFT: which modules stand in which layers for a structure, the space of structures, and the best of a set."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import peftlib
from peftlib import backbones, taxonomy
from peftlib.errors import MergeError, TargetError
from peftlib.methods.base import ConfigError
from peftlib.methods.hybrid.automatic.autopeft.search import AutoPEFTSearch, Space, hypervolume, pareto
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, zeros
from tests.methods.helpers import backbone, inputs, perturb

MODULES = {"serial": "sequential_adapter", "parallel": "parallel_adapter", "length": "prefix"}


@pytest.mark.parametrize(
    "sizes", [{"serial": 5, "parallel": 0, "length": 0}, {"serial": 0, "parallel": 7, "length": 3}, {"serial": 5}]
)
@pytest.mark.parametrize("layers", [(1, 0), (0, 1), (1, 1)])
def test_the_layers_that_are_on_have_the_modules_of_the_structure_and_the_others_nothing(sizes, layers):
    adapted = peftlib.attach(backbone("bert"), "autopeft", layers=layers, train_head=False, **sizes)
    on = {MODULES[name] for name in MODULES if sizes.get(name, 1)}
    for layer, bit in zip(adapted.host.anatomy.layers, layers):
        names = {n.rpartition(".")[2] for n, _ in layer.module.named_modules()}
        assert names & set(MODULES.values()) == (on if bit else set())
    trained = {n for n in adapted.trainable() if not any(m in n for m in MODULES.values())}
    assert not trained, "nothing of the backbone trains"


def test_no_layers_named_are_all_layers():
    some, every = (
        peftlib.attach(backbone("bert"), "autopeft", layers=bits, train_head=False) for bits in (None, (1, 1))
    )
    assert some.count() == every.count()
    assert some.trainable().keys() == every.trainable().keys()


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("parallel", [0, 7])
@torch.no_grad()
def test_both_adapters_read_what_the_original_gives_them(family, parallel):
    """cambridgeltl/autopeft, adapters/modeling_sappa.py (Adapter.pre_forward, forward, post_forward) and
    layer.py (adapter_stack): for the block's input x and output y, the serial adapter reads LN(x + y), the parallel one
    x, and the layer gives LN(x + y + A_serial(LN(x + y)) + 4 A_parallel(x)). That is for BERT; where the norms stand
    before the blocks, there is none behind the sums."""
    adapted = peftlib.attach(backbone(family), "autopeft", serial=5, parallel=parallel, length=0, train_head=False)
    perturb(adapted)
    adapted.model.double().eval()
    layer, seen = adapted.host.anatomy.layers[0], {}
    first = layer.norms["ffn"] if layer.pre_norm else layer.sites["ffn.up"].module
    first.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    layer.sites["ffn.down"].module.register_forward_hook(lambda m, args, out: seen.update(y=out))
    layer.module.register_forward_hook(lambda m, args, out: seen.update(out=out if torch.is_tensor(out) else out[0]))
    adapted.model(**inputs(family))
    x, y = seen["x"], seen["y"]

    def network(a, z):
        return torch.relu(z @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias

    norm = torch.nn.Identity()
    if not layer.pre_norm:
        norm = torch.nn.LayerNorm(x.shape[-1], eps=layer.norms["ffn"].eps).double()
        norm.load_state_dict(layer.norms["ffn"].state_dict(), strict=False)
    modules = {n.rpartition(".")[2]: m for n, m in layer.module.named_modules()}
    total = x + y + network(modules["sequential_adapter"], norm(x + y))
    if parallel:
        total = total + 4 * network(modules["parallel_adapter"], x)
    torch.testing.assert_close(seen["out"], norm(total), atol=1e-12, rtol=1e-10)


def test_the_prefix_trains_through_an_mlp_and_is_stored_without_it():
    """adapterhub/nas_search.py: PrefixTuningConfig(bottleneck_size=800); its tanh and one MLP for all layers are
    adapters/prefix_tuning.py's."""
    options = {"serial": 0, "parallel": 0, "length": 3, "layers": (1, 0)}
    adapted = peftlib.attach(backbone("bert"), "autopeft", train_head=False, **options)
    d, h = 32, 800
    assert adapted.count().method == 3 * d + (d + 1) * h + 2 * d * (h + 1)
    assert adapted.count().stored == 2 * 3 * d
    plain = peftlib.attach(backbone("bert"), "autopeft", reparametrize=False, train_head=False, **options)
    assert plain.count().method == plain.count().stored == 2 * 3 * d


@pytest.mark.parametrize(
    ("options", "one"),
    [
        ({"serial": 96, "parallel": 192, "length": 1}, 2 * 768 * 288 + 288 + 2 * 768 + 2 * 768),
        ({"serial": 0, "parallel": 0, "length": 3}, 2 * 768 * 3),
    ],
)
def test_count_on_bert_base(options, one):
    layers = (0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0)
    shapes = backbones.shapes("bert-base-uncased")
    adapted = peftlib.attach(shapes, "autopeft", layers=layers, reparametrize=False, **options)
    assert adapted.count().method == 6 * one


@torch.no_grad()
def test_adapters_alone_start_at_or_near_the_backbone_and_a_prefix_does_not():
    plain = backbone("bert")(**inputs("bert")).logits
    parallel = peftlib.attach(backbone("bert"), "autopeft", serial=0, length=0)
    adapters = peftlib.attach(backbone("bert"), "autopeft", length=0)
    prefix = peftlib.attach(backbone("bert"), "autopeft", serial=0, parallel=0, length=3)
    assert torch.equal(parallel.model(**inputs("bert")).logits, plain)
    difference = (adapters.model(**inputs("bert")).logits - plain).abs().max()
    assert 0 < difference < 0.01
    assert not torch.equal(prefix.model(**inputs("bert")).logits, plain)


def test_an_encoder_decoder_has_a_bit_for_each_layer_of_both_stacks(tmp_path):
    adapted = peftlib.attach(backbone("t5", "seq2seq"), "autopeft", layers=(0, 0, 1, 0), serial=4)
    assert all(n.startswith("decoder.block.0.") for n in adapted.trainable())
    perturb(adapted)
    loaded = peftlib.load(backbone("t5", "seq2seq"), adapted.save(tmp_path / "a"))
    assert loaded.config == adapted.config
    assert all(torch.equal(t, adapted.state()[n]) for n, t in loaded.state().items())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="leave nothing to train"):
        peftlib.config("autopeft", serial=0, parallel=0, length=0)
    with pytest.raises(ConfigError, match=r"layers=\(0, 0\) are not"):
        peftlib.config("autopeft", layers=(0, 0))
    with pytest.raises(ConfigError, match=r"layers=\(1, 2\) are not"):
        peftlib.config("autopeft", layers=(1, 2))
    with pytest.raises(TargetError, match=r"layers=\(1, 0, 1\) are for 3 layers, and BertForSeq\S+ has 2"):
        peftlib.attach(backbone("bert"), "autopeft", layers=(1, 0, 1))
    with pytest.raises(MergeError, match="autopeft has no merge"):
        peftlib.attach(backbone("bert"), "autopeft").merge()


# The space

TINY = Space(32, 2)


def points(space, count, seed=0):
    generator = np.random.default_rng(seed)
    return [space.sample(generator) for _ in range(count)]


def parameters(options):
    """By the card's formula."""
    return taxonomy.entry("autopeft").trained(L=2, d=32, reparametrize=False, hidden=800, **options)


def test_sizes_halve_from_the_width_to_one_and_none():
    assert Space(768, 12).sizes == (768, 384, 192, 96, 48, 24, 12, 6, 3, 1, 0)
    assert Space(384, 6).sizes == (384, 192, 96, 48, 24, 12, 6, 3, 1, 0)


def test_parameters_are_those_that_the_attached_structure_stores():
    shapes = backbones.load("tiny-bert", head="classification").model
    for point in points(TINY, 6):
        adapted = peftlib.attach(shapes, "autopeft", train_head=False, **TINY.options(point))
        assert adapted.count().stored == TINY.parameters(torch.tensor(point)) == parameters(TINY.options(point))
        adapted.detach()


def test_all_that_is_drawn_is_valid_and_everything_is_drawn():
    small = Space(2, 1)  # sizes 2, 1, 0
    drawn = set(points(small, 600))
    assert drawn == {p for p in itertools.product(range(3), range(3), range(3), range(2)) if small.valid(p)}
    assert len(drawn) == 26


def test_thrift_is_one_for_the_smallest_structure_and_zero_for_the_largest():
    none = len(TINY.sizes) - 1
    values = TINY.thrift(torch.tensor([(0, 0, 0, 1, 1), (none, none, none - 1, 0, 1), (0, none, none, 0, 1)]))
    assert values[:2].tolist() == pytest.approx([0.0, 1.0])
    assert 0 < values[2] < 1
    assert TINY.parameters(torch.tensor((none, none, none - 1, 0, 1))) == 64


# The Pareto set


def test_the_pareto_set_is_what_no_other_beats_and_its_volume_what_it_dominates():
    generator = np.random.default_rng(3)
    for seed in range(5):
        tried = points(TINY, 12, seed)
        scores = [float(generator.uniform(0.4, 1)) for _ in tried]
        trials = [(score, parameters(TINY.options(point))) for score, point in zip(scores, tried)]
        beaten = [
            any(s >= score and n <= size and (s, n) != (score, size) for s, n in trials) for score, size in trials
        ]
        found = pareto(TINY, tried, scores)
        assert {tried[i] for i in found} == {point for point, b in zip(tried, beaten) if not b}
        assert [trials[i] for i in found] == sorted((trials[i] for i in found), key=lambda trial: trial[1])
        # The area of a union of rectangles, on the grid that their corners make.
        boxes = [(float(TINY.thrift(torch.tensor(p))), max(0.0, 2 * s - 1)) for p, s in zip(tried, scores)]
        widths, heights = (sorted({0.0, *side}) for side in zip(*boxes))
        area = sum(
            (w - w0) * (h - h0)
            for w0, w in itertools.pairwise(widths)
            for h0, h in itertools.pairwise(heights)
            if any(w <= x + 1e-12 and h <= y + 1e-12 for x, y in boxes)
        )
        volumes = [hypervolume(TINY, tried[:n], scores[:n], reference=0.5) for n in (4, 8, 12)]
        assert volumes[-1] == pytest.approx(area)
        assert volumes == sorted(volumes)


def test_other_scores_measure_the_set_that_the_scores_chose():
    none = len(TINY.sizes) - 1
    small, large = (none, none - 1, none, 0, 1), (0, 0, 0, 1, 1)
    assert pareto(TINY, [large, small], [0.9, 0.7]) == [1, 0]
    assert pareto(TINY, [large, small, small], [0.7, 0.7, 0.7]) == [1]
    width = float(TINY.thrift(torch.tensor(small)))
    assert hypervolume(TINY, [large, small], [0.6, 0.7], 0.5) == pytest.approx(0.4 * width)
    assert hypervolume(TINY, [large, small], [0.6, 0.7], 0.5, measured=[1.0, 0.6]) == pytest.approx(0.2 * width)


def test_what_is_proposed_follows_from_the_trials_and_the_seed():
    search, tried = AutoPEFTSearch("random"), points(TINY, 3)
    first, again, other = (search.propose(TINY, tried, [0.5] * 3, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[1] == "random" and TINY.valid(first[0][0])
    tiniest = Space(1, 1)  # sizes 1 and 0: seven structures
    tried = []
    for _ in range(7):
        tried += search.propose(tiniest, tried, [0.5] * len(tried), 0)[0]
    assert len(set(tried)) == 7
    with pytest.raises(ConfigError, match="initial=1 is too small"):
        AutoPEFTSearch(initial=1)


def test_a_neighbour_differs_in_one_coordinate():
    generator = np.random.default_rng(0)
    point = (1, 6, 6, 0, 1)  # sizes 16, 0, 0 in the second layer
    near = {TINY.neighbour(point, generator) for _ in range(600)}
    assert all(TINY.valid(other) and sum(a != b for a, b in zip(point, other)) == 1 for other in near)
    assert len(near) == 3 * 6 - 1 + 1, "all, but the ones that leave nothing on"


def test_the_copula_transform_gives_normal_quantiles_of_ranks():
    """As the original's ``apply_normal_copula_transform``: the empirical distribution at a value counts it."""
    bayesian = pytest.importorskip("peftlib.methods.hybrid.automatic.autopeft.bayesian")
    seen = torch.tensor([[0.5, -30.0], [0.7, -10.0], [0.7, -20.0], [0.9, -5.0]], dtype=torch.float64)
    quantiles = stats.norm.ppf([[0.25, 0.25], [0.75, 0.75], [0.75, 0.5], [1 - 1e-4, 1 - 1e-4]])
    np.testing.assert_allclose(bayesian.normal_quantiles(seen, seen), quantiles, rtol=1e-6)
    reference = torch.tensor([[0.6, -40.0]], dtype=torch.float64)
    np.testing.assert_allclose(bayesian.normal_quantiles(reference, seen), stats.norm.ppf([[0.25, 1e-4]]), rtol=1e-6)


def test_the_search_is_the_original_s():
    """cambridgeltl/autopeft: run.sh (200 trials, 100 at random), run_one_replicate.py (batches of 4, "saasgp", copula),
    settings.py (the sampler's steps; a reference of 26 % of BERT-base's 109 million parameters)."""
    search = AutoPEFTSearch()
    assert (search.trials, search.initial, search.batch) == (200, 100, 4)
    assert (search.surrogate, search.copula) == ("saas", True)
    assert (search.warmup, search.samples, search.thinning) == (128, 64, 4)
    largest = 12 * 2 * 768 * 3 * 768
    assert search.most * largest / 109.5e6 == pytest.approx(0.26, abs=0.005)
    assert Space(768, 12).sizes == (*(768 >> k for k in range(9)), 1, 0), (
        "log2 reductions of 0 to 10, the last for none"
    )


CODE = "cambridgeltl/autopeft"
SAPPA = f"{CODE}, adapters/modeling_sappa.py, Adapter"
FACTS = Facts(
    "autopeft",
    Default("serial", 48, "chosen here: a structure is what the search finds"),
    Default("parallel", 48, "chosen here: a structure is what the search finds"),
    Default("length", 3, "chosen here: a structure is what the search finds"),
    Default("reparametrize", True, f"{CODE}, adapters/configuration.py, PrefixTuningConfig: flat=False"),
    Default("hidden", 800, f"{CODE}, adapterhub/nas_search.py: bottleneck_size=800"),
    Start("*.sequential_adapter.down.weight", normal(0.02), f"{SAPPA}: init_bert_weights"),
    Start("*.sequential_adapter.up.weight", normal(0.02), f"{SAPPA}: init_bert_weights"),
    Start("*.parallel_adapter.down.weight", kaiming_uniform(), f"{SAPPA}: kaiming_uniform_, a=sqrt(5)"),
    Start("*.parallel_adapter.up.weight", zeros(), f"{SAPPA}: adapter_up_pa"),
    Trains(("*.prefix.maker.*", "*.sequential_adapter.*", "*.parallel_adapter.*"), f"{CODE}: adapter parameters alone"),
    Count(
        "bert-base-uncased",
        12 * (2 * 768 * 48 + 48 + 768),
        f"{CODE}, adapterhub/nas_search.py: Pfeiffer alone",
        {"parallel": 0, "length": 0},
    ),
    Count("roberta-base", 17_170_592, "its formula at the defaults"),
    Count("t5-base", 49_722_720, "its formula; the original is on encoders"),
    Count("llama-7b", 238_698_272, "its formula; the original is on encoders"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
