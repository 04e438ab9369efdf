"""`linear_logprob` on the triton backend against its definition: real kernels on a GPU, else interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import linear_logprob, use_backend
from tenfold.kernels.testing import check_op, logprob_inputs, poisoned_scratch, with_margin

GRADS = ("hidden", "weight", "bias")


def triton(**arguments):
    with use_backend("triton"):
        return linear_logprob(**arguments)


def reference(**arguments):
    with use_backend("reference"):
        return linear_logprob(**arguments)


def check(tensors, **options):
    check_op(triton, reference, tensors, grads=[n for n in GRADS if n in tensors], **options)


def output_and_gradients(tensors, **options):
    names = [n for n in GRADS if n in tensors]
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}
    out = triton(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, [leaves[name] for name in names], grad)


@pytest.fixture
def small_pieces(monkeypatch):
    """Shares of the vocabulary of several tiles, and a backward in several blocks, at the sizes of a test."""
    from tenfold.kernels.logprob import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    monkeypatch.setattr(kernels, "BUFFER", 1)
    monkeypatch.setattr(kernels, "PIECE", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "dim"),
    [
        (150, 300, 70),  # several tiles each way, none of the last ones full
        (128, 256, 64),  # whole tiles
        (3, 4100, 16),  # rows too long for the backward to take at once
        (37, 1, 16),  # one token: certain
        (1, 1, 1),
        (0, 5, 4),
    ],
)
def test_output_and_gradients_are_within_the_budget(device, dtype, bias, rows, vocab, dim):
    check(logprob_inputs(rows, vocab, dim, bias=bias, ignored=0.3, dtype=dtype, device=device))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(device, data):
    rows, vocab, dim = (data.draw(st.integers(low, 100)) for low in (0, 1, 1))
    tensors = logprob_inputs(
        *(rows, vocab, dim),
        bias=data.draw(st.booleans()),
        ignored=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        ignore_index=(ignore_index := data.draw(st.sampled_from([-100, 0, 1, 10**12]))),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    check(tensors, ignore_index=ignore_index)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_pieces(device, dtype):
    check(logprob_inputs(150, 300, 24, bias=True, ignored=0.3, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores(device, dtype):
    tensors = logprob_inputs(70, 150, 16, bias=True, dtype=dtype, device=device)
    tensors["weight"] = tensors["weight"] * 1e4
    check(tensors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_ignored_rows_take_no_part_whatever_they_hold(device, bad):
    tensors = logprob_inputs(150, 200, 24, bias=True, device=device)
    rows = torch.arange(150, device=device)
    ignored = (rows % 3 == 0) | ((rows >= 64) & (rows < 128))  # one block of rows entirely
    tensors["target"] = tensors["target"].masked_fill(ignored, -100)
    poisoned = tensors | {"hidden": tensors["hidden"].masked_fill(ignored[:, None], bad)}
    clean, dirty = output_and_gradients(tensors), output_and_gradients(poisoned)
    for a, b in zip(clean, dirty, strict=True):
        assert a.equal(b)
    assert dirty[0][ignored].eq(0).all()
    assert dirty[1][ignored].eq(0).all()


@pytest.mark.parametrize("wrong", [-1, 200, 2**40])
def test_a_target_out_of_range_gives_nan(device, wrong):
    tensors = logprob_inputs(70, 200, 16, device=device)
    tensors["target"][[3, 66]] = wrong
    logp, dhidden, dweight = output_and_gradients(tensors)
    rows = torch.isin(torch.arange(70, device=device), torch.tensor([3, 66], device=device))
    assert logp.isnan().equal(rows)
    assert dhidden.isnan().all(1).equal(rows)
    assert dhidden.isnan().any(1).equal(rows)
    assert dweight.isnan().all()


def test_a_bias_of_minus_infinity_rules_tokens_out(device):
    tensors = logprob_inputs(20, 200, 8, bias=True, device=device)
    tensors["target"] = 130 + tensors["target"] % 70
    tensors["bias"][:130] = -torch.inf  # whole tiles of the vocabulary
    logp, dhidden, dweight, dbias = output_and_gradients(tensors)
    few = tensors | {name: tensors[name][130:] for name in ("weight", "bias")} | {"target": tensors["target"] - 130}
    expected = output_and_gradients(few)
    for a, b in zip((logp, dhidden, dweight[130:], dbias[130:]), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert dweight[:130].eq(0).all()
    assert dbias[:130].eq(0).all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_scratch_and_margins_are_never_read(device, layout):
    tensors = logprob_inputs(150, 200, 24, bias=True, ignored=0.3, layout=layout, device=device)
    tensors["target"][64:128] = -100
    plain = output_and_gradients(tensors)
    with poisoned_scratch():
        guarded = output_and_gradients({name: with_margin(x) for name, x in tensors.items()})
    for a, b in zip(plain, guarded, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",)])
def test_gradients_of_some(device, needed):
    tensors = logprob_inputs(20, 70, 8, bias=True, device=device)
    everything = dict(zip(GRADS, output_and_gradients(tensors)[1:], strict=True))
    leaves = {name: x.detach().requires_grad_(name in needed) for name, x in tensors.items()}
    logp = triton(**leaves)
    logp.backward(torch.randn(20, generator=torch.Generator().manual_seed(1)).to(logp))
    for name in GRADS:
        assert leaves[name].grad is None if name not in needed else leaves[name].grad.equal(everything[name])


def test_an_expanded_gradient(device):
    tensors = logprob_inputs(20, 70, 8, device=device)
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    ours = torch.autograd.grad(triton(**tensors).sum(), leaves)
    truth = torch.autograd.grad(reference(**tensors).sum(), leaves)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_float64_is_refused(device):
    with pytest.raises(TypeError, match="hidden: float64 is not supported by the triton backend"):
        triton(**logprob_inputs(3, 5, 4, dtype=torch.float64, device=device))


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_torch_op(device, bias):
    tensors = logprob_inputs(9, 13, 4, bias=bias, device=device)
    hidden, weight, offset = (tensors[n].requires_grad_() if n in tensors else None for n in GRADS)
    arguments = (hidden, weight, tensors["target"], offset, -100, "triton")
    torch.library.opcheck(torch.ops.tenfold.linear_logprob, arguments)
