"""Folders of pictures in every format, divided or not, and what is wrong in them: a sentence, or a warning."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_fast.data import Episodes, Folder
from metaaug_fast.runs import configure
from metaaug_fast.runs.build import make_sources


def save(path, pixels, **options):
    """A picture of an array `[H, W]`, `[H, W, C]`, or of an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def grey(rng, height=5, width=7):
    return rng.integers(0, 256, (height, width), dtype=np.uint8)


def colour(rng, height=5, width=7):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(rng, tmp_path):
    """Classes c00 .. c24 of 3 grey pictures, 28 by 28, as MNIST has them; what they hold is in `root.pictures`."""
    for index in range(25):
        for number in range(3):
            save(tmp_path / "root" / f"c{index:02}" / f"{number}.png", grey(rng, 28, 28))
    return tmp_path / "root"


def pixels_of(path):
    return np.asarray(Image.open(path))


def test_every_picture_is_in_its_class(root):
    data = Folder(root, "all")
    assert data.names == tuple(f"c{index:02}" for index in range(25))
    assert data.samples.dtype == torch.uint8
    assert data.sample_shape == (1, 28, 28)
    for index, name in enumerate(data.names):
        expected = [pixels_of(root / name / f"{number}.png") for number in range(3)]
        assert (data.class_samples(index)[:, 0].numpy() == np.stack(expected)).all()


def test_parts_are_seeded_and_disjoint(root, rng):
    seed = int(rng.integers(2**30))
    parts = {split: Folder(root, split, seed=seed) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [16, 4, 5]
    assert sorted(name for part in parts.values() for name in part.names) == [f"c{index:02}" for index in range(25)]
    assert Folder(root, "train", seed=seed).names == parts["train"].names
    assert Folder(root, "train", seed=seed + 1).names != parts["train"].names
    for part in parts.values():
        assert len(pickle.dumps(part)) < 10_000  # mapped: another process has the file
        for index, name in enumerate(part.names):
            assert (part.class_samples(index)[1, 0].numpy() == pixels_of(root / name / "1.png")).all()


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_a_divided_folder(root, validation):
    whole = Folder(root, "all")
    divided = root.parent / "divided"
    for index, name in enumerate(whole.names):
        part = ("train", validation, "test")[index % 3]
        (divided / part).mkdir(parents=True, exist_ok=True)
        (root / name).rename(divided / part / name)
    for number, split in enumerate(("train", "validation", "test")):
        part = Folder(divided, split)
        assert part.names == whole.names[number::3]
        assert (part.class_samples(2) == whole.class_samples(number + 6)).all()
    assert sorted(Folder(divided, "all").names) == list(whole.names)


def test_a_divided_folder_that_lacks_a_part(root):
    for part in ("train", "test"):
        (root / part).mkdir()
    for index in range(25):
        (root / f"c{index:02}").rename(root / ("train" if index % 2 else "test") / f"c{index:02}")
    assert len(Folder(root, "train")) == 12
    with pytest.raises(ValueError, match="must have a folder validation or val, as it has train and test"):
        Folder(root, "validation")


def test_classes_may_be_called_train_and_test(root):
    (root / "c00").rename(root / "train")
    (root / "c01").rename(root / "test")
    assert {"train", "test", "c02"} < set(Folder(root, "all").names)


def test_classes_of_one_name_in_two_parts_are_counted(rng, tmp_path):
    for part, names in (("train", "abc"), ("val", "de"), ("test", "cf")):
        for name in names:
            for number in range(2):
                save(tmp_path / part / name / f"{number}.png", grey(rng))
    with pytest.warns(UserWarning, match="1 of 6 classes, such as 'c', are in more than one part"):
        assert Folder(tmp_path, "test").names == ("c", "f")


def test_two_folders_of_validation_classes(root):
    for name in ("val", "validation"):
        (root / name).mkdir()
    with pytest.raises(ValueError, match=r"must have one folder of validation classes \(got validation and val\)"):
        Folder(root)


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "gif", "webp"])
def test_formats_without_loss(rng, tmp_path, suffix):
    picture = grey(rng)
    options = {"lossless": True} if suffix == "webp" else {}
    for name in ("a", "b"):
        for number in range(2):
            save(tmp_path / name / f"{number}.{suffix}", picture, **options)
    data = Folder(tmp_path, "all")
    assert data.samples.shape == (4, 1, 5, 7)
    assert (data.samples[:, 0].numpy() == picture).all()


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg(rng, tmp_path, suffix):
    for name in ("a", "b"):
        for number in range(2):
            save(tmp_path / name / f"{number}.{suffix}", colour(rng), quality=95)
    data = Folder(tmp_path, "all")
    assert data.sample_shape == (3, 5, 7)
    assert (data.class_samples(1)[0].numpy() == pixels_of(tmp_path / f"b/0.{suffix}").transpose(2, 0, 1)).all()


