"""Flow matching through the inner loop against unrolled autograd, and what is drawn against a plain Euler loop."""

import pytest
import torch
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment import FlowTasks, Generator
from tests.exactness import assert_close, gradients, rand, relative_error

SHAPE = (2, 6, 8)


def episodes(classes=3, support=3, queries=2):
    """Pictures of one class a task."""
    x = rand(classes, support + queries, *SHAPE)
    y = torch.zeros(classes, support + queries, dtype=torch.int64)
    return mf.TaskBatch(x[:, :support], y[:, :support], x[:, support:], y[:, support:])


def network(flow):
    return flow.network(SHAPE, hidden=4, blocks=2).double()


ROUTES = {
    "maml": (FlowTasks(2, 0, 2), lambda net: mf.MAML(net, 0.05, 3, loss="mse", backend="fused"), ""),
    "maml that sees pictures": (FlowTasks(2, 1, 2), lambda net: mf.MAML(net, 0.05, 2, loss="mse", backend="fused"), ""),
    "vector": (FlowTasks(2), lambda net: mf.CAVIA(net, 0.7, 3, 5, loss="mse", backend="fused"), "context"),
    "pictures": (FlowTasks(1, 2), lambda net: mf.MAML(net, inner_steps=0, loss="mse", backend="fused"), ""),
}


def unrolled(learner, tasks, only):
    """The mean query loss, task by task and step by step; `only`: the one parameter that moves."""
    named, losses = dict(learner.model.named_parameters()), []
    for support_x, support_y, query_x, query_y in zip(*tasks.tensors, strict=True):
        theta = {name: value if value.requires_grad else value.clone() for name, value in named.items()}
        for name in [only] if only else []:
            theta[name] = theta[name].requires_grad_()
        moving = [only] if only else list(theta)
        for _ in range(learner.inner_steps):
            loss = (functional_call(learner.model, theta, support_x) - support_y).square().mean()
            slopes = torch.autograd.grad(loss, [theta[name] for name in moving], create_graph=True)
            theta |= {name: theta[name] - learner.inner_lr * slope for name, slope in zip(moving, slopes, strict=True)}
        losses.append((functional_call(learner.model, theta, query_x) - query_y).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize("route", ROUTES)
def test_losses_and_gradients_are_those_of_an_unroll(route):
    flow, make, only = ROUTES[route]
    learner, tasks = make(network(flow)), flow(episodes())
    out, expected = learner(tasks), unrolled(learner, tasks, only)
    assert relative_error(out.task_losses, expected) < 1e-9
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    assert_close(gradients(out.loss, named), gradients(expected.mean(), named))


def test_reptile_moves_to_the_mean_of_what_sgd_arrives_at():
    flow = FlowTasks(2, 0, 2)
    model, tasks = network(flow), flow(episodes())
    ends = []
    for x, y in zip(tasks.support_x, tasks.support_y, strict=True):
        theta = dict(model.named_parameters())
        for _ in range(4):
            loss = (functional_call(model, theta, x) - y).square().mean()
            slopes = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                name: (value - 0.05 * slope).detach().requires_grad_()
                for (name, value), slope in zip(theta.items(), slopes, strict=True)
            }
        ends.append(theta)
    expected = {
        name: (value + 0.3 * (torch.stack([each[name] for each in ends]).mean(0) - value)).detach()
        for name, value in model.named_parameters()
    }
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    learner = mf.Reptile(model, 0.05, 4, "sgd", meta_lr=0.3, loss="mse", backend="fused")
    learner.step(tasks)
    assert_close(
        {name: value.detach() - before[name] for name, value in model.named_parameters()},
        {name: value - before[name] for name, value in expected.items()},
    )


def test_the_network_is_fused():
    for shape, flow in (((1, 28, 28), FlowTasks()), ((3, 8, 12), FlowTasks(1, 2, 4))):
        tasks = flow(mf.TaskBatch.of([torch.rand(1, 2, *shape), torch.zeros(1, 2).long()] * 2))
        found = mf.explain(flow.network(shape, hidden=8), tasks.support_x[0])
        assert "no" not in [row.split()[-1] for row in str(found).splitlines()[1:-1]]
        assert "fused engine" in str(found)
        assert flow.network(shape, hidden=8)(tasks.support_x[0]).shape == tasks.support_y[0].shape


def test_rows_lie_on_the_way_from_noise_to_their_pictures():
    flow, tasks = FlowTasks(repeats=3), episodes()
    made = flow(tasks)
    for x, inputs, velocity in (
        (tasks.support_x, made.support_x, made.support_y),
        (tasks.query_x, made.query_x, made.query_y),
    ):
        state, time = inputs[:, :, :-1], inputs[:, :, -1:]
        end = 2 * x.repeat_interleave(3, 1) - 1
        torch.testing.assert_close(state + (1 - time) * velocity, end)
        assert (time == time[..., :1, :1]).all()
        rows = inputs.shape[1]
        order = (time[..., 0, 0].squeeze(2).sort(1).values * rows).floor()
        assert torch.equal(order, torch.arange(rows).to(order).expand_as(order))  # one in each stretch of time
        noise = end - velocity
        assert abs(float(noise.mean())) < 0.2
        assert 0.8 < float(noise.std()) < 1.2


