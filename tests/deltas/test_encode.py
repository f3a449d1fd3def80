"""Encoded matrices: what they cost, what they lose, and that decoding is the formula it says it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metier.deltas.encode import decode, encode_int8, encode_low_rank, num_bytes, parts_fit, relative_error

M, N = 24, 40


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def spelled(parts: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = {torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in parts.items()}


def test_a_matrix_near_the_base_is_stored_as_a_difference_and_far_better_so() -> None:
    base = normal(M, N)
    matrix = base + normal(M, N, seed=1, std=1e-3)
    parts = encode_int8(matrix, base)
    assert parts.keys() == {"int8_difference", "scale"}
    assert (parts["int8_difference"].dtype, tuple(parts["scale"].shape)) == (torch.int8, (M, 1))
    decoded = decode(parts, base, torch.float32)
    # half a scale, and some units in the last place of the sum of two float32
    limit = parts["scale"] / 2 + base.abs() * 2**-22
    assert ((decoded - matrix).abs() <= limit).all()
    assert torch.allclose(parts["scale"], (matrix - base).abs().amax(1, keepdim=True) / 127)
    whole = matrix.abs().amax(1, keepdim=True) / 127
    assert (whole > 100 * parts["scale"]).all(), "without the base the error would be a hundred times larger"
    assert relative_error(matrix, base, decoded) < 0.01


def test_a_matrix_far_from_the_base_is_stored_as_it_is() -> None:
    base, matrix = normal(M, N, std=100.0), normal(M, N, seed=1)
    parts = encode_int8(matrix, base)
    assert parts.keys() == {"int8", "scale"}
    assert ((decode(parts, torch.full_like(base, float("nan")), torch.float32) - matrix).abs() <= parts["scale"]).all()


def test_a_row_of_zeros_and_one_that_did_not_move_come_back_as_they_were() -> None:
    base = normal(M, N)
    for matrix in (torch.zeros(M, N), base.clone()):
        assert torch.equal(decode(encode_int8(matrix, base), base, torch.float32), matrix)


def test_the_largest_values_of_a_row_are_the_largest_codes() -> None:
    matrix = torch.tensor([[-3.0, 0.0, 1.5]])
    parts = encode_int8(matrix, torch.full((1, 3), 1e4))
    assert parts["int8"].tolist() == [[-127, 0, 64]]
    assert torch.allclose(parts["scale"], torch.tensor([[3 / 127]]))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_is_the_one_that_the_difference_has(rank: int, dtype: torch.dtype) -> None:
    base = torch.zeros(64, 96, dtype=dtype)
    matrix = (normal(64, rank) @ normal(rank, 96, seed=1)).to(dtype)
    parts = encode_low_rank(matrix, base, max_relative_error=0.02)
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
        "left": ((64, rank), dtype),
        "right": ((rank, 96), dtype),
    }
    assert num_bytes(parts) < matrix.nbytes / 2
    assert relative_error(matrix, base, decode(parts, base, dtype)) <= 0.02


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(1e-4, 1e3),
    st.floats(0.0, 3.0),
    st.floats(0.001, 0.9),
    st.integers(0, 9),
)
def test_the_error_is_kept_or_the_matrix_is_plain(
    dtype: torch.dtype, step: float, decay: float, limit: float, seed: int
) -> None:
    """Spectra that fall slowly and fast, steps from far below the base's rounding to far above its values."""
    base = normal(M, N, seed=seed).to(dtype)
    spectrum = torch.exp(-decay * torch.arange(M))
    left = torch.linalg.qr(normal(M, M, seed=seed + 1))[0]
    right = torch.linalg.qr(normal(N, N, seed=seed + 2))[0]
    matrix = (base.float() + step * (left * spectrum) @ right[:M]).to(dtype)
    parts = encode_low_rank(matrix, base, max_relative_error=limit)
    decoded = decode(parts, base, dtype)
    assert num_bytes(parts) <= matrix.nbytes
    if "plain" in parts:
        assert torch.equal(decoded, matrix)
    else:
        assert relative_error(matrix, base, decoded) <= limit
        assert num_bytes(parts) < matrix.nbytes


