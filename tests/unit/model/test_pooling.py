import pytest
import torch
from torch.nn.functional import interpolate

from crosslmm.model.pooling import cell_weights, pool, pooled_grid


@pytest.mark.parametrize(("stride", "tokens"), [(27, 1), (9, 9), (7, 16), (2, 196), (1, 729)])
def test_tokens_per_frame_match_the_paper(stride, tokens):
    assert pooled_grid(27, stride) ** 2 == tokens
    assert pool(torch.randn(2, 729, 4), stride).shape == (2, tokens, 4)


@pytest.mark.parametrize(("grid", "stride"), [(27, 27), (27, 9), (27, 7), (27, 2), (16, 4), (16, 5), (6, 3)])
def test_every_patch_reaches_exactly_its_cell(grid, stride):
    patches = torch.eye(grid * grid)[:, :, None]  # one frame per patch, in which only this patch is not zero
    reached = pool(patches, stride)[:, :, 0] > 0
    row, column = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
    cell = row // stride * pooled_grid(grid, stride) + column // stride
    assert torch.equal(reached, torch.nn.functional.one_hot(cell, reached.shape[1]).bool())


@pytest.mark.parametrize(("grid", "stride"), [(27, 9), (27, 7), (16, 5)])
def test_cell_equals_an_antialiased_bilinear_resize_of_its_patches(grid, stride):
    frames = torch.randn(3, grid * grid, 5)
    image = frames.view(3, grid, grid, 5).permute(0, 3, 1, 2)
    cells = [
        interpolate(image[:, :, y : y + stride, x : x + stride], size=1, mode="bilinear", antialias=True)[..., 0, 0]
        for y in range(0, grid, stride)
        for x in range(0, grid, stride)
    ]
    torch.testing.assert_close(pool(frames, stride), torch.stack(cells, dim=1))


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize(("grid", "stride"), [(27, 9), (27, 7), (16, 5)])
def test_average_and_max_cover_the_patches_of_the_cell(grid, stride, mode):
    x = torch.randn(2, grid, grid, 3, generator=torch.manual_seed(0))
    merge = torch.amax if mode == "max" else torch.mean
    cells = [
        merge(x[:, i : i + stride, j : j + stride], dim=(1, 2))
        for i in range(0, grid, stride)
        for j in range(0, grid, stride)
    ]
    torch.testing.assert_close(pool(x.flatten(1, 2), stride, mode), torch.stack(cells, dim=1))


def test_constant_is_preserved_and_stride_one_is_the_identity():
    torch.testing.assert_close(pool(torch.full((1, 729, 2), 3.0), 7), torch.full((1, 16, 2), 3.0))
    frames = torch.randn(1, 36, 2)
    assert pool(frames, 1) is frames
    assert torch.equal(cell_weights(6, 1), torch.eye(6))
