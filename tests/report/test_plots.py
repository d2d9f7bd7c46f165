import re
import subprocess
import sys

import matplotlib.image
import pytest
import torch

from metaaug_fast.augment import AugmentationPolicy
from metaaug_fast.report import plots
from metaaug_fast.runs.history import History, Point, ValidationPoint
from metaaug_fast.tasks import TaskBatch


def picture(path):
    """RGB pixels, 0 to 1."""
    return torch.from_numpy(matplotlib.image.imread(path)[..., :3].copy())


def of_color(pixels, name):
    color = torch.tensor([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (pixels - color).abs().amax(-1) < 0.02


def has_color(pixels, name):
    return bool(of_color(pixels, name).any())


def episode(ways=5, shots=2, queries=3, channels=1):
    """Two tasks of grey noise, which holds no colour of the frames."""
    support_x, query_x = (
        torch.rand(2, ways * each, 1, 28, 28).repeat(1, 1, channels, 1, 1) for each in (shots, queries)
    )
    support_y = torch.arange(ways).repeat_interleave(shots).repeat(2, 1)
    query_y = torch.arange(ways).repeat_interleave(queries).repeat(2, 1)
    return TaskBatch(support_x, support_y, query_x, query_y)


@pytest.mark.parametrize("channels", [1, 3])
def test_episode_marks_right_and_wrong(tmp_path, channels):
    tasks = episode(channels=channels)
    plots.plot_episode(tasks, tasks.query_y, tmp_path / "right.png")
    assert has_color(picture(tmp_path / "right.png"), plots.RIGHT)
    assert not has_color(picture(tmp_path / "right.png"), plots.WRONG)
    plots.plot_episode(tasks, (tasks.query_y + 1) % 5, tmp_path / "wrong.png")
    assert has_color(picture(tmp_path / "wrong.png"), plots.WRONG)
    assert not has_color(picture(tmp_path / "wrong.png"), plots.RIGHT)


def test_episode_reads_logits_of_the_chosen_task(tmp_path):
    tasks = episode()
    logits = torch.nn.functional.one_hot(tasks.query_y, 5).float()
    logits[0] = logits[0].roll(1, -1)
    plots.plot_episode(tasks, logits, tmp_path / "new folder" / "1.png", task=1)
    assert not has_color(picture(tmp_path / "new folder" / "1.png"), plots.WRONG)


def test_ink_is_dark_whichever_way_it_is_stored(tmp_path):
    light_on_dark = torch.zeros(1, 2, 1, 28, 28)
    light_on_dark[..., 10:14, 5:20] = 1
    y = torch.arange(2).repeat(1, 1)
    for name, images in (("a", light_on_dark), ("b", 1 - light_on_dark)):
        plots.plot_episode(TaskBatch(images, y, images, y), y, tmp_path / f"{name}.png")
    assert torch.equal(picture(tmp_path / "a.png"), picture(tmp_path / "b.png"))


def test_episode_refuses_what_it_cannot_draw(tmp_path):
    tasks = episode()
    with pytest.raises(ValueError, match=r"predictions must be \[T, 15\] \(got \(2, 14\)\)"):
        plots.plot_episode(tasks, tasks.query_y[:, 1:], tmp_path / "x.png")
    points = TaskBatch(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))
    with pytest.raises(ValueError, match=r"tasks must hold images"):
        plots.plot_episode(points, points.query_y, tmp_path / "x.png")


def test_learning_curve_shows_validation_where_there_is_one(tmp_path):
    training = [Point(step, 1 / step, 1 - 1 / step) for step in range(1, 50)]
    plots.plot_learning_curve(History(training), tmp_path / "plain.png", title="one")
    assert not has_color(picture(tmp_path / "plain.png"), plots.SECOND)
    validation = [ValidationPoint(step, 0.8, 0.02, 0.8) for step in (10, 20, 40)]
    plots.plot_learning_curve(History(training, validation), tmp_path / "both.png")
    assert has_color(picture(tmp_path / "both.png"), plots.SECOND)
    losses = [Point(point.step, point.loss) for point in training]
    plots.plot_learning_curve(History(losses, validation), tmp_path / "loss.png")
    assert has_color(picture(tmp_path / "loss.png"), plots.SECOND)


def test_losses_below_zero_are_drawn_too(tmp_path):
    """As those of densities are."""
    training = [Point(step, 1 / step - 0.5) for step in range(1, 50)]
    validation = [ValidationPoint(step, -0.4, 0.01, 0.4) for step in (10, 20, 40)]
    plots.plot_learning_curve(History(training, validation), tmp_path / "loss.png")
    columns = of_color(picture(tmp_path / "loss.png"), plots.SECOND).any(0).nonzero()
    assert columns.max() - columns.min() > 400  # of 960: not the legend alone


def test_sinusoids_before_and_after(tmp_path):
    x = torch.linspace(-5, 5, 80).reshape(1, -1, 1).repeat(4, 1, 1)
    tasks = TaskBatch(x[:, ::10], x[:, ::10].sin(), x, x.sin())
    plots.plot_sinusoid(tasks, {0: 0 * x, 1: 0.7 * x.sin(), 10: x.sin()}, tmp_path / "s.png")
    pixels = picture(tmp_path / "s.png")
    assert all(has_color(pixels, color) for color in (plots.MUTED, plots.SECOND, plots.ACCENT))


def test_curves_are_labelled_by_their_inner_steps(tmp_path):
    x = torch.linspace(-5, 5, 20).reshape(1, -1, 1)
    tasks, labels = TaskBatch(x[:, ::10], x[:, ::10].sin(), x, x.sin()), []
    for curves in ({0: x, 1: x, 3: x}, {None: x}):  # None: of a learner without an inner loop
        plots.plot_sinusoid(tasks, curves, tmp_path / "s.svg", panels=1)
        texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "s.svg").read_text())
        labels.append([text for text in texts if "adaptation" in text or "step" in text or "predict" in text])
    assert labels == [["before adaptation", "after 1 step", "after 3 steps"], ["prediction"]]


