"""How far `torch.func.vmap` is off in second order through torch's norms (pytorch/functorch#534), in float64.

python benchmarks/vmap_norms.py                 # relative error of one MAML meta-gradient, a row a norm
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

NORMS = {
    "batch norm": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "layer norm": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    "instance norm": lambda x, w, b: F.instance_norm(x, None, None, w, b),
    "group norm": lambda x, w, b: F.group_norm(x, 2, w, b),
}


def main() -> None:
    """Print the table: a two-layer convolutional net, 3 tasks, one inner step."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    tasks, samples, width, rate = 3, 6, 4, 0.4
    theta = {"linear": torch.randn(width**3, 3) / 8}
    for layer, inputs in (("first", 1), ("second", width)):
        theta[f"{layer} weight"] = torch.randn(width, inputs, 3, 3) / (3 * inputs**0.5)
        theta[f"{layer} scale"], theta[f"{layer} shift"] = torch.rand(width) + 0.5, torch.randn(width)
    x, y = torch.randn(2, tasks, samples, 1, width, width), torch.randint(3, (2, tasks, samples))
    print(f"{'':16}relative error of vmap against plain autograd")
    for name, norm in NORMS.items():

        def loss(p: dict[str, Tensor], x: Tensor, y: Tensor, norm=norm) -> Tensor:
            for layer in ("first", "second"):
                x = F.conv2d(x, p[f"{layer} weight"], padding=1)
                x = F.softplus(norm(x, p[f"{layer} scale"], p[f"{layer} shift"]))
            return F.cross_entropy(x.flatten(1) @ p["linear"], y)

        def adapted(p: dict[str, Tensor], x: Tensor, y: Tensor, loss=loss) -> Tensor:
            inner = grad(loss)(p, x[0], y[0])
            return loss({key: p[key] - rate * inner[key] for key in p}, x[1], y[1])

        def mean_loss(p: dict[str, Tensor], adapted=adapted) -> Tensor:
            return vmap(adapted, (None, 1, 1))(p, x, y).mean()

        leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
        total = torch.zeros(())
        for task in range(tasks):
            inner = torch.autograd.grad(loss(leaves, x[0, task], y[0, task]), [*leaves.values()], create_graph=True)
            moved = {key: value - rate * each for (key, value), each in zip(leaves.items(), inner, strict=True)}
            total = total + loss(moved, x[1, task], y[1, task]) / tasks
        exact = torch.cat([each.flatten() for each in torch.autograd.grad(total, [*leaves.values()])])
        found = torch.cat([each.flatten() for each in grad(mean_loss)(theta).values()])
        print(f"{name:16}{float((found - exact).norm() / exact.norm()):.1e}")


if __name__ == "__main__":
    main()