def test_rows_show_other_pictures_and_grey_where_there_is_none():
    flow, tasks = FlowTasks(repeats=2, context=2), episodes(support=3)
    made, known = flow(tasks), 2 * tasks.support_x - 1

    def shown(inputs):
        return inputs[:, :, 2:-1].unflatten(2, (2, 2))

    for task in range(3):
        for row, beside in enumerate(shown(made.support_x)[task]):
            found = {place for place in range(3) for each in beside if torch.equal(each, known[task, place])}
            assert found == {0, 1, 2} - {row // 2}
        for beside in shown(made.query_x)[task]:
            assert len({place for place in range(3) for each in beside if torch.equal(each, known[task, place])}) == 2
    made = flow(episodes(support=1))
    assert not shown(made.support_x).any()
    assert (shown(made.query_x).flatten(3).abs().sum(3) > 0).sum(2).eq(1).all()


def test_patches_are_the_same_pixels():
    flow, x = FlowTasks(patch=2), rand(2, 3, *SHAPE)
    planes = flow.planes(x)
    assert planes.shape == (2, 3, 8, 3, 4)
    assert torch.equal(flow.pixels(planes), x)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_what_is_drawn_follows_the_velocity(route, start):
    flow, make, _ = ROUTES[route]
    learner, x, seed = make(network(flow)), rand(3, 3, *SHAPE), int(torch.randint(2**30, ()))
    found = Generator(learner, flow, steps=5, start=start).draw(x, 4, torch.Generator().manual_seed(seed))
    noise = torch.Generator().manual_seed(seed)
    adapted = learner.adapt(*flow.rows(x, generator=noise))
    first = torch.randn(3, 4, *SHAPE, generator=noise, dtype=torch.float64)
    beside = flow.beside(x, 4, noise)
    for task in range(3):
        for sample in range(4):
            state = (1 - start) * first[task, sample] + start * (2 * x[task, sample % 3] - 1)
            for step in range(5):
                time = start + step * (1 - start) / 5
                planes = torch.cat([state, beside[task, sample]])
                if flow.patch > 1:
                    planes = torch.nn.functional.pixel_unshuffle(planes, flow.patch)
                planes = torch.cat([planes, planes.new_full((1, *planes.shape[1:]), time)])
                theta = {name: value[task] for name, value in adapted.as_dict().items()}
                velocity = functional_call(learner.model, theta, planes[None])[0]
                if flow.patch > 1:
                    velocity = torch.nn.functional.pixel_shuffle(velocity, flow.patch)
                state = state + (1 - start) / 5 * velocity
            expected = ((state + 1) / 2).clamp(0, 1)
            torch.testing.assert_close(found[task, sample], expected, rtol=1e-9, atol=1e-9)
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


@pytest.mark.parametrize(
    "make", [each[1] for each in ROUTES.values()] + [lambda net: mf.Reptile(net, 0.01, loss="mse", inner_batch=2)]
)
def test_the_same_seed_gives_the_same_bits(make):
    flow = FlowTasks(2, 1, 2)
    generator, x = Generator(make(network(flow)), flow, steps=3), rand(2, 3, *SHAPE)

    def drawn(seed):
        return generator.draw(x, 3, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(3)
    first = generator.draw(x, 3)
    torch.manual_seed(3)
    assert torch.equal(generator.draw(x, 3), first)


def test_episodes_give_the_same_rows_and_leave_the_generator_of_torch():
    def drawn(seed):
        source = mf.data.Glyphs()
        return mf.data.Episodes(source, 1, 3, 2, 4, seed, transform=FlowTasks(2, 1, 2)).batch(5)

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert torch.equal(torch.rand(3), expected)


def test_more_of_a_task_whose_classes_are_of_different_sizes():
    flow = FlowTasks(2, 1, 2)
    generator = Generator(mf.MAML(network(flow), inner_steps=0, loss="mse"), flow, steps=1, start=1 - 1e-9)
    y = torch.tensor([2, 0, 1, 0, 2])
    x = rand(5, *SHAPE)
    made, ids = generator.more(x, y, 3, torch.Generator().manual_seed(0))
    assert torch.equal(ids, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    # So near to the end, what is drawn are the class's own pictures in turn.
    torch.testing.assert_close(made, x[[1, 3, 1, 2, 2, 2, 0, 4, 0]], rtol=0, atol=1e-6)
    assert torch.equal(generator.more(x, y.int(), 3, torch.Generator().manual_seed(0))[0], made)


def test_it_learns_a_class_that_it_has_not_seen():
    """Squares at one of many places: what is drawn lies where the given ones do."""

    def squares(count):
        x = torch.zeros(count, 6, 1, 8, 8)
        for each in x:
            row, column = torch.randint(6, (2,)).tolist()
            each[..., row : row + 3, column : column + 3] = 1
        return x

    torch.manual_seed(0)
    flow = FlowTasks(repeats=2, context=1)
    learner = mf.MAML(flow.network((1, 8, 8), hidden=16, blocks=2), inner_steps=0, loss="mse", backend="fused")
    optimizers = learner.optimizers(3e-3)
    for _ in range(150):
        x = squares(16)
        y = torch.zeros(16, 3, dtype=torch.int64)
        learner.meta_step(flow(mf.TaskBatch(x[:, :3], y, x[:, 3:], y)), optimizers)
    x = squares(10)[:, :2]
    made = Generator(learner, flow, steps=16).draw(x, 4)
    assert (made - x[:, :1]).square().mean() < 0.3 * (made - x[:, :1].roll(1, 0)).square().mean()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"repeats": 0}, ValueError, r"repeats must be >= 1 \(got 0\)"),
        ({"context": -1}, ValueError, r"context must be >= 0 \(got -1\)"),
        ({"patch": 1.5}, TypeError, "patch must be an integer"),
    ],
)
def test_arguments_of_the_tasks(given, error, message):
    with pytest.raises(error, match=message):
        FlowTasks(**given)


