"""Variants of a method beside each other: what is counted, and the table."""

import pytest

import peftlib
from peftlib.efficiency import speed
from peftlib.errors import UnknownNameError


def test_variants_side_by_side():
    variants = {f"k = {k}": peftlib.config("adapter_drop", dropped=k, robust=False, bottleneck=6) for k in (0, 1)}
    for train in (False, True):
        rows = speed.compare(variants, train=train, backbone="tiny-bert", batch_size=2, length=8, turns=1, device="cpu")
        assert [row.name for row in rows] == ["k = 0", "k = 1"]
        assert rows[0].ratio == 1.0
        d = peftlib.anatomy.of(peftlib.backbones.load("tiny-bert").model).d
        forward = 2 * 2 * d * 6 * 2 * 8
        if train:
            # Without the first adapter nothing is computed backwards through the second layer's blocks.
            assert rows[0].flops - rows[1].flops > 3 * forward
        else:
            assert rows[0].flops - rows[1].flops == forward
        assert speed.table(rows).row_count == 2


def test_a_method_without_variants_is_an_error_that_lists_those_that_have_some():
    with pytest.raises(UnknownNameError, match="adapter_drop"):
        list(speed.compare_known(["lora"]))