def test_no_lower_rank_would_do() -> None:
    base = torch.zeros(64, 96)
    matrix = (normal(64, 64) * torch.exp(-0.5 * torch.arange(64))) @ torch.linalg.qr(normal(96, 96, seed=1))[0][:64]
    parts = encode_low_rank(matrix, base, max_relative_error=0.1)
    rank = parts["left"].shape[1]
    assert 1 < rank < 20
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    fewer = (left[:, : rank - 1] * values[: rank - 1]) @ right[: rank - 1]
    assert relative_error(matrix, base, fewer) > 0.1


def test_a_difference_of_full_rank_stays_plain() -> None:
    base, matrix = normal(M, N), normal(M, N, seed=1)
    assert encode_low_rank(matrix, base, max_relative_error=0.05).keys() == {"plain"}


def test_rounding_of_the_result_counts_as_error() -> None:
    """A step of a third of bfloat16's rounding at 1.0, of rank 1: the factors are exact, what they give is not."""
    base = torch.ones(64, 96, dtype=torch.bfloat16)
    matrix = torch.full((64, 96), 1 + 2**-7, dtype=torch.bfloat16)
    assert "left" in encode_low_rank(matrix, base, max_relative_error=0.1)
    matrix[::2, ::2] = 1.0
    parts = encode_low_rank(matrix, base, max_relative_error=0.1)
    assert relative_error(matrix, base, decode(parts, base, torch.bfloat16)) <= 0.1


def test_decoding_adds_in_a_fixed_order_in_float32() -> None:
    base = normal(M, N, seed=2).bfloat16()
    left, right = normal(M, 5).bfloat16(), normal(5, N, seed=1).bfloat16()
    want = torch.zeros(M, N)
    for m in range(M):
        for n in range(N):
            total = torch.zeros(())
            for r in range(5):
                total = total + left[m, r].float() * right[r, n].float()
            want[m, n] = base[m, n].float() + total
    assert torch.equal(decode({"left": left, "right": right}, base, torch.bfloat16), want.bfloat16())
    assert torch.equal(decode({"left": left, "right": right}, base, torch.float32), want)


def test_only_complete_sets_of_parts_fit() -> None:
    shape = (M, N)
    base = normal(M, N)
    near, low = base + normal(M, N, seed=1, std=1e-3), base + normal(M, 1) @ normal(1, N)
    for parts in (
        encode_int8(near, base),
        encode_int8(near, base * 100),
        encode_low_rank(low, base, max_relative_error=0.1),
        {"plain": near},
    ):
        kinds = spelled(parts)
        assert parts_fit(kinds, shape, "F32"), parts.keys()
        assert not parts_fit(kinds, (M + 1, N), "F32")
        assert not parts_fit({**kinds, "more": ("F32", shape)}, shape, "F32")
        for name, (dtype, of) in kinds.items():
            assert not parts_fit({n: k for n, k in kinds.items() if n != name}, shape, "F32")
            assert not parts_fit({**kinds, name: ("F64", of)}, shape, "F32")
            assert not parts_fit({**kinds, name: (dtype, (*of, 1))}, shape, "F32")
    assert not parts_fit({"plain": ("BF16", shape)}, shape, "F32")
    assert parts_fit({"plain": ("F32", (N,))}, (N,), "F32")
    assert not parts_fit({"int8": ("I8", (N,)), "scale": ("F32", (1,))}, (N,), "F32")
    assert not parts_fit({"left": ("F32", (M, 2)), "right": ("F32", (3, N))}, shape, "F32")


@pytest.mark.parametrize(("changed", "lost", "want"), [(2.0, 1.0, 0.5), (0.0, 0.0, 0.0), (0.0, 1.0, float("inf"))])
def test_the_error_is_a_share_of_what_changed(changed: float, lost: float, want: float) -> None:
    base = torch.zeros(1, 1)
    matrix = base + changed
    assert relative_error(matrix, base, matrix - lost) == want