def test_tasks_that_are_none():
    flow, tasks = FlowTasks(patch=2), episodes()
    with pytest.raises(ValueError, match="support_y must be class 0 throughout"):
        flow(mf.TaskBatch(tasks.support_x, tasks.support_y + 1, tasks.query_x, tasks.query_y))
    with pytest.raises(ValueError, match=r"query_x must be pictures in 0..1 \(got 0"):
        flow(mf.TaskBatch(tasks.support_x, tasks.support_y, 9 * tasks.query_x, tasks.query_y))
    with pytest.raises(ValueError, match=r"support_x must be pictures \[T, N, C, H, W\] \(got shape \(3, 3, 2\)\)"):
        flow(mf.TaskBatch(tasks.support_x[..., 0, 0], tasks.support_y, tasks.query_x[..., 0, 0], tasks.query_y))
    with pytest.raises(ValueError, match=r"patch must divide the sides of pictures \(got 4, pictures \(2, 6, 8\)\)"):
        FlowTasks(patch=4)(tasks)
    with pytest.raises(ValueError, match="patch must divide"):
        FlowTasks(patch=4).network(SHAPE)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"learner": mf.ProtoNet(torch.nn.Flatten())}, TypeError, r"learner must be one that adapts .*ProtoNet"),
        ({"learner": mf.MAML(mf.models.conv4())}, ValueError, r"learner must minimise 'mse'.*'cross_entropy'"),
        ({"flow": None}, TypeError, r"flow must be FlowTasks \(got NoneType\)"),
        ({"steps": 0}, ValueError, r"steps must be >= 1 \(got 0\)"),
        ({"start": 1.0}, ValueError, r"start must be below 1 \(got 1.0\)"),
        ({"start": -0.1}, ValueError, r"start must be >= 0 \(got -0.1\)"),
        ({"inner_steps": -1}, ValueError, r"inner_steps must be >= 0 \(got -1\)"),
    ],
)
def test_arguments(given, error, message):
    flow = FlowTasks()
    usual = {"learner": mf.MAML(network(flow), inner_steps=0, loss="mse"), "flow": flow}
    with pytest.raises(error, match=message):
        Generator(**usual | given)


@pytest.mark.filterwarnings("ignore::metaaug_fast.FallbackWarning")
def test_pictures_that_are_none():
    flow = FlowTasks()
    generator, x = Generator(mf.MAML(network(flow), inner_steps=0, loss="mse"), flow), rand(4, *SHAPE)
    y = torch.tensor([0, 1, 0, 1])
    for given, error, message in (
        (([x, x[..., 1:]], y, 1), TypeError, r"x must be a tensor \(got list\)"),
        ((x[:, 0], y, 1), ValueError, r"x must be pictures \[S, C, H, W\] \(got"),
        ((x, y[1:], 1), ValueError, "y must have the tasks and samples of x"),
        ((x, y, 0), ValueError, r"per_class must be >= 1 \(got 0\)"),
        ((x, y + 1, 1), ValueError, "must have a sample of each class"),
        ((2 * x + 1, y, 1), ValueError, r"x must be pictures in 0..1"),
        ((x / 0, y, 1), ValueError, r"x must be pictures in 0..1"),
        (((255 * x).byte(), y, 1), ValueError, "x must be float32 or float64 on the CPU"),
    ):
        with pytest.raises(error, match=message):
            generator.more(*given)
    with pytest.raises(ValueError, match=r"x must be pictures \[T, N, C, H, W\]"):
        generator.draw(x, 1)
    with pytest.raises(ValueError, match=r"model must accept samples of shape \(2, 6, 8\)"):
        generator.draw(x[None, :, :1], 1)  # of one channel, where the network takes two
