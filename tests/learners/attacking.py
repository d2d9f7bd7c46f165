"""An attack in plain autograd, for one task or one sample."""

import torch


def climbed(loss, x, radius, steps, step, low=-torch.inf, high=torch.inf, start=None):
    """What PGD makes of `x`: uphill by signs, element by element within the radius and the range."""
    moved = (x if start is None else torch.clamp(x + radius * start, low, high)).detach()
    for _ in range(steps):
        moved.requires_grad_()
        (slope,) = torch.autograd.grad(loss(moved), moved)
        moved = moved.detach() + step * torch.sign(slope)
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius)
        moved = torch.clamp(moved, low, high)
    return moved.detach()
