"""Differentiable transforms of pictures and vectors, of all samples of all tasks in one call.

How far a transform goes is an amount in its own unit, one for each sample; 0 leaves a sample as it is, to rounding, and
the result is differentiable in samples, targets and amounts. A new transform is an entry of `TRANSFORMS`.

What moves pixels costs one resampling together: matrices are multiplied, displacements added (in the order given,
before all other transforms). Then come those of values, then those that mix a sample with another one of its task.
Matrices of rotation and shear and the Gaussian blur are kornia's, which is imported where one of these is used.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..checks import check_choice, check_count, check_number
from ..installed import kornia

PADDINGS = ("zeros", "border", "reflection")

_SMALLEST_BLUR = 0.05
"""Pixels: kornia's blur needs a width > 0, and of this one all that rounds to more than 0 is the pixel itself."""
_RAMP = 0.2
"""How much of the amounts lies between what is dropped, or moved, and what stays, for a gradient to be there."""


class Drawn(NamedTuple):
    """The random numbers of one transform, for samples `[T, S]`.

    choice: `[T, S]`, uniform in (0, 1), whether it is applied. number: `[T, S]` or `[T, S, n]`, which share of its
    strength; None for one that has none. rest: what else it needs, `[T, S, ...]`. partner: `[T, S]`, the sample of the
    same task with which it is mixed.
    """

    choice: Tensor
    number: Tensor | None = None
    rest: Tensor | None = None
    partner: Tensor | None = None