def test_the_first_frame_of_a_gif(rng, tmp_path):
    frames = [grey(rng) for _ in range(3)]
    for name in ("a", "b"):
        for number in range(2):
            first, *others = map(Image.fromarray, frames)
            save(tmp_path / name / f"{number}.gif", first, save_all=True, append_images=others)
    assert (Folder(tmp_path, "all").samples[:, 0].numpy() == frames[0]).all()


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("coloured", [False, True])
def test_channels(rng, tmp_path, channels, coloured):
    pictures = [grey(rng), np.repeat(grey(rng)[..., None], 3, 2), colour(rng) if coloured else grey(rng), grey(rng)]
    for number, picture in enumerate(pictures):
        save(tmp_path / "ab"[number // 2] / f"{number}.png", picture)
    data = Folder(tmp_path, "all", channels=channels)
    depth = channels or (3 if coloured else 1)
    assert data.sample_shape == (depth, 5, 7)
    for picture, sample in zip(pictures, data.samples.numpy(), strict=True):
        expected = np.asarray(Image.fromarray(picture).convert("L" if depth == 1 else "RGB"))
        assert (sample.transpose(1, 2, 0).squeeze() == expected).all()


def fill(tmp_path, image, **options):
    """Two classes of two pictures, all the same."""
    for name in ("a", "b"):
        for number in range(2):
            save(tmp_path / name / f"{number}.png", image, **options)
    return Folder(tmp_path, "all").samples.numpy()[3]


def test_palettes(rng, tmp_path):
    image = Image.fromarray(colour(rng)).quantize(9)
    assert (fill(tmp_path, image) == np.asarray(image.convert("RGB")).transpose(2, 0, 1)).all()


def test_a_bit_a_pixel(rng, tmp_path):
    bits = rng.random((5, 7)) < 0.5
    assert (fill(tmp_path, Image.fromarray(bits).convert("1")) == bits[None] * 255).all()


def test_sixteen_bits_are_reduced(rng, tmp_path):
    pixels = rng.integers(0, 2**16, (5, 7), dtype=np.uint16)
    assert (fill(tmp_path, pixels) == pixels >> 8).all()


def test_what_is_transparent_lies_on_white(rng, tmp_path):
    pixels = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    sample = fill(tmp_path, pixels).transpose(1, 2, 0)
    assert (sample[0] == 255).all()
    assert (sample[1] == pixels[1, :, :3]).all()
    share = pixels[..., 3:] / 255
    assert np.abs(sample - (share * pixels[..., :3] + (1 - share) * 255)).max() < 1.5


def test_pictures_are_turned_as_the_camera_says(rng, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is on the right
    pixels = grey(rng)
    assert (fill(tmp_path, pixels, exif=exif)[0] == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize(("side", "method"), [(20, "BILINEAR"), (11, "BILINEAR"), (10, "BOX"), (64, "BILINEAR")])
def test_pictures_of_many_sizes_are_unified(rng, tmp_path, side, method):
    pictures = [grey(rng, *extent) for extent in ((20, 20), (20, 20), (20, 23), (26, 20))]
    for number, picture in enumerate(pictures):
        save(tmp_path / "ab"[number // 2] / f"{number}.png", picture)
    message = rf"2 of 4 pictures are no squares and are squeezed into {side} x {side} pixels \(the first had 23 x 20\)"
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match=message):
            data = Folder(tmp_path, "all", size=side)
    assert data.sample_shape == (1, side, side)
    for picture, sample in zip(pictures, data.samples.numpy(), strict=True):
        resized = Image.fromarray(picture).resize((side, side), Image.Resampling[method])
        assert (sample[0] == np.asarray(resized)).all()


def test_many_sizes_need_one(rng, tmp_path, root):
    save(root / "c03/0.png", grey(rng, 9, 30))
    message = r"one size unless .*c00.0\.png with 28 x 28 and .*c03.0\.png with 30 x 9 pixels\); give size=N$"
    with pytest.raises(ValueError, match=message):
        Folder(root)


def test_what_is_no_picture_is_ignored(root, rng):
    before = Folder(root, "all")
    (root / "readme.txt").write_text("about")
    (root / "c00" / "Thumbs.db").write_bytes(b"\0")
    (root / "c00" / "._0.png").write_bytes(b"\0")
    (root / "c00" / "more.png").mkdir()
    save(root / ".hidden" / "0.png", grey(rng))
    save(root / "loose.png", grey(rng))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = Folder(root, "all")
    assert after.names == before.names
    assert (after.samples == before.samples).all()


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def bomb(path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def another_format(path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(file, "TIFF")
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize("damage", [truncated, bomb, another_format, lambda path: path.write_bytes(b"")])
def test_a_damaged_picture(root, damage):
    damage(root / "c07/1.png")
    with pytest.raises(ValueError, match=r'c07.1\.png cannot be read \(.+\); replace or delete it, or give damaged="s'):
        Folder(root)
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match=r"1 of 75 pictures are skipped; the first: .*c07.1\.png cannot") as caught:
            data = Folder(root, "all", damaged="skip")
        assert len(caught) == 1
    assert data.counts.sum(1).tolist() == [2 if name == "c07" else 3 for name in data.names]
    assert (data.class_samples(7)[1, 0].numpy() == pixels_of(root / "c07/2.png")).all()


@pytest.mark.parametrize("damaged", ["refuse", "skip"])
def test_a_class_needs_two_pictures(root, damaged):
    (root / "c05/0.png").unlink()
    if damaged == "skip":
        truncated(root / "c05/2.png")
    else:
        (root / "c05/2.png").unlink()
    with pytest.raises(ValueError, match=r"must have two pictures .* \(got 1 of 'c05'\); add some, or remove its fold"):
        Folder(root, damaged=damaged)
    (root / "c05/1.png").unlink()
    with pytest.raises(ValueError, match=r"\(got 0 of 'c05'\)"):
        Folder(root, damaged=damaged)


def test_folders_of_nothing(tmp_path, rng):
    with pytest.raises(FileNotFoundError, match="nowhere is missing; root must be a folder with a folder for each"):
        Folder(tmp_path / "nowhere")
    save(tmp_path / "x.png", grey(rng))
    with pytest.raises(NotADirectoryError, match=r"x\.png is no folder"):
        Folder(tmp_path / "x.png")
    for _ in range(2):  # no folder, then one without pictures
        with pytest.raises(
            ValueError, match=r"must hold <class>/<picture>\.png\|.*\(got no picture in a folder of its"
        ):
            Folder(tmp_path)
        (tmp_path / "a").mkdir(exist_ok=True)
    save(tmp_path / "a" / "0.png", grey(rng))
    with pytest.raises(ValueError, match=r"must have a folder for each of two classes or more \(got 'a'\)"):
        Folder(tmp_path)


def test_too_few_classes_to_divide(tmp_path, rng):
    fill(tmp_path, grey(rng))
    with pytest.raises(ValueError, match=r"of 2, divided 64 : 16 : 20, none is for test \(got 'test'\)"):
        Folder(tmp_path, "test")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"split": "dev"}, ValueError, "split must be one of train, validation, test, all"),
        ({"size": 0}, ValueError, "size must be >= 1"),
        ({"size": 2.5}, TypeError, "size must be an integer"),
        ({"damaged": "ignore"}, ValueError, "damaged must be one of refuse, skip"),
        ({"channels": 4}, ValueError, r"channels must be 1, 3 or None \(got 4\)"),
        ({"seed": "x"}, TypeError, "seed must be an integer"),
    ],
)
def test_arguments(root, given, error, message):
    with pytest.raises(error, match=message):
        Folder(root, **given)


def test_a_cache_without_its_pictures_is_made_again(root, tmp_path):
    cache = tmp_path / "cache"
    before = Folder(root, "all", cache_dir=cache).samples.clone()
    (file,) = cache.glob("*.npy")
    for damage in (lambda: file.unlink(), lambda: file.write_bytes(file.read_bytes()[:-1])):
        damage()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert Folder(root, "all", cache_dir=cache).samples.equal(before)
        assert [f"{file} is no whole array" in str(each.message) for each in caught] == [True] * len(caught)
    assert len(caught) == 1


def test_without_a_cache_pictures_are_in_memory(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="Not a directory.*; samples are held in memory"):
        data = Folder(root, "all", cache_dir=tmp_path / "file" / "below")
    assert data.samples.equal(Folder(root, "all").samples)


@pytest.mark.parametrize("place", [0, 40, 74])
def test_one_picture_in_colour_makes_all_so(root, rng, place):
    pixels = colour(rng, 28, 28)
    save(root / f"c{place // 3:02}/{place % 3}.png", pixels)
    data = Folder(root, "all")
    assert data.sample_shape == (3, 28, 28)
    assert (data.samples[place].numpy() == pixels.transpose(2, 0, 1)).all()
    other = (place + 1) % 75
    grey_one = pixels_of(root / f"c{other // 3:02}/{other % 3}.png")
    assert (data.samples[other].numpy() == np.broadcast_to(grey_one, (3, 28, 28))).all()


def test_a_changed_picture_is_read_again(root, rng, tmp_path):
    cache = tmp_path / "cache"
    Folder(root, "all", cache_dir=cache)
    Folder(root, "test", cache_dir=cache)
    assert sorted(path.suffix for path in cache.iterdir()) == [".npy", ".npz"]
    save(root / "c01/0.png", picture := grey(rng, 28, 28))
    assert (Folder(root, "all", cache_dir=cache).class_samples(1)[0, 0].numpy() == picture).all()


def test_a_run_reads_it(root):
    config = configure(
        {"learner": {"name": "protonet"}, "data": {"name": "folder"}},
        ["--root", str(root), "--size=14", "--channels=3"],
    )
    sources = make_sources(config.data)
    assert [(len(part), part.sample_shape) for part in sources.values()] == [(n, (3, 14, 14)) for n in (16, 4, 5)]
    assert Episodes(sources["test"], queries=2, tasks=3).batch(0).query_x.shape == (3, 10, 3, 14, 14)