@pytest.mark.parametrize("last", [(), (1,)], ids=["[T, D, Q]", "[T, D, Q, 1]"])
def test_every_draw_is_a_curve(tmp_path, last):
    x = torch.linspace(-5, 5, 80).reshape(1, -1, 1).repeat(2, 1, 1)
    tasks = TaskBatch(x[:, ::40], x[:, ::40].sin(), x, x.sin())
    inks = []
    for draws in (1, 6):
        curves = torch.linspace(-1, 1, draws).view(1, -1, 1) * x.squeeze(-1).unsqueeze(1)
        plots.plot_draws(tasks, curves.reshape(2, draws, 80, *last), tmp_path / "draws.png", panels=1)
        pixels = picture(tmp_path / "draws.png")
        assert has_color(pixels, plots.SECOND)
        assert has_color(pixels, plots.INK)
        inks.append(float((pixels[..., 2] - pixels[..., 0] > 0.15).float().mean()))  # of the draws' blue
    assert inks[1] > 2 * inks[0]
    with pytest.raises(ValueError, match=r"curves must be \[2, draws, 80\] \(got \(2, 80\)\)"):
        plots.plot_draws(tasks, x.squeeze(-1), tmp_path / "x.png")


def test_pyplot_is_left_alone(tmp_path):
    script = f"""
import sys
from metaaug_fast.report.plots import plot_learning_curve
from metaaug_fast.runs.history import History, Point
plot_learning_curve(History([Point(1, 0.5), Point(2, 0.4)]), {str(tmp_path / "c.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_sheet_of_samples_has_a_block_for_each_kind(tmp_path):
    def colored(count, channel):
        pictures = torch.zeros(4, count, 3, 8, 8)
        pictures[:, :, channel] = 1
        return pictures

    plots.plot_samples({"real": colored(3, 0), "generated": colored(2, 2)}, tmp_path / "samples.png")
    pixels = picture(tmp_path / "samples.png")
    red, blue = ((pixels - torch.eye(3)[channel]).abs().amax(-1) < 0.02 for channel in (0, 2))
    columns = [each.any(0).nonzero()[:, 0] for each in (red, blue)]
    assert columns[0].max() < columns[1].min()
    assert 1.2 < red.sum() / blue.sum() < 1.8  # three pictures a class, and two


def test_a_number_stands_under_each_picture_of_its_kind(tmp_path):
    samples = {"own": torch.ones(2, 1, 1, 8, 8), "found": torch.ones(2, 2, 1, 8, 8)}
    texts = []
    for numbers in (None, {"found": torch.tensor([[0.25, 0.5], [0.75, 1.0]])}):
        plots.plot_samples(samples, tmp_path / "samples.svg", numbers)
        texts.append(re.findall(r"<!-- (.*?) -->", (tmp_path / "samples.svg").read_text()))
    assert texts == [["own", "found"], ["own", "0.25", "found", "0.50", "0.75", "1.00"]]
    for wrong in ({"found": torch.zeros(2, 1)}, {"other": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match=r"numbers must be \[classes, N\] of a kind of samples \(got"):
            plots.plot_samples(samples, tmp_path / "x.svg", wrong)


@pytest.mark.parametrize(
    "shapes", [{}, {"a": (3, 4, 8, 8)}, {"a": (3, 1, 1, 8, 8), "b": (2, 1, 1, 8, 8)}, {"a": (3, 1, 2, 8, 8)}]
)
def test_what_is_no_sheet(shapes, tmp_path):
    with pytest.raises(ValueError, match=r"samples must be pictures \[classes, N, C, H, W\]"):
        plots.plot_samples({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_policy_shows_probabilities_and_strengths(tmp_path):
    def shares(names, **settings):
        plots.plot_policy(AugmentationPolicy(names, **settings), tmp_path / "policy.png")
        pixels = picture(tmp_path / "policy.png")
        return [_share(pixels, name) for name in (plots.ACCENT, plots.SECOND)]

    often, rarely = (shares(["noise", "blur"], probability=chance, strength=0.5) for chance in (0.9, 0.3))
    assert often[0] > 2 * rarely[0]
    assert abs(often[1] - rarely[1]) < 0.1 * rarely[1]
    strong = shares(["noise", "blur"], probability=0.3, strength=1.0)
    assert strong[1] > 1.6 * rarely[1]
    on_or_off = shares(["vertical_flip", "horizontal_flip"], probability=0.9)
    assert on_or_off[1] < 0.2 * rarely[1]  # the legend's alone


def _share(pixels, name):
    color = torch.tensor([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float(((pixels - color).abs().amax(-1) < 0.02).float().mean())
