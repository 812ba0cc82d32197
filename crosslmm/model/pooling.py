"""Token merge: a frame's g x g grid of patches becomes ceil(g/s) x ceil(g/s) tokens, without parameters."""

import torch
from torch import Tensor


def pooled_grid(grid: int, stride: int) -> int:
    """Cells along one side: ceil(grid / stride). The last cell is smaller where the stride does not divide."""
    return -(-grid // stride)


def cell_weights(grid: int, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """The bilinear weight of every patch in every cell along one side.

    Patch p belongs to cell p // stride and to no other. Within its cell it weighs as an antialiased bilinear
    resize of that cell to one pixel weighs it: a tent over the cell's centre, twice as wide as the cell.
    (One antialiased resize of the whole grid would leak: half of a border patch's weight goes next door.)

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
    """Merge each frame's patches into its cells.

    Args:
        x_FPD: (frames, g*g patches in rows, width), any float dtype.
        stride: s, patches along one side of a cell.
        mode: "bilinear" (see `cell_weights`), "average" or "max" of the cell's patches.

    Returns:
        (frames, ceil(g/s)^2, width) in the dtype of `x_FPD`.
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
    # With ceil_mode a last cell that is cut off counts only the patches that it has.
    merge = torch.nn.functional.avg_pool2d if mode == "average" else torch.nn.functional.max_pool2d
    return merge(x.permute(0, 3, 1, 2), stride, ceil_mode=True).flatten(2).transpose(1, 2)
