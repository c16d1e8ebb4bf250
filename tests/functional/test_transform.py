# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_modifier.functional.alignment import (
    alignment_transform,
    condition_number,
    dampen,
    diagonal_blocks,
    geometric_mean,
)
from cat_modifier.functional.layout import Rotation, TransformLayout
from cat_modifier.functional.stored import dequantize_blocks, fits_int8, store_blocks
from cat_modifier.functional.transform import (
    apply_blocks,
    compute_blocks,
    invert_blocks,
    store_transform,
)


def random_second_moments(count: int, size: int, seed: int, decay: float = 2.0) -> torch.Tensor:
    """Make positive definite blocks. Eigenvalues span `2 * decay` orders of magnitude"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(x)[0]
    scales = torch.logspace(-decay / 2, decay / 2, size, dtype=torch.float64)
    root = (basis * scales) @ basis.mT
    second_moments = root @ root.mT
    return second_moments / second_moments.diagonal(dim1=-2, dim2=-1).mean()


def alignment_of(transform, sx, sw, energy=1.0):
    """Compute the alignment of a block-diagonal transform over the constant E||W x||^2"""
    inverse = torch.linalg.inv(transform)
    weight = (inverse.mT @ sw @ inverse).diagonal(dim1=-2, dim2=-1).sum()
    activation = (transform @ sx @ transform.mT).diagonal(dim1=-2, dim2=-1).sum()
    return energy / (weight * activation)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(0, 2**16))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_geometric_mean_solves_the_riccati_equation(shape):
    count, size, seed = shape
    sx, sw = (
        random_second_moments(count, size, seed),
        random_second_moments(count, size, seed + 1),
    )
    g = geometric_mean(sw, torch.linalg.inv(sx))
    assert torch.allclose(g @ sx @ g, sw, rtol=1e-6, atol=1e-8 * sw.abs().max().item())


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.floats(-0.3, 0.3))
def test_no_block_diagonal_transform_is_better_aligned(shape, step):
    count, size, seed = shape
    sx, sw = (
        random_second_moments(count, size, seed),
        random_second_moments(count, size, seed + 1),
    )
    best = alignment_transform(sx, sw, alignment_strength=1.0, dampening_frac=1e-9)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(best.shape, generator=generator, dtype=torch.float64)
    other = best + step * best.abs().mean() * noise
    assert alignment_of(other, sx, sw) <= alignment_of(best, sx, sw) * (1 + 1e-6)


@pytest.mark.parametrize("rank", [3, 8, 40])
def test_full_block_reaches_the_best_alignment_of_all_transforms(rank):
    """A* = ||W Sx^(1/2)||_F^2 / ||W Sx^(1/2)||_nuclear^2"""
    torch.manual_seed(rank)
    weight = torch.randn(rank, 24, dtype=torch.float64)
    sx = random_second_moments(1, 24, seed=5)
    values, vectors = torch.linalg.eigh(sx[0])
    product = weight @ (vectors * values.sqrt()) @ vectors.T
    best = product.square().sum() / torch.linalg.svdvals(product).sum() ** 2

    transform = alignment_transform(sx, diagonal_blocks(weight, 24), 1.0, dampening_frac=1e-9)
    energy = (weight @ sx[0] @ weight.T).trace()
    reached = alignment_of(transform, sx, diagonal_blocks(weight, 24), energy)
    assert reached <= best * (1 + 1e-9)
    # dampening changes a weight of lower rank, so that the optimum is only approached
    assert reached >= best * (0.999 if rank >= 24 else 0.98)


def test_larger_blocks_are_better_aligned():
    torch.manual_seed(0)
    x = torch.randn(4096, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64)
    weight = torch.randn(64, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64)
    alignments = []
    for size in (1, 4, 12, 48):
        sx, sw = diagonal_blocks(x, size) / len(x), diagonal_blocks(weight, size)
        alignments.append(alignment_of(alignment_transform(sx, sw, 1.0, 1e-9), sx, sw))
    assert alignments == sorted(alignments)


def test_blocks_of_one_channel_are_the_closed_form_scaling():
    torch.manual_seed(0)
    sx = torch.rand(32, 1, 1, dtype=torch.float64) + 0.1
    sw = torch.rand(32, 1, 1, dtype=torch.float64) + 0.1
    scaling = alignment_transform(sx, sw, 1.0, dampening_frac=1e-12)
    expected = (sw / sx) ** 0.25
    ratio = scaling / expected
    assert torch.allclose(ratio, ratio[0].expand_as(ratio))


def inner(rotation: Rotation) -> int:
    """Choose the order of a fused Hadamard matrix for blocks of 16"""
    return {Rotation.NONE: 1, Rotation.HADAMARD: 4}.get(rotation, 16)


@pytest.mark.parametrize("rotation", list(Rotation))
def test_rotations_keep_alignment(rotation):
    sx, sw = random_second_moments(3, 16, 0), random_second_moments(3, 16, 1)
    transform = compute_blocks(sx, sw, rotation, inner(rotation), dampening_frac=1e-9)
    plain = compute_blocks(sx, sw, Rotation.NONE, 1, dampening_frac=1e-9)
    assert alignment_of(transform, sx, sw).item() == pytest.approx(
        alignment_of(plain, sx, sw).item(), rel=1e-9
    )


def test_eigen_hadamard_gives_all_channels_of_a_block_the_same_second_moment():
    sx, sw = random_second_moments(3, 16, 0), random_second_moments(3, 16, 1)
    t = compute_blocks(sx, sw, Rotation.EIGEN_HADAMARD, 16, dampening_frac=1e-9)
    inverse = torch.linalg.inv(t)
    for second_moments in (t @ sx @ t.mT, inverse.mT @ sw @ inverse):
        diagonal = second_moments.diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(diagonal, diagonal.mean(-1, keepdim=True).expand_as(diagonal))


def test_strength_zero_is_the_rotation_alone():
    sx, sw = random_second_moments(2, 16, 0), random_second_moments(2, 16, 1)
    t = compute_blocks(sx, sw, Rotation.BLOCK_HADAMARD, 16, alignment_strength=0.0)
    assert torch.allclose(t @ t.mT, torch.eye(16, dtype=torch.float64).expand(2, 16, 16))


def test_transform_keeps_the_energy_of_the_activations():
    sx, sw = random_second_moments(2, 16, 0), random_second_moments(2, 16, 1) * 1e4
    t = compute_blocks(sx, sw, Rotation.NONE, 1, dampening_frac=1e-9)
    energy = (t @ sx @ t.mT).diagonal(dim1=-2, dim2=-1).sum()
    assert energy.item() == pytest.approx(sx.diagonal(dim1=-2, dim2=-1).sum().item())


def degenerate(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    sx, sw = random_second_moments(4, 16, 0), random_second_moments(4, 16, 1)
    if kind == "dead input channels":
        sx[:, 3], sx[:, :, 3] = 0, 0
    elif kind == "dead weight columns":
        sw[:, 3], sw[:, :, 3] = 0, 0
    elif kind == "dead blocks":
        sx[1], sw[2] = 0, 0
    elif kind == "no activation at all":
        sx[:] = 0
    elif kind == "constant inputs":
        sx = torch.ones_like(sx)
    elif kind == "one token":
        x = torch.randn(1, 64, dtype=torch.float64)
        sx = diagonal_blocks(x, 16)
    elif kind == "tiny":
        sx *= 1e-30
    elif kind == "huge outlier":
        sx[0, 0, 0] = 1e12
    return sx, sw


@pytest.mark.parametrize("rotation", list(Rotation))
@pytest.mark.parametrize(
    "kind",
    [
        "dead input channels",
        "dead weight columns",
        "dead blocks",
        "no activation at all",
    ]
    + ["constant inputs", "one token", "tiny", "huge outlier"],
)
def test_degenerate_second_moments_give_a_well_conditioned_transform(kind, rotation):
    sx, sw = degenerate(kind)
    blocks = compute_blocks(sx, sw, rotation, inner(rotation)).to(torch.bfloat16)
    assert torch.isfinite(blocks).all()
    assert condition_number(blocks) < (1e6 if kind == "huge outlier" else 1e3)
    product = invert_blocks(blocks) @ blocks.double()
    assert torch.allclose(product, torch.eye(16, dtype=torch.float64).expand(4, 16, 16))


def test_second_moments_that_are_not_finite_are_an_error():
    sx, sw = random_second_moments(2, 4, 0), random_second_moments(2, 4, 1)
    sx[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="input second moments are not finite"):
        compute_blocks(sx, sw, Rotation.NONE, 1)


def test_singular_transform_is_an_error():
    with pytest.raises(ValueError, match="singular"):
        invert_blocks(torch.ones(1, 2, 2))


def test_damping_is_relative_to_the_mean_eigenvalue_of_each_block():
    second_moments = torch.diag_embed(
        torch.tensor([[1.0, 3.0], [10.0, 30.0]], dtype=torch.float64)
    )
    expected = torch.tensor([[1.2, 3.2], [12.0, 32.0]], dtype=torch.float64)
    assert torch.allclose(dampen(second_moments, 0.1).diagonal(dim1=-2, dim2=-1), expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), ()])
def test_blocks_are_applied_as_a_block_diagonal_matrix(shape):
    blocks = torch.randn(3, 4, 4, dtype=torch.float64)
    x = torch.randn(*shape, 12, dtype=torch.float64)
    assert torch.allclose(apply_blocks(x, blocks), x @ torch.block_diag(*blocks).T)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_int8_holds_blocks_up_to_their_scale(scale):
    blocks = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.manual_seed(0)) * scale
    stored = torch.empty_like(blocks, dtype=torch.int8)
    store_blocks(blocks, stored)
    assert stored.abs().max() == 127
    found = dequantize_blocks(stored, torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(dequantize_blocks(stored, dtype).double(), found)
    ratio = (found * blocks).sum() / blocks.square().sum()
    assert (found - ratio * blocks).norm() < 0.02 * found.norm()
    assert torch.allclose(invert_blocks(stored) @ found, torch.eye(32, dtype=torch.float64))


def test_int8_fits_blocks_whose_tokens_it_hardly_changes():
    blocks = torch.randn(2, 16, 16, dtype=torch.float64, generator=torch.manual_seed(0))
    orthogonal = torch.linalg.qr(blocks)[0]
    assert fits_int8(orthogonal)
    scales = torch.ones(16, dtype=torch.float64)
    scales[3] = 0.01
    assert not fits_int8(orthogonal * scales)  # of channels
    assert not fits_int8((orthogonal * scales) @ orthogonal.mT)  # of directions among them
    assert not fits_int8(orthogonal * torch.tensor([1.0, 0.01])[:, None, None])  # of blocks
    assert not fits_int8(torch.zeros_like(blocks))


@pytest.mark.parametrize("alternative", [torch.bfloat16, None])
def test_int8_gives_way_where_it_does_not_fit(alternative):
    sizes = torch.tensor([1.0, 1e12], dtype=torch.float64)
    sx = torch.eye(8, dtype=torch.float64) * sizes[:, None, None]
    layout = TransformLayout(8, 1, 1, "")
    stored = torch.empty((2, 8, 8), dtype=torch.int8)
    sw = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    blocks = compute_blocks(sx, sw, Rotation.BLOCK_HADAMARD, 1)
    found = store_transform(blocks, layout, stored, alternative).blocks
    assert found.dtype == (alternative or torch.int8)
