"""Masks packed into bits."""

import pytest
import torch

from peftlib.errors import LoadError
from peftlib.mechanisms.bits import pack, packed_size, unpack


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 4), (0, 4)])
def test_packing_and_unpacking_give_the_mask_back_in_an_eighth_of_the_bytes(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(mask.numel()) == (mask.numel() + 7) // 8
    assert torch.equal(unpack(packed, shape), mask)


def test_the_first_entry_is_the_lowest_bit():
    mask = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    assert pack(mask).tolist() == [0b1001, 0b1]


def test_a_mask_of_another_shape_or_with_bits_behind_its_end_is_refused():
    packed = pack(torch.ones(9, dtype=torch.bool))
    with pytest.raises(LoadError, match="3 uint8 bytes"):
        unpack(packed, (17,))
    with pytest.raises(LoadError, match="behind its end"):
        unpack(torch.tensor([255, 255], dtype=torch.uint8), (9,))
