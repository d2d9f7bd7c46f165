"""`metaaug-fast explain`: what of a model is fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..inspect.explanation import explain
from ..runs.build import make_model
from ..runs.config import Part
from ..runs.fields import parameters_of
from ..runs.registry import MODELS, find_model
from . import options as kind
from .options import Parser, add_machine_options, use_machine


def run(arguments: Sequence[str]) -> int:
    """Print the table of a model's ops."""
    parser = Parser(prog="metaaug-fast explain", description="Which of a model's ops are fused, and why.")
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS.names())}, or module:attribute")
    parser.add_argument("--shape", type=kind.shape, help="of a sample: 3,84,84 (the model's default, else 1,28,28)")
    parser.add_argument("--ways", type=kind.count, default=5, help="outputs (5)")
    parser.add_argument("--samples", type=kind.count, default=25, help="of a task, which matters on a GPU (25)")
    parser.add_argument("--adapt", action="append", metavar="NAME", help="what adapts, such as 'head.*' (everything)")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    use_machine(options)
    call = find_model(options.model)
    takes: Any = {} if isinstance(call, nn.Module) else parameters_of(call)
    default = getattr(takes.get("sample_shape"), "default", (1, 28, 28))
    shape = options.shape or (default if isinstance(default, tuple) else (1, 28, 28))
    fields = {name: value for name, value in (("ways", options.ways), ("sample_shape", shape)) if name in takes}
    model = make_model(Part(options.model, fields)).to(options.device)
    example = torch.randn(options.samples, *shape, device=options.device)
    print(explain(model, example, options.adapt))
    return 0
