"""What stands beside a block reads the stream that the block reads, and adds to the sum behind it.

The reference is written down from He et al.'s code (jxhe/unify-parameter-efficient-tuning), the parallel adapter of the
feed-forward block. In modeling_mbart.py, whose norms stand before their blocks (MBartEncoderLayer.forward and
MBartDecoderLayer.forward), the adapter reads the stream x in front of the block's norm, and the layer gives
x + dropout(FFN(LN(x))) + adapter(x). In modeling_roberta.py and modeling_bart.py, whose norms stand behind the sums, it
gives LN(x + dropout(FFN(x)) + adapter(x)).
"""

import pytest
import torch

import peftlib
from peftlib import backbones
from tests.methods.helpers import backbone, inputs, perturb

PRE_NORM = ["t5", "gpt2", "opt", "llama"]
POST_NORM = ["bart", "bert", "roberta", "distilbert"]
METHODS = {
    "parallel_adapter": {"bottleneck": 5},
    "mam_adapter": {"length": 2, "bottleneck": 5, "reparametrize": False},
    "u_mam": {"length": 2, "bottleneck": 5},
    "autopeft": {"serial": 0, "parallel": 5, "length": 2, "hidden": 4},
}


def seen_by(layers):
    """Of each layer: the stream in front of the feed-forward block, what the block's last map gives, the sum's norm or
    None, and the layer's output, in one forward."""
    records = [{} for _ in layers]

    def watch(record, what, module, pick):
        module.register_forward_hook(lambda m, args, out: record.update({what: pick(args, out)}))

    for layer, record in zip(layers, records):
        state = lambda args, out: out if torch.is_tensor(out) else out[0]  # noqa: E731
        first = layer.norms["ffn"] if layer.pre_norm else layer.sites["ffn.up"].module
        watch(record, "stream", first, lambda args, out: args[0])
        watch(record, "block", layer.sites["ffn.down"].module, state)
        watch(record, "output", layer.module, state)
    return records


def he_et_al(record, adapter, scale, norm):
    """The layer's output by the equations above, without dropout."""
    x, y = record["stream"], record["block"]
    W_down, b_down = adapter.down.weight, adapter.down.bias
    change = scale * (torch.relu(x @ W_down.T + b_down) @ adapter.up.weight.T + adapter.up.bias)
    return norm(x + y + change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", PRE_NORM + POST_NORM)
@torch.no_grad()
def test_the_parallel_adapter_reads_the_stream_and_adds_to_the_sum(family, method):
    adapted = peftlib.attach(backbone(family), method, **METHODS[method])
    perturb(adapted)
    adapted.model.double().eval()
    layers = adapted.host.anatomy.layers
    assert {layer.pre_norm for layer in layers} == {family in PRE_NORM}
    records = seen_by(layers)
    adapted.model(**inputs(family))
    for layer, record in zip(layers, records):
        adapter = layer.sites["ffn.down"].module.parallel_adapter
        if layer.pre_norm:
            expected = he_et_al(record, adapter, 4.0, lambda h: h)
        else:
            norm = layer.norms["ffn"]
            expected = he_et_al(
                record,
                adapter,
                4.0,
                lambda h, norm=norm: torch.nn.functional.layer_norm(
                    h, norm.normalized_shape, norm.weight, norm.bias, norm.eps
                ),
            )
        assert not torch.allclose(record["block"], torch.zeros(()).double())
        torch.testing.assert_close(record["output"].reshape(expected.shape), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert", "bart"])
def test_the_blocks_dropout_does_not_act_on_what_is_added(family):
    """At a rate near 1 the block gives nothing; what is added stays as it is."""
    model = backbones.load(f"tiny-{family}", head="classification", dropout=0.999).model.train()
    adapted = peftlib.attach(model, "parallel_adapter", bottleneck=5, dropout=0.0)
    perturb(adapted)
    layer = adapted.host.anatomy.layers[0]
    (record,) = seen_by([layer])
    adapter = layer.sites["ffn.down"].module.parallel_adapter
    norm = None if layer.pre_norm else layer.norms["ffn"]
    sums = {}
    if norm is not None:
        norm.register_forward_hook(lambda m, args, out: sums.update(sum=args[0]))
    with torch.no_grad():
        adapted.model(**inputs(family))
        change = adapter.delta(record["stream"])
    total = record["output"] if norm is None else sums["sum"]
    off = (total - record["stream"] - change).abs()
    assert (off < 1e-5).float().mean() > 0.9
    assert change.abs().min() > 0
