"""Each transform is what its name says, written otherwise; and all of them keep what must be kept."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from metaaug_fast.augment import PICTURES, SENTENCES, TRANSFORMS, VECTORS, Transform
from metaaug_fast.augment.transforms import find, transformed
from tests.building import python
from tests.exactness import rand, randn, relative_error

T, S, C, H, W = 2, 3, 2, 9, 7


def pictures(height=H, width=W):
    return rand(T, S, C, height, width)


def soft():
    return randn(T, S, 4).softmax(-1)


def applied(name, x, amount, rest=None, y=None, partner=None, **options):
    """One transform, the same amount for all samples."""
    transform = TRANSFORMS[name]
    drawn = transform.draw(x)
    drawn = drawn._replace(
        rest=drawn.rest if rest is None else rest, partner=drawn.partner if partner is None else partner
    )
    amount = torch.as_tensor(amount, dtype=x.dtype)
    amounts = amount.expand(T, S, *amount.shape)
    return transformed([transform], x, y, {name: amounts}, {name: drawn}, **options)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotations_by_quarters_permute_pixels(turns):
    x = pictures(8, 8)
    assert relative_error(applied("rotation", x, 90.0 * turns)[0], x.rot90(turns, (-2, -1))) < 1e-12


def test_rotations_do_not_stretch_a_picture_that_is_no_square():
    x = pictures(8, 4)
    got = applied("rotation", x, 90.0)[0]
    assert relative_error(got[..., 2:6, :], x[..., 2:6, :].rot90(1, (-2, -1))) < 1e-12


def test_translations_by_whole_pixels_move_right_and_down():
    x = pictures()
    got = applied("translation", x, [2 / W, 3 / H])[0]
    assert relative_error(got[..., 3:, 2:], x[..., :-3, :-2]) < 1e-12
    assert got[..., :3, :].abs().max() < 1e-12
    assert got[..., :2].abs().max() < 1e-12


@pytest.mark.parametrize(("padding", "edge"), [("border", 0), ("reflection", 1)])
def test_what_lies_outside(padding, edge):
    x = pictures()
    got = applied("translation", x, [2 / W, 0.0], padding=padding)[0]
    assert relative_error(got[..., 0], x[..., edge]) < 1e-12


def test_twice_as_large_shows_the_middle():
    x = F.interpolate(pictures(4, 4).flatten(0, 1), scale_factor=2, mode="nearest").unflatten(0, (T, S))
    got = applied("scale", x, 1.0)[0]
    grid = torch.stack(torch.meshgrid(*[(torch.arange(8).double() - 3.5) / 2 + 3.5] * 2, indexing="ij"))
    low, part = grid.floor().long(), grid - grid.floor()
    (top, left), (down, across) = low, part
    rows = [x[..., top + i, left + j] * abs(1 - i - down) * abs(1 - j - across) for i in (0, 1) for j in (0, 1)]
    assert relative_error(got, sum(rows)) < 1e-12


def test_a_shear_moves_rows_by_their_distance_from_the_middle():
    x = pictures(5, 9)
    got = applied("shear", x, [45.0, 0.0])[0]  # a row further is a pixel further
    for row in range(5):
        moved = abs(row - 2)
        ways = [torch.roll(x[..., row, :], way, -1)[..., moved : 9 - moved] for way in (row - 2, 2 - row)]
        assert min(relative_error(got[..., row, moved : 9 - moved], way) for way in ways) < 1e-12


@pytest.mark.parametrize(("place", "begin"), [(-1.0, 0), (1.0, 4)])
def test_a_crop_is_a_part_of_the_picture_as_large_as_the_whole(place, begin):
    x = pictures(8, 8)
    got = applied("crop", x, 0.5, rest=torch.full((T, S, 2), place).double(), padding="border")[0]
    part = x[..., begin : begin + 4, begin : begin + 4].flatten(0, 1)
    expected = F.interpolate(part, scale_factor=2, mode="bilinear").unflatten(0, (T, S))
    assert relative_error(got[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]) < 1e-12


def test_an_elastic_warp_of_one_displacement_is_a_translation():
    x, field = pictures(), torch.ones(T, S, 2, 5, 5).double()
    got = applied("elastic", x, 0.25, rest=field)[0]
    assert relative_error(got, applied("translation", x, [-0.25, -0.25])[0]) < 1e-12


def test_moves_follow_each_other_as_they_are_named():
    x, names = pictures(8, 8), ["translation", "rotation"]
    amounts = {
        "translation": torch.tensor([0.25, 0.0]).double().expand(T, S, 2),
        "rotation": torch.full((T, S), 90.0).double(),
    }
    moves = find(names)
    drawn = {each.name: each.draw(x) for each in moves}
    one_by_one = applied("rotation", applied("translation", x, [0.25, 0.0])[0], 90.0)[0]
    assert relative_error(transformed(moves, x, None, amounts, drawn)[0], one_by_one) < 1e-12


def test_flips():
    x = pictures()
    assert torch.equal(applied("horizontal_flip", x, 1.0)[0], x.flip(-1))
    assert torch.equal(applied("vertical_flip", x, 1.0)[0], x.flip(-2))


def test_brightness_contrast_and_noise_are_cut_to_the_range():
    x, noise = pictures(), randn(T, S, C, H, W)
    mean = x.flatten(2).mean(-1)[..., None, None, None]
    assert torch.equal(applied("brightness", x, 0.3)[0], (x + 0.3).clamp(0, 1))
    assert relative_error(applied("contrast", x, 0.7)[0], (mean + 1.7 * (x - mean)).clamp(0, 1)) < 1e-12
    assert torch.equal(applied("noise", x, 0.3, rest=noise)[0], (x + 0.3 * noise).clamp(0, 1))
    wide = 3 * randn(T, S, C, H, W)
    low, high = wide.amin((2, 3, 4), keepdim=True), wide.amax((2, 3, 4), keepdim=True)
    assert torch.equal(applied("brightness", wide, 0.3)[0], (wide + 0.3).clamp(low, high))


def test_a_blur_is_a_gaussian():
    size, deviation = 21, 0.05 * 21
    x = torch.zeros(T, S, C, size, size).double()
    x[..., 10, 10] = 1
    got = applied("blur", x, 0.05)[0]
    distance = torch.arange(-3, 4).double()
    line = (-(distance**2) / (2 * (deviation + 0.05) ** 2)).exp()
    middle = got[..., 7:14, 7:14] / got[..., 10:11, 10:11]
    assert relative_error(middle, (line[:, None] * line).expand_as(middle)) < 1e-12
    assert relative_error(got.sum((-2, -1)), torch.ones(T, S, C).double()) < 1e-12


def test_a_cut_out_is_a_square_of_the_mean():
    x = pictures(8, 8)
    got = applied("cutout", x, 0.5, rest=torch.full((T, S, 2), 0.5).double())[0]
    expected = x.clone()
    expected[..., 2:6, 2:6] = x.mean((-2, -1), keepdim=True)
    assert relative_error(got, expected) < 1e-12


def test_mixing_two_samples_mixes_their_targets():
    x, y, partner = pictures(8, 8), soft(), torch.rand(T, S).argsort(-1)
    other_x = torch.stack([one[order] for one, order in zip(x, partner, strict=True)])
    other_y = torch.stack([one[order] for one, order in zip(y, partner, strict=True)])
    got_x, got_y = applied("mixup", x, 0.3, y=y, partner=partner)
    assert relative_error(got_x, 0.7 * x + 0.3 * other_x) < 1e-12
    assert relative_error(got_y, 0.7 * y + 0.3 * other_y) < 1e-12
    # A box at the corner: a quarter of it is in the picture.
    got_x, got_y = applied("cutmix", x, 0.5, rest=torch.zeros(T, S, 2).double(), y=y, partner=partner)
    expected = x.clone()
    expected[..., :2, :2] = other_x[..., :2, :2]
    assert relative_error(got_x, expected) < 1e-12
    assert relative_error(got_y, y + (other_y - y) / 16) < 1e-12


def test_vectors():
    x, noise, chance = randn(T, S, 50), randn(T, S, 50), rand(T, S, 50)
    assert torch.equal(applied("noise", x, 2.0, rest=noise)[0], x + 2 * noise)
    assert relative_error(applied("scaling", x, -0.25)[0], 0.75 * x) < 1e-12
    got = applied("dropout", x, 0.5, rest=chance)[0]
    assert torch.equal(got[chance > 0.5], x[chance > 0.5])
    assert not got[chance < 0.3].any()
    between = (chance > 0.31) & (chance < 0.49)
    assert ((got / x)[between] > 0).all()
    assert ((got / x)[between] < 1).all()


def sentences(length=6):
    """Embedded tokens, the last of each sentence being padding."""
    x = randn(T, S, length, 3)
    x[:, :, -1] = 0
    return x


def samples_of(name):
    return pictures() if name in PICTURES else randn(T, S, 5) if name in VECTORS else sentences()


def test_tokens_are_dropped_whole():
    x, chance = sentences(), rand(T, S, 7)
    got = applied("token_dropout", x, 0.5, rest=chance)[0]
    chance = chance[..., 1:]
    assert torch.equal(got[chance > 0.5], x[chance > 0.5])
    assert not got[chance < 0.3].any()
    assert relative_error(got, x * (1 + (chance - 0.5) / 0.2).clamp(0, 1).unsqueeze(-1)) < 1e-12


@pytest.mark.parametrize("length", [2, 5, 6])
@pytest.mark.parametrize("odd", [False, True])
def test_neighbours_change_places_but_not_with_padding(length, odd):
    x, chance = sentences(length), rand(T, S, length + 1)
    chance[..., -1] = 0.75 if odd else 0.25
    got = applied("token_swap", x, 0.5, rest=chance)[0]
    for place, sentence, numbers in zip(got.flatten(0, 1), x.flatten(0, 1), chance.flatten(0, 1), strict=True):
        expected = sentence.clone()
        for left in range(int(odd), length - 2, 2):  # the last one is padding
            far = min(1.0, max(0.0, (0.5 - float(numbers[left])) / 0.2))
            expected[left] = (1 - far) * sentence[left] + far * sentence[left + 1]
            expected[left + 1] = (1 - far) * sentence[left + 1] + far * sentence[left]
        assert relative_error(place, expected) < 1e-12


@pytest.mark.parametrize("name", TRANSFORMS)
def test_nothing_happens_at_0(name):
    x = samples_of(name)
    y = soft()
    amount = torch.zeros(TRANSFORMS[name].numbers if TRANSFORMS[name].numbers > 1 else ())
    got_x, got_y = applied(name, x, amount, y=y)
    assert relative_error(got_x, x) < 1e-13
    assert torch.equal(got_y, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_kept(name, dtype):
    transform = TRANSFORMS[name]
    x = samples_of(name).to(dtype)
    unchanged = 0
    for _ in range(10):  # each sample may be drawn for its own partner
        drawn = transform.draw(x)
        amount = transform.largest * (torch.ones(T, S, dtype=dtype) if drawn.number is None else drawn.number)
        got, labels = transformed([transform], x, soft().to(dtype), {name: amount}, {name: drawn})
        assert (got.shape, got.dtype, got.device, labels.dtype) == (x.shape, dtype, x.device, dtype)
        assert (labels.sum(-1) - 1).abs().max() < 1e-6
        if name in PICTURES:
            assert 0 <= got.min() <= got.max() <= 1
        unchanged += torch.equal(got, x)
    assert unchanged < 8


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_are_those_of_finite_differences(name):
    transform = TRANSFORMS[name]
    x = 0.2 + 0.6 * pictures() if name in PICTURES else samples_of(name)
    x[x == 0] = 1  # padding has no neighbourhood
    drawn, y = transform.draw(x), soft()
    share = 0.2 + 0.3 * rand(*(drawn.choice if drawn.number is None else drawn.number).shape)

    def computed(x, y, share):
        return transformed([transform], x, y, {name: transform.largest * share}, {name: drawn})

    inputs = [each.requires_grad_() for each in (x, y, share)]
    assert torch.autograd.gradcheck(computed, inputs, eps=1e-7, atol=1e-4, rtol=1e-3)


def test_same_seed_same_bits():
    x = pictures()
    for name in PICTURES:
        one, same, other = (TRANSFORMS[name].draw(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        for first, second, third in zip(one, same, other, strict=True):
            assert (first is None) == (second is None)
            assert first is None or torch.equal(first, second)
            assert first is None or first.dtype == torch.int64 or not torch.equal(first, third)


def test_the_tables_name_all():
    assert set(PICTURES) | set(VECTORS) | set(SENTENCES) == set(TRANSFORMS)
    assert set(PICTURES) & set(VECTORS) == set(PICTURES) & set(SENTENCES) == set(VECTORS) & set(SENTENCES)
    assert set(VECTORS) & set(SENTENCES) == {"noise", "mixup"}


def test_one_of_ones_own_is_an_entry():
    gamma = Transform("gamma", "values", lambda x, amount, rest: x ** (1 + amount.view(-1, 1, 1, 1)), 0.5, signed=True)
    x = pictures()
    assert find([gamma, "noise"])[0] is gamma
    got, _ = transformed([gamma], x, None, {"gamma": torch.ones(T, S).double()}, {"gamma": gamma.draw(x)})
    assert relative_error(got, x**2) < 1e-12


def test_wrong_ones():
    flip = TRANSFORMS["horizontal_flip"]
    for options, message in [
        ({"name": "a b"}, "name must be a word"),
        ({"acts": "grid"}, "acts must be one of affine, shift, values, mix"),
        ({"of": "sounds"}, "of must be one of pictures, vectors, sentences, any"),
        ({"largest": -1.0}, "largest must be >= 0"),
        ({"numbers": -1}, "numbers must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(flip, **options)


def test_kornia_is_imported_only_where_it_is_used_and_missed_with_a_way_out():
    python("""
        import sys
        import metaaug_fast as mf
        assert "kornia" not in sys.modules
        mf.augment.AugmentationPolicy(mf.augment.VECTORS)
        assert "kornia" not in sys.modules
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "kornia" else find_spec(name)
        mf.augment.AugmentationPolicy(mf.augment.VECTORS)
        try:
            mf.augment.AugmentationPolicy(["blur"])
        except ModuleNotFoundError as error:
            assert "pip install 'metaaug_fast[augment]'" in str(error)
        else:
            raise AssertionError
        """)
