"""Comparison of the 8-bit codes of two programs, which may differ by how they round a tie."""

import torch


def places(codes):
    """Returns codes as integers in the order of their values, neighbours one apart."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def assert_same_codes(got, want, share=1e-3):
    """Codes are equal but for at most `share` of them (or a single one), which are neighbours."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    apart = (places(got) - places(want)).abs()
    assert apart.max() <= 1
    assert (apart != 0).sum() <= max(1, share * apart.numel())
