"""Merging of tokens, without parameters: a frame's g x g patches become ceil(g/s) x ceil(g/s) pooled tokens.

Axis suffixes: F frame, P patch, D width.
"""

import torch
from torch import Tensor


def pooled_grid(grid: int, stride: int) -> int:
    """Return the number of cells along one side, ceil(grid / stride). The last one may be smaller than `stride`."""
    return -(-grid // stride)


def cell_weights(grid: int, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the bilinear weight of every patch in every cell along one side.

    Patch p belongs to cell p // stride only. Its weight there is that of an antialiased bilinear resize of the cell to
    one pixel: a tent centred on the cell and twice as wide. (One antialiased resize of the full grid would leak half of
    a border patch's weight into the next cell.)

    Returns:
        float32 (ceil(grid/stride), grid); every row sums to one.
    """
    patch = torch.arange(grid, device=device)
    cell = patch // stride
    size = (grid - cell * stride).clamp(max=stride)
    centre = cell * stride + (size - 1) / 2
    tent = 1 - (patch - centre).abs() / size
    weights = torch.zeros(pooled_grid(grid, stride), grid, device=device)
    weights[cell, patch] = tent
    return weights / weights.sum(dim=1, keepdim=True)


def pool(x_FPD: Tensor, stride: int, mode: str = "bilinear") -> Tensor:
    """Merge the patches of each cell of a frame into one token.

    Args:
        x_FPD: (F, g*g, D), patches in row-major order, any float dtype.
        stride: patches along one side of a cell (s).
        mode: "bilinear" (see `cell_weights`), "average" or "max" of the cell's patches.

    Returns:
        (F, ceil(g/s)^2, D) in the dtype of `x_FPD`.
    """
    if stride == 1:
        return x_FPD
    grid = round(x_FPD.shape[1] ** 0.5)
    x = x_FPD.unflatten(1, (grid, grid))
    if mode == "bilinear":
        weights = cell_weights(grid, stride, x_FPD.device).to(x_FPD.dtype)
        # Columns, then rows: two small products instead of one over all pairs of patch and cell.
        x = torch.einsum("fhwd,vw->fhvd", x, weights)
        return torch.einsum("fhvd,uh->fuvd", x, weights).flatten(1, 2)
    # With ceil_mode, a smaller last cell is averaged over the patches that it has.
    merge = torch.nn.functional.avg_pool2d if mode == "average" else torch.nn.functional.max_pool2d
    return merge(x.permute(0, 3, 1, 2), stride, ceil_mode=True).flatten(2).transpose(1, 2)