@dataclass(frozen=True)
class Transform:
    """One way to change samples.

    Args:
        name: in tables, and of its parameters.
        acts: "affine": `apply(amount, rest, size)` gives a matrix `[N, 2, 3]` from a pixel of the result to where it is
            read, in pixels from the centre. "shift": the same gives what is added to that, `[N, H, W, 2]`, in parts of
            half a picture. "values": `apply(x, amount, rest)` gives samples; pictures are then cut to 0..1, or to the
            range that they had. "mix": `apply(x, other, amount, rest)` gives samples and which share `[N]` of each is
            the other one's.
        apply: see `acts`; amount is `[N]`, or `[N, numbers]` where there are more.
        largest: the amount at strength 1, before a number in -1..1 or 0..1 is drawn for each sample.
        unit: of the amount, in tables.
        of: "pictures" `[T, S, C, H, W]`, "vectors" `[T, S, F]`, "sentences" of embedded tokens `[T, S, L, D]`, where
            padding is 0, or "any".
        signed: amounts go both ways.
        numbers: how many are drawn for a sample; 0: it is on or off, and has no strength.
        rest: from a shape `[T, S, ...]`, a source of tensors and a generator to whatever else it draws.

    >>> import dataclasses
    >>> wild = dataclasses.replace(TRANSFORMS["rotation"], largest=180.0)
    >>> wild.name, wild.unit
    ('rotation', '°')
    """

    name: str
    acts: str
    apply: Callable[..., Any]
    largest: float = 1.0
    unit: str = ""
    of: str = "pictures"
    signed: bool = False
    numbers: int = 1
    rest: Callable[[Sequence[int], Tensor, Generator | None], Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("acts", self.acts, ("affine", "shift", "values", "mix"))
        check_choice("of", self.of, ("pictures", "vectors", "sentences", "any"))
        check_count("numbers", self.numbers)
        check_number("largest", self.largest)
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name must be a word, as of a variable (got {self.name!r})")

    @property
    def has_strength(self) -> bool:
        """Whether it can go more or less far."""
        return self.numbers > 0

    def draw(self, x: Tensor, generator: Generator | None = None) -> Drawn:
        """The random numbers for samples `[T, S, ...]`, on their device and in their dtype."""
        tasks, samples = x.shape[:2]
        choice = _uniform((tasks, samples), x, generator)
        number = partner = None
        if self.numbers:
            shape = (tasks, samples) if self.numbers == 1 else (tasks, samples, self.numbers)
            number = _uniform(shape, x, generator)
            number = 2 * number - 1 if self.signed else number
        rest = None if self.rest is None else self.rest(x.shape, x, generator)
        if self.acts == "mix":
            partner = _uniform((tasks, samples), x, generator).argsort(-1)
        return Drawn(choice, number, rest, partner)


def transformed(
    transforms: Sequence[Transform],
    x: Tensor,
    y: Tensor | None,
    amounts: Mapping[str, Tensor],
    drawn: Mapping[str, Drawn],
    padding: str = "zeros",
) -> tuple[Tensor, Tensor | None]:
    """Samples and targets after all transforms.

    Args:
        x: `[T, S, ...]`.
        y: floating, `[T, S, ...]`, which those that mix change; or whatever, where none does.
        amounts: of each transform by name, `[T, S]` or `[T, S, numbers]`, in its unit.
        drawn: what each has drawn for `x`.
        padding: what lies outside of a picture: "zeros", its "border", or its "reflection".

    >>> x = torch.rand(2, 3, 1, 8, 8)
    >>> flip = TRANSFORMS["horizontal_flip"]
    >>> flipped, _ = transformed([flip], x, None, {flip.name: torch.ones(2, 3)}, {flip.name: flip.draw(x)})
    >>> torch.equal(flipped, x.flip(-1))
    True
    """
    check_choice("padding", padding, PADDINGS)
    tasks, samples = x.shape[:2]
    flat = x.flatten(0, 1)

    def of(transform: Transform) -> tuple[Tensor, Tensor | None]:
        rest = drawn[transform.name].rest
        return amounts[transform.name].flatten(0, 1), None if rest is None else rest.flatten(0, 1)

    bounds = _bounds(flat) if x.ndim == 5 else None
    moves = [each for each in transforms if each.acts in ("affine", "shift")]
    if moves:
        flat = _resampled(flat, [(each, *of(each)) for each in moves], padding)
    for each in transforms:
        if each.acts == "values":
            flat = each.apply(flat, *of(each))
            flat = flat if bounds is None else flat.clamp(*bounds)
    for each in transforms:
        if each.acts == "mix":
            partner = drawn[each.name].partner
            assert y is not None
            assert partner is not None
            first = torch.arange(0, tasks * samples, samples, device=x.device)[:, None]
            flat, share = each.apply(flat, flat[(partner + first).flatten()], *of(each))
            share = share.view(tasks, samples, *(1,) * (y.ndim - 2)).to(y.dtype)
            y = torch.lerp(y, y.gather(1, partner.view(share.shape).expand_as(y)), share.expand_as(y))
    return flat.unflatten(0, (tasks, samples)), y


def find(transforms: Iterable[str | Transform]) -> list[Transform]:
    """Transforms by their names, or as they are.

    Raises:
        TypeError: something else is among them.
        ValueError: there is none, a name is unknown or comes twice, or some are of pictures and some of vectors, say.

    >>> [each.name for each in find(["noise", "mixup"])]
    ['noise', 'mixup']
    >>> find(["rotate"])
    Traceback (most recent call last):
    ValueError: transforms must be among rotation, ..., token_swap (got 'rotate'; is it 'rotation'?)
    """
    if isinstance(transforms, (str, Transform)) or not isinstance(transforms, Iterable):
        raise TypeError(f"transforms must be a list of names or Transforms (got {transforms!r})")
    found = [_named(each) for each in transforms]
    if not found:
        raise ValueError("transforms must name at least one (got none)")
    names = [each.name for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"transforms must each be there once (got {twice[0]!r} {names.count(twice[0])} times)")
    kinds = {each.of: each.name for each in found if each.of != "any"}
    if len(kinds) > 1:
        got = " and ".join(f"{name!r} of {of}" for of, name in kinds.items())
        raise ValueError(f"transforms must be all of pictures, all of vectors or all of sentences (got {got})")
    if "pictures" in kinds:
        kornia()  # say now that it is missing
    return found


def check_samples_of(name: str, transforms: Sequence[Transform], x: Tensor) -> None:
    """Raise ValueError unless `x` is what the transforms are of, floating `[T, S, ...]`."""
    if not x.is_floating_point():
        way_out = {torch.uint8: f"; pictures: {name}.float() / 255"}.get(x.dtype, "")
        raise ValueError(f"{name} must be floating point to be transformed (got {x.dtype}{way_out})")
    for each in transforms:
        if each.of == "pictures" and (x.ndim != 5 or not x[0, 0].numel()):
            raise ValueError(f"{name} must be pictures [T, S, C, H, W] for {each.name} (got shape {tuple(x.shape)})")
        if each.of == "vectors" and x.ndim != 3:
            raise ValueError(f"{name} must be vectors [T, S, F] for {each.name} (got shape {tuple(x.shape)})")
        if each.of == "sentences" and x.ndim != 4:
            raise ValueError(
                f"{name} must be embedded tokens [T, S, L, D] for {each.name} (got shape {tuple(x.shape)})"
            )


def _named(each: object) -> Transform:
    if isinstance(each, Transform):
        return each
    if not isinstance(each, str):
        raise TypeError(f"transforms must be names or Transforms (got {each!r})")
    if each not in TRANSFORMS:
        near = difflib.get_close_matches(each.lower(), TRANSFORMS, n=1, cutoff=0.0)[0]
        raise ValueError(f"transforms must be among {', '.join(TRANSFORMS)} (got {each!r}; is it {near!r}?)")
    return TRANSFORMS[each]


def _bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where each picture stays: in 0..1, or in its own range where that is wider, as of one that was standardised."""
    low, high = x.flatten(1).aminmax(dim=1)
    return _each(low.clamp(max=0), x), _each(high.clamp(min=1), x)


def _uniform(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _normal(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _each(value: Tensor, x: Tensor) -> Tensor:
    """One number for each sample, as it goes with `x` `[N, ...]`."""
    return value.view(-1, *(1,) * (x.ndim - 1))


# --- where pixels are read ---------------------------------------------------------------------------------------


def _resampled(x: Tensor, moves: Sequence[tuple[Transform, Tensor, Tensor | None]], padding: str) -> Tensor:
    """Pictures `[N, C, H, W]` read at other places, all moves at once."""
    height, width = x.shape[2:]
    matrix = shift = None
    for transform, amount, rest in moves:
        found = transform.apply(amount, rest, (height, width))
        if transform.acts == "affine":
            matrix = found if matrix is None else _after(matrix, found)
        else:
            shift = found if shift is None else shift + found
    if matrix is None:
        matrix = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    # From pixels to the coordinates of `grid_sample`, which are -1..1 on either axis.
    to_units = matrix.new_tensor([[1, height / width, 2 / width], [width / height, 1, 2 / height]])
    grid = F.affine_grid(matrix * to_units, [len(x), 1, height, width], align_corners=False)
    return F.grid_sample(x, grid if shift is None else grid + shift, padding_mode=padding, align_corners=False)


def _after(first: Tensor, second: Tensor) -> Tensor:
    """One matrix `[N, 2, 3]` for two transforms: a pixel of the second is read where the first reads it."""
    linear = first[:, :, :2]
    return torch.cat([linear @ second[:, :, :2], linear @ second[:, :, 2:] + first[:, :, 2:]], 2)


def _matrix(zoom: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Matrices `[N, 2, 3]` of a zoom and a way, each `[N]`."""
    none = torch.zeros_like(zoom)
    return torch.stack([zoom, none, across, none, zoom, down], -1).view(-1, 2, 3)


def _rotation(degrees: Tensor, rest: None, size: tuple[int, int]) -> Tensor:
    """Counter-clockwise."""
    centre = degrees.new_zeros(len(degrees), 2)
    # What is read lies where the turn back leads.
    matrix: Tensor = kornia().geometry.transform.get_rotation_matrix2d(centre, -degrees, torch.ones_like(centre))
    return matrix


def _translation(parts: Tensor, rest: None, size: tuple[int, int]) -> Tensor:
    """To the right and down, in parts of the size."""
    across, down = parts.unbind(-1)
    return _matrix(torch.ones_like(across), -across * size[1], -down * size[0])


def _scale(parts: Tensor, rest: None, size: tuple[int, int]) -> Tensor:
    """1 + parts times as large."""
    none = torch.zeros_like(parts)
    return _matrix(1 / (1 + parts), none, none)


def _shear(degrees: Tensor, rest: None, size: tuple[int, int]) -> Tensor:
    """Along either axis."""
    across, down = torch.deg2rad(degrees).unbind(-1)
    centre = degrees.new_zeros(len(degrees), 2)
    matrix: Tensor = kornia().geometry.transform.get_shear_matrix2d(centre, across, down)
    return matrix[:, :2]


def _crop(parts: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
    """So much less of either side, as large as the whole; `place` in -1..1 says from where."""
    across, down = place.unbind(-1)
    return _matrix(1 - parts, across * parts * size[1] / 2, down * parts * size[0] / 2)


def _elastic(parts: Tensor, field: Tensor, size: tuple[int, int]) -> Tensor:
    """A smooth field of displacements, in parts of the size: bicubic between few random ones, which costs little."""
    smooth = F.interpolate(field, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return 2 * parts.view(-1, 1, 1, 1) * smooth


# --- values ------------------------------------------------------------------------------------------------------


def _horizontal_flip(x: Tensor, amount: Tensor, rest: None) -> Tensor:
    return torch.lerp(x, x.flip(-1), _each(amount, x))


def _vertical_flip(x: Tensor, amount: Tensor, rest: None) -> Tensor:
    return torch.lerp(x, x.flip(-2), _each(amount, x))


def _brightness(x: Tensor, amount: Tensor, rest: None) -> Tensor:
    return x + _each(amount, x)


def _contrast(x: Tensor, amount: Tensor, rest: None) -> Tensor:
    """1 + amount times as far from the picture's mean."""
    return x + _each(amount, x) * (x - x.mean((1, 2, 3), keepdim=True))


def _noise(x: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return x + _each(deviation, x) * noise


def _blur(x: Tensor, parts: Tensor, rest: None) -> Tensor:
    """A Gaussian, whose standard deviation is so much of the longer side."""
    longer = max(x.shape[2:])
    reach = math.ceil(2 * longer * TRANSFORMS["blur"].largest)
    width = (_SMALLEST_BLUR + longer * parts).unsqueeze(-1).expand(-1, 2)
    blurred: Tensor = kornia().filters.gaussian_blur2d(x, 2 * reach + 1, width, "replicate")
    return blurred


def _cutout(x: Tensor, side: Tensor, centre: Tensor) -> Tensor:
    """A square of the picture's mean."""
    return torch.lerp(x, x.mean((2, 3), keepdim=True), _box(side, centre, x))


def _scaling(x: Tensor, amount: Tensor, rest: None) -> Tensor:
    """All features times 1 + amount."""
    return x * (1 + _each(amount, x))


def _dropout(x: Tensor, share: Tensor, chance: Tensor) -> Tensor:
    """About this share of features becomes 0; a narrow ramp stands in for the step, which has no gradient."""
    return x * (1 + (chance - _each(share, x)) / _RAMP).clamp(0, 1)


def _token_dropout(x: Tensor, share: Tensor, chance: Tensor) -> Tensor:
    """About this share of tokens becomes padding."""
    return x * (1 + (chance[:, 1:] - share.unsqueeze(1)) / _RAMP).clamp(0, 1).unsqueeze(2)


def _token_swap(x: Tensor, share: Tensor, chance: Tensor) -> Tensor:
    """About this share of neighbours, first and second or second and third and so on, change places; padding stays."""
    length = x.shape[1]
    places = torch.arange(length, device=x.device)
    odd = (chance[:, -1:] > 0.5).long()  # where pairs begin
    other = odd + ((places - odd) ^ 1)
    alone = (places < odd) | (other >= length)
    other = other.where(~alone, places)
    swapped = x.gather(1, other.unsqueeze(2).expand_as(x))
    padding = (x == 0).all(2) | (swapped == 0).all(2)
    drawn = chance.gather(1, torch.minimum(places, other))
    how_far = ((share.unsqueeze(1) - drawn) / _RAMP).clamp(0, 1)
    return torch.lerp(x, swapped, how_far.masked_fill(alone | padding, 0).unsqueeze(2))


def _box(side: Tensor, centre: Tensor, x: Tensor) -> Tensor:
    """How much of each pixel a box covers, `[N, 1, H, W]`; sides in parts of the picture's, centres in 0..1."""

    def covered(size: int, middle: Tensor) -> Tensor:
        pixels = torch.arange(size, dtype=x.dtype, device=x.device)
        middle, half = (middle * size)[:, None], (side * size / 2)[:, None]
        return (torch.minimum(middle + half, pixels + 1) - torch.maximum(middle - half, pixels)).clamp(min=0)

    across, down = covered(x.shape[3], centre[:, 0]), covered(x.shape[2], centre[:, 1])
    return (down[:, :, None] * across[:, None, :]).unsqueeze(1)


# --- two samples -------------------------------------------------------------------------------------------------


def _mixup(x: Tensor, other: Tensor, share: Tensor, rest: None) -> tuple[Tensor, Tensor]:
    """Zhang, Cisse, Dauphin, Lopez-Paz 2018, arXiv 1710.09412."""
    return torch.lerp(x, other, _each(share, x)), share


def _cutmix(x: Tensor, other: Tensor, side: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, arXiv 1905.04899; the share is the area inside the picture."""
    box = _box(side, centre, x)
    return torch.lerp(x, other, box), box.mean((1, 2, 3))


def _place(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    return 2 * _uniform((*shape[:2], 2), like, generator) - 1


def _by_token(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    return _uniform((*shape[:2], shape[2] + 1), like, generator)


def _centre(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    return _uniform((*shape[:2], 2), like, generator)


def _field(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    return _normal((*shape[:2], 2, 5, 5), like, generator)


TRANSFORMS = {
    each.name: each
    for each in (
        Transform("rotation", "affine", _rotation, 90.0, "°", signed=True),
        Transform("translation", "affine", _translation, 0.5, "of the size", signed=True, numbers=2),
        Transform("scale", "affine", _scale, 0.5, "of the size", signed=True),
        Transform("shear", "affine", _shear, 30.0, "°", signed=True, numbers=2),
        Transform("crop", "affine", _crop, 0.5, "of the size", rest=_place),
        Transform("elastic", "shift", _elastic, 0.1, "of the size", rest=_field),
        Transform("horizontal_flip", "values", _horizontal_flip, numbers=0),
        Transform("vertical_flip", "values", _vertical_flip, numbers=0),
        Transform("brightness", "values", _brightness, 0.5, signed=True),
        Transform("contrast", "values", _contrast, 0.9, signed=True),
        Transform("blur", "values", _blur, 0.05, "of the size"),
        Transform("noise", "values", _noise, 0.5, of="any", rest=_normal),
        Transform("cutout", "values", _cutout, 0.75, "of the size", rest=_centre),
        Transform("mixup", "mix", _mixup, 0.5, "of the other", of="any"),
        Transform("cutmix", "mix", _cutmix, 0.7, "of the size", rest=_centre),
        Transform("scaling", "values", _scaling, 0.5, signed=True, of="vectors"),
        Transform("dropout", "values", _dropout, 0.5, "of the features", of="vectors", rest=_uniform),
        Transform("token_dropout", "values", _token_dropout, 0.5, "of the tokens", of="sentences", rest=_by_token),
        Transform("token_swap", "values", _token_swap, 0.5, "of the pairs", of="sentences", rest=_by_token),
    )
}
"""All by name: what `AugmentationPolicy` and its table call them."""

PICTURES, VECTORS, SENTENCES = (
    tuple(name for name, each in TRANSFORMS.items() if each.of in (kind, "any"))
    for kind in ("pictures", "vectors", "sentences")
)
"""The names of those of pictures, of vectors and of sentences."""
