import torch

from tenfold.kernels.testing import poisoned_scratch


def test_uninitialised_memory_holds_nan_or_large_numbers():
    like = torch.zeros(2, 3, dtype=torch.bfloat16)
    with poisoned_scratch():
        floats = [
            torch.empty(2, 3),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (1, 2), dtype=torch.float64),
            like.new_empty(4, dtype=torch.complex64),
            like.new_empty_strided((2,), (1,)),
        ]
        integers, bits = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.bool)
        zeros = torch.zeros(5)
    assert all(x.isnan().all() for x in floats)
    assert floats[1].dtype == torch.bfloat16
    assert floats[2].stride() == (1, 2)
    assert integers.eq(2**31 - 1).all()
    assert bits.all()
    assert zeros.eq(0).all()


def test_it_ends_with_the_block():
    before = torch.empty
    with poisoned_scratch():
        assert torch.empty is not before
    assert torch.empty is before
