"""The testing tools must be able to say no."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels.testing import (
    assert_within_budget,
    check_op,
    cog_inputs,
    lay_out,
    logprob_inputs,
    peak_memory,
    with_margin,
)

HIGH = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
LOW = torch.tensor([1.0, -2.0, 4.0 + 1e-3])


def test_budget_is_twice_the_low_error_and_eps():
    eps = torch.finfo(torch.float32).eps
    budget = 2 * (float(LOW[2]) - 4.0 + 4 * eps)
    assert_within_budget((HIGH + torch.tensor([0.0, budget * 0.99, 0.0])).float(), LOW, HIGH)
    with pytest.raises(AssertionError, match=r"out: off by 0\.00\d+ at \(1,\) .* exceeded by 1 of 3"):
        assert_within_budget((HIGH + torch.tensor([0.0, budget * 1.01, 0.0])).float(), LOW, HIGH, name="out")


def test_an_exact_low_leaves_only_eps():
    assert_within_budget(HIGH.float(), HIGH.float(), HIGH)
    with pytest.raises(AssertionError, match="off by"):
        assert_within_budget(HIGH.float() * (1 + 1e-6), HIGH.float(), HIGH)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_budget_refuses_what_is_not_finite(bad, which):
    three = [HIGH.float(), LOW.clone(), HIGH.clone()]
    three[which][0] = bad
    with pytest.raises(AssertionError, match="1 of 3 values are not finite"):
        assert_within_budget(*three)


def test_budget_refuses_another_shape():
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        assert_within_budget(HIGH[:2].float(), LOW, HIGH)
    assert_within_budget(*(torch.zeros(0, 3) for _ in range(3)))


def _product(a, b, factor=1.0):
    return factor * (a @ b)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b.T, 1.01 * a.T @ grad


def test_check_op_accepts_the_same_and_refuses_a_wrong_output_or_gradient():
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(7, 3)}
    check_op(_product, _product, tensors, grads=("a", "b"), factor=2.0)
    with pytest.raises(AssertionError, match="output"):
        check_op(lambda a, b: a @ b * 1.001, _product, tensors)
    wrong = lambda a, b: _WrongGradient.apply(a, b)  # noqa: E731
    check_op(wrong, _product, tensors, grads=("a",))
    with pytest.raises(AssertionError, match="gradient of b"):
        check_op(wrong, _product, tensors, grads=("a", "b"))
    with pytest.raises(ValueError, match="grads: c not among"):
        check_op(_product, _product, tensors, grads=("c",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cog_inputs_have_exact_scores(dtype):
    tensors = cog_inputs(2, 4, 33, 65, 64, kv_heads=2, mask=(2, 1, 33, 65), dtype=dtype)
    assert [tuple(t.shape) for t in tensors.values()] == [
        (2, 4, 33, 64),
        (2, 2, 65, 64),
        (2, 2, 65, 64),
        (2, 1, 33, 65),
    ]
    query, key = (tensors[name].float().repeat_interleave(n, 1) for name, n in (("query", 1), ("key", 2)))
    scores = query.double() @ key.double().mT
    assert torch.equal((query @ key.mT).double(), scores)
    assert 0 < (scores == 0).float().mean() < 0.02
    assert tensors["mask"].dtype == torch.bool
    assert 0.6 < tensors["mask"].float().mean() < 0.8


def test_inputs_follow_their_seed():
    for factory in (cog_inputs, logprob_inputs):
        first, again, other = factory(seed=1), factory(seed=1), factory(seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)


def test_logprob_inputs():
    tensors = logprob_inputs(400, 11, 8, bias=True, ignored=0.25, dtype=torch.bfloat16)
    assert [tuple(t.shape) for t in tensors.values()] == [(400, 8), (11, 8), (400,), (11,)]
    ignored = tensors["target"] == -100
    assert 0.15 < ignored.float().mean() < 0.35
    assert set(tensors["target"][~ignored].tolist()) == set(range(11))
    assert not (logprob_inputs()["target"] == -100).any()


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (5, 7)])
def test_layouts_keep_the_values_and_change_the_strides(layout, shape):
    x = torch.randn(shape)
    y = lay_out(x, layout)
    assert torch.equal(x, y)
    assert not y.is_contiguous()
    assert (y.stride(-1) == 1) == (layout == "transposed" and len(shape) > 2)


def test_expanded_layout_repeats_and_unknown_layouts_are_refused():
    y = lay_out(torch.randn(1, 3, 5), "expanded")
    assert y.stride(1) == 0
    assert torch.equal(y[0, 0], y[0, 2])
    with pytest.raises(ValueError, match="layout: unknown 'diagonal'"):
        lay_out(y, "diagonal")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_margin_keeps_values_and_strides(shape, layout, dtype):
    x = lay_out(torch.randint(0, 2, shape).to(dtype), layout if len(shape) > 1 else "contiguous")
    y = with_margin(x)
    assert torch.equal(x, y)
    assert x.stride() == y.stride()
    assert y.untyped_storage().nbytes() > x.numel() * x.element_size()


def test_margin_catches_reads_outside():
    x = lay_out(torch.ones(3, 5), "sliced")
    y = with_margin(x)
    start = y.storage_offset()
    assert y.sum() == 15
    assert torch.as_strided(y, (3, 6), y.stride(), start).sum().isnan()  # one column too many
    assert torch.as_strided(y, (1,), (1,), start - 1).isnan()
    assert torch.as_strided(y, (3, 5), (y.stride(0), 1), start).sum().isnan()  # the gaps
    assert with_margin(torch.zeros(2, dtype=torch.int32)).as_strided((3,), (1,))[-1] > 2**30


def test_peak_memory_sees_what_is_freed_again():
    def square(T):  # holds T×T for a moment, returns T
        x = torch.ones(T, 1)
        return (x @ x.T).sum(0)

    assert 4 * 500**2 <= peak_memory(lambda: square(500)) <= 4 * 500**2 * 1.05
    assert peak_memory(lambda: square(1000)) > 3.5 * peak_memory(lambda: square(500))
    assert peak_memory(lambda: None) == 0
    x = torch.ones(1000, 1000)
    assert peak_memory(x.neg_) < 1000  # in place

    def one_after_the_other():
        for _ in range(3):
            x.clone()

    assert 4e6 <= peak_memory(one_after_the_other) < 4.1e6
    with pytest.raises(ValueError, match="device: cannot measure memory on meta"):
        peak_memory(lambda: None, device="meta")
