"""The policy: its gradients through the inner loop against a task-by-task unroll, what it promises, what it refuses."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment import PICTURES, SENTENCES, TRANSFORMS, VECTORS, AugmentationPolicy, support_network
from metaaug_fast.data import Episodes
from metaaug_fast.tasks import MetaOutput, TaskBatch
from tests.building import assert_same
from tests.exactness import assert_close, gradients, rand, randn, relative_error
from tests.learners.comparing import descended

T, WAYS, SHOTS = 3, 3, 2
S = WAYS * SHOTS
RATE, STEPS = 0.3, 2


def tasks(*shape: int, dtype=torch.float64) -> TaskBatch:
    make = rand if len(shape) == 3 else randn
    labels = [torch.rand(T, S).argsort(1) % WAYS for _ in range(2)]
    return TaskBatch(make(T, S, *shape).to(dtype), labels[0], make(T, S, *shape).to(dtype), labels[1])


def network(*shape: int) -> nn.Module:
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(*shape, 7), nn.Tanh(), nn.Linear(7, WAYS)).double()
    if len(shape) == 2:
        return nn.Sequential(nn.Linear(shape[1], 5), nn.Tanh(), nn.Flatten(), nn.Linear(5 * shape[0], WAYS)).double()
    return nn.Sequential(nn.Conv2d(shape[0], 3, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(WAYS)).double()


def maml(*shape: int, backend="fused") -> mf.MAML:
    model = network(*shape)
    model(torch.zeros(2, *shape).double())
    return mf.MAML(model, inner_lr=RATE, inner_steps=STEPS, backend=backend)


def one_of(drawn, task: int):
    """What was drawn for one task."""
    return {
        name: type(each)(*(None if value is None else value[task : task + 1] for value in each))
        for name, each in drawn.items()
    }


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y)


def unrolled(learner: mf.MAML, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
    """One task's loss, as plain autograd."""
    start = dict(learner.model.named_parameters())
    weights = descended(learner.model, start, dict.fromkeys(start, RATE), x, y, STEPS, cross_entropy)
    return cross_entropy(functional_call(learner.model, weights, (query_x,)), query_y)


def moved(policy: AugmentationPolicy) -> AugmentationPolicy:
    """The policy in float64, at random settings that are all in the middle."""
    policy.double()
    with torch.no_grad():
        for value in policy.parameters():
            value.uniform_(-1, 1)
    return policy


KINDS = {"pictures": (PICTURES, (2, 10, 8)), "vectors": (VECTORS, (30,)), "sentences": (SENTENCES, (9, 4))}


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, backend) for kind in ("pictures", "vectors") for backend in ("fused", "fallback")),
        ("sentences", "fallback"),
    ],
)
def test_gradients_are_those_of_an_unroll_task_by_task(kind, backend, per_task):
    names, shape = KINDS[kind]
    policy, learner, batch = (
        AugmentationPolicy(names, copies=2, originals=True),
        maml(*shape, backend=backend),
        tasks(*shape),
    )
    if per_task:
        policy.network = nn.Sequential(
            nn.Flatten(), support_network((math.prod(shape),), policy.settings_count, hidden=5)
        )
    moved(policy)
    named = dict(policy.named_parameters()) | dict(learner.named_parameters())
    assert len(named) > policy.settings_count
    idle = set(named)  # of which no gradient has been seen: a draw may leave all tokens where they are
    for _ in range(5):
        drawn = policy.draw(batch.support_x)
        out = learner(policy(batch, drawn=drawn))
        losses = []
        for task in range(T):
            one = batch[task]
            x, y = policy(one, drawn=one_of(drawn, task)).tensors[:2]
            losses.append(unrolled(learner, x[0], y[0], one.query_x[0], one.query_y[0]))
        expected = torch.stack(losses)
        assert relative_error(out.task_losses, expected) < 1e-10
        got, wanted = gradients(out.loss, named), gradients(expected.mean(), named)
        idle -= {name for name, value in wanted.items() if value.any()}
        for name in named.keys() - idle:
            if wanted[name].any():
                assert relative_error(got[name], wanted[name]) < 1e-8, name
            else:
                assert not got[name].any(), name
        if not idle:
            break
    assert not idle


def test_gradients_are_those_of_transforms_written_sample_by_sample():
    """A turn, noise and a mixture, and what chooses them, in formulas that share nothing with the package's."""
    names, batch, learner = ["brightness", "noise", "mixup"], tasks(1, 8, 8), maml(1, 8, 8)
    policy = moved(AugmentationPolicy(names, temperature=0.7))
    drawn = policy.draw(batch.support_x)

    def amount(name: str, task: int, sample: int, largest: float) -> Tensor:
        choice, number = float(drawn[name].choice[task, sample]), drawn[name].number[task, sample]
        chance, strength = policy.probability_logit[name], policy.strength_logit[name]
        chosen = 1 / (1 + torch.exp(-(chance + math.log(choice / (1 - choice))) / 0.7))
        return chosen * largest * number / (1 + torch.exp(-strength))

    losses = []
    for task in range(T):
        x, y = batch.support_x[task], nn.functional.one_hot(batch.support_y[task], WAYS).double()
        lighter = [(x[i] + amount("brightness", task, i, 0.5)).clamp(0, 1) for i in range(S)]
        noisy = [
            (each + amount("noise", task, i, 0.5) * drawn["noise"].rest[task, i]).clamp(0, 1)
            for i, each in enumerate(lighter)
        ]
        pairs = [(i, int(drawn["mixup"].partner[task, i]), amount("mixup", task, i, 0.5)) for i in range(S)]
        made_x = torch.stack([noisy[i] * (1 - share) + noisy[j] * share for i, j, share in pairs])
        made_y = torch.stack([y[i] * (1 - share) + y[j] * share for i, j, share in pairs])
        losses.append(unrolled(learner, made_x, made_y, batch.query_x[task], batch.query_y[task]))
    named = dict(policy.named_parameters())
    out = learner(policy(batch, drawn=drawn))
    assert_close(gradients(out.loss, named), gradients(torch.stack(losses).mean(), named), 1e-8)


def test_score_function_gradients_are_on_average_those_of_the_expected_loss():
    """Over all that two samples of two tasks can draw, each with its probability."""
    policy = moved(AugmentationPolicy(["noise"], choices="score"))
    batch = TaskBatch(randn(2, 2, 4), torch.tensor([[0, 1], [0, 1]]), randn(2, 3, 4), torch.zeros(2, 3).long())
    learner, drawn = maml(4), policy.draw(batch.support_x)
    named = dict(policy.named_parameters())
    expected_loss, mean = 0.0, {name: torch.zeros(()).double() for name in named}
    chance = policy.probability_logit["noise"].sigmoid()
    for outcome in itertools.product([0.0, 1.0], repeat=4):
        chosen = torch.tensor(outcome).double().view(2, 2)
        # The numbers for which these are chosen: far on either side.
        numbers = {"noise": drawn["noise"]._replace(choice=0.01 + 0.98 * chosen)}
        probability = torch.where(chosen > 0, chance, 1 - chance).prod()
        out = learner(policy(batch, drawn=numbers))
        for name, value in gradients(policy.loss(out), named).items():
            mean[name] += probability.detach() * value
        amount = chosen * policy.strength_logit["noise"].sigmoid() * 0.5 * drawn["noise"].number
        x = batch.support_x + amount[..., None] * drawn["noise"].rest
        expected_loss = (
            expected_loss + probability * learner(TaskBatch(x, batch.support_y, batch.query_x, batch.query_y)).loss
        )
    assert_close(mean, gradients(expected_loss, named), 1e-8)


def test_relaxed_choices_become_hard_ones_as_the_temperature_falls_and_in_evaluation():
    policy, batch = moved(AugmentationPolicy(["noise"], temperature=1e-6)), tasks(4)
    drawn = policy.draw(batch.support_x)
    cold = policy(batch, drawn=drawn)
    hard = policy.eval()(batch, drawn=drawn)
    assert relative_error(cold.support_x, hard.support_x) < 1e-9
    changed = (hard.support_x != batch.support_x).any(-1)
    assert changed.any()
    assert not changed.all()


def test_choices_are_as_frequent_as_they_are_probable():
    policy, x = AugmentationPolicy(["noise"], 0.3).eval(), torch.randn(1, 20000, 2)
    made, _ = policy.augment(x, torch.zeros(1, 20000).long())
    assert abs(float((made != x).any(-1).float().mean()) - 0.3) < 0.02  # six deviations


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"probability": 0.0}])
def test_nothing_happens_without_strength_or_probability(options):
    names = [name for name in PICTURES if TRANSFORMS[name].has_strength or "probability" in options]
    batch = tasks(1, 9, 9, dtype=torch.float32)
    made = AugmentationPolicy(names, **options)(batch)
    assert (made.support_x - batch.support_x).abs().max() < 1e-5
    assert torch.equal(made.support_y.argmax(-1), batch.support_y)
    assert torch.equal(made.query_x, batch.query_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_kept(training, dtype):
    batch = tasks(3, 9, 12, dtype=dtype)
    made = AugmentationPolicy(PICTURES, 0.9, 0.9).train(training)(batch)
    assert made.support_x.shape == batch.support_x.shape
    assert made.support_x.dtype == made.support_y.dtype == dtype
    assert 0 <= made.support_x.min() <= made.support_x.max() <= 1
    assert (made.support_y.sum(-1) - 1).abs().max() < 1e-6
    assert torch.equal(AugmentationPolicy(["blur"])(batch).support_y, batch.support_y)


def test_copies_stand_behind_the_originals():
    batch = tasks(4)
    made = AugmentationPolicy(["noise"], 1.0, copies=3, originals=True)(batch)
    assert made.support_x.shape == (T, 4 * S, 4)
    assert torch.equal(made.support_x[:, :S], batch.support_x)
    assert torch.equal(made.support_y, batch.support_y.repeat(1, 4))
    copies = made.support_x[:, S:].unflatten(1, (3, S))
    assert not torch.equal(copies[:, 0], copies[:, 1])


def test_same_seed_same_bits():
    policy, batch = AugmentationPolicy(PICTURES), tasks(1, 8, 8)
    one, same, other = (policy(batch, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert one == same
    assert one != other
    torch.manual_seed(5)
    first = policy(batch)
    torch.manual_seed(5)
    assert policy(batch) == first


def test_permuting_labels_permutes_those_of_the_result():
    policy, batch, order = AugmentationPolicy(["rotation", "mixup", "cutmix"]), tasks(1, 8, 8), torch.randperm(WAYS)
    drawn = policy.draw(batch.support_x)
    made_x, made_y = policy.augment(batch.support_x, batch.support_y, drawn=drawn)
    got_x, got_y = policy.augment(batch.support_x, order[batch.support_y], drawn=drawn)
    assert torch.equal(got_x, made_x)
    assert torch.equal(got_y[..., order], made_y)


def test_targets_that_are_soft_or_values_are_mixed_as_they_are():
    x, y = randn(T, S, 4), randn(T, S, 2)
    policy = AugmentationPolicy(["mixup"], 1.0, 1.0)
    drawn = policy.draw(x)
    made_x, made_y = policy.augment(x, y, drawn=drawn)
    assert (
        relative_error(policy.augment(torch.cat([x, y], -1), y, drawn=drawn)[0], torch.cat([made_x, made_y], -1))
        < 1e-12
    )


def test_it_learns_the_turns_of_its_queries():
    """Queries are support samples that were turned: a learner does better on them that adapts on turned samples."""
    turn = AugmentationPolicy(["rotation"], 1.0, 0.6).eval()
    policy = AugmentationPolicy(
        ["rotation", "noise"], {"rotation": 0.9, "noise": 0.5}, {"rotation": 0.1, "noise": 0.5}, copies=4
    )
    learner = mf.MAML(nn.Sequential(nn.Flatten(), nn.Linear(100, 5)), inner_lr=0.5, inner_steps=5)
    optimizer = torch.optim.Adam(policy.parameters(), 0.1)
    y = torch.arange(5).repeat(16, 1)
    before = policy.as_dict()
    for _ in range(40):
        x = nn.functional.avg_pool2d(torch.rand(80, 1, 12, 12), 3, 1).unflatten(0, (16, 5))
        x = (x - 0.5) * 3
        with torch.no_grad():
            query_x = turn.augment(x.repeat(1, 4, 1, 1, 1), y.repeat(1, 4))[0]
        optimizer.zero_grad()
        learner(policy(TaskBatch(x, y, query_x, y.repeat(1, 4)))).loss.backward()
        optimizer.step()
    after = policy.as_dict()
    assert after["rotation"][1] > 2 * before["rotation"][1]
    assert after["noise"][1] < before["noise"][1]


def test_a_network_moves_each_task_by_itself():
    policy, batch = AugmentationPolicy(["noise", "scaling"]).double(), tasks(4)
    policy.network = support_network((4,), policy.settings_count).double()
    drawn = policy.draw(batch.support_x)
    plain = AugmentationPolicy(["noise", "scaling"])
    assert policy(batch, drawn=drawn) == plain(batch, drawn=drawn)  # it starts at 0
    nn.init.normal_(policy.network[-1].weight)
    settings = [policy.as_dict(each) for each in batch.support_x]
    assert settings[0] != settings[1]
    assert str(policy) == str(plain)


# --- after learning ---


def test_state_is_plain_and_goes_into_a_policy_of_the_same_transforms():
    policy, batch = moved(AugmentationPolicy(["noise", "mixup"])), tasks(4)
    assert set(policy.state_dict()) == {
        f"{kind}_logit.{name}" for kind in ("probability", "strength") for name in ("noise", "mixup")
    }
    other = AugmentationPolicy(["noise", "mixup"]).double()
    other.load_state_dict(policy.state_dict())
    assert_same(policy, other)
    drawn = policy.draw(batch.support_x)
    assert policy(batch, drawn=drawn) == other(batch, drawn=drawn)
    with pytest.raises(RuntimeError, match=r"strength_logit\.scaling"):
        AugmentationPolicy(["noise", "scaling"]).load_state_dict(policy.state_dict())


def test_a_policy_that_has_been_used_can_be_copied_and_pickled():
    policy = AugmentationPolicy(PICTURES, choices="score")
    policy(tasks(1, 8, 8))
    assert_same(policy, copy.deepcopy(policy))
    assert_same(policy, pickle.loads(pickle.dumps(policy)))


def test_bits_do_not_depend_on_the_number_of_threads():
    policy, batch = AugmentationPolicy(PICTURES), tasks(1, 16, 16, dtype=torch.float32)
    drawn = policy.draw(batch.support_x)
    one = policy(batch, drawn=drawn)
    torch.set_num_threads(3)
    assert policy(batch, drawn=drawn) == one


def test_its_order_is_that_of_the_names():
    policy = AugmentationPolicy(["translation", "blur", "mixup"], {"mixup": 0.3, "blur": 0.2, "translation": 0.1})
    assert [round(chance, 6) for chance, _ in policy.as_dict().values()] == [0.1, 0.2, 0.3]
    assert list(policy.as_dict()) == list(policy.probability_logit) == ["translation", "blur", "mixup"]
    assert [line.split()[0] for line in str(policy).splitlines()] == ["transform", "translation", "blur", "mixup"]


def test_the_exported_transform_is_the_policy_of_now():
    policy = moved(AugmentationPolicy(["rotation", "noise", "horizontal_flip"]))
    exported, x = pickle.loads(pickle.dumps(policy.transform())), rand(1, 8, 8)
    torch.manual_seed(1)
    got = exported(x)
    torch.manual_seed(1)
    assert torch.equal(policy.eval().augment(x[None, None], torch.zeros(1, 1).long())[0][0, 0], got)
    assert not got.requires_grad
    moved(policy)
    torch.manual_seed(1)
    assert torch.equal(exported(x), got)


def test_a_batch_is_mixed_with_its_targets():
    mix = AugmentationPolicy(["mixup"], 1.0, 1.0, copies=2, ways=4).transform(batched=True)
    x, y = rand(16, 1, 8, 8), torch.randint(4, (16,))
    made_x, made_y = mix(x, y)
    assert made_x.shape == x.shape
    assert made_y.shape == (16, 4)
    assert (made_y > 0).sum(-1).max() == 2


def test_a_network_decides_on_one_task_what_is_exported():
    policy, batch = moved(AugmentationPolicy(["noise"])), tasks(4)
    policy.network = support_network((4,), policy.settings_count).double()
    nn.init.normal_(policy.network[-1].weight)
    exported = policy.transform(batch.support_x[1])
    assert exported.policy.as_dict() == policy.as_dict(batch.support_x[1])
    assert exported.policy.as_dict() != policy.as_dict(batch.support_x[0])


def test_episodes_are_augmented_where_they_are_drawn():
    source = mf.data.ClassSamples.from_arrays(torch.rand(40, 1, 8, 8), torch.arange(40) % 8)
    policy = AugmentationPolicy(["rotation", "noise"]).requires_grad_(False)
    episodes, plain = (Episodes(source, 5, 1, 2, tasks=2, transform=each) for each in (policy, None))
    assert episodes.batch(1) == episodes.batch(1)
    assert torch.equal(episodes.batch(1).query_x, plain.batch(1).query_x)
    assert not torch.equal(episodes.batch(1).support_x, plain.batch(1).support_x)


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([[]], {}, "transforms must name at least one"),
        (["noise"], {}, "transforms must be a list of names"),
        ([[3]], {}, "transforms must be names or Transforms"),
        ([["rotate"]], {}, r"transforms must be among .* \(got 'rotate'; is it 'rotation'\?\)"),
        ([["noise", "noise"]], {}, "transforms must each be there once"),
        ([["blur", "scaling"]], {}, "transforms must be all of pictures, all of vectors or all of"),
        ([["noise"], 1.5], {}, r"probability must be in 0..1 \(got 1.5\)"),
        ([["noise"], -0.1], {}, r"probability must be >= 0 \(got -0.1\)"),
        ([["noise"], math.nan], {}, "probability must be >= 0"),
        ([["noise"], "often"], {}, "probability must be a number"),
        ([["noise"], {"blur": 0.5}], {}, r"probability must be given for noise \(got blur\)"),
        ([["noise"], 0.5, 2.0], {}, "strength must be in 0..1"),
        ([["horizontal_flip"], 0.5, {"horizontal_flip": 0.5}], {}, "strength must be given for none"),
        ([["noise"]], {"choices": "hard"}, "choices must be one of relaxed, score"),
        ([["noise"]], {"temperature": 0}, "temperature must be > 0"),
        ([["noise"]], {"network": 3}, "network must be a module"),
        ([["noise"]], {"copies": 0}, "copies must be >= 1"),
        ([["noise"]], {"originals": 1}, "originals must be True or False"),
        ([["noise"]], {"padding": "white"}, "padding must be one of zeros, border, reflection"),
        ([["noise"]], {"ways": 0}, "ways must be >= 1"),
    ],
)  # fmt: skip
def test_wrong_settings(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AugmentationPolicy(*arguments, **options)


@pytest.mark.parametrize(
    ("names", "x", "message"),
    [
        (["blur"], torch.rand(2, 3, 8, 8), r"support_x must be pictures \[T, S, C, H, W\] for blur"),
        (["blur"], torch.rand(2, 3, 1, 8, 0), "support_x must be pictures"),
        (["scaling"], torch.rand(2, 3, 1, 8, 8), r"support_x must be vectors \[T, S, F\] for scaling"),
        (["noise"], torch.ones(2, 3, 8).long(), "support_x must be floating point"),
        (["blur"], torch.ones(2, 3, 1, 8, 8, dtype=torch.uint8), "support_x.float"),
        (["noise"], [1.0], "support_x must be a tensor"),
    ],
)  # fmt: skip
def test_wrong_samples(names, x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AugmentationPolicy(names).augment(x, torch.zeros(2, 3).long())


def test_wrong_calls():
    policy, batch = AugmentationPolicy(["noise", "mixup"], ways=2), tasks(4)
    with pytest.raises(ValueError, match=r"support_y must hold class ids 0..1 \(got 2\)"):
        policy(batch)
    policy = AugmentationPolicy(["noise", "mixup"])
    with pytest.raises(TypeError, match="tasks must be a TaskBatch"):
        policy(3)
    with pytest.raises(ValueError, match=r"support_x must be on the device of the policy \(got cpu, meta\)"):
        copy.deepcopy(policy).to("meta")(batch)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None \(got 3\)"):
        policy(batch, generator=3)
    with pytest.raises(ValueError, match=r"drawn must hold numbers for mixup \(got noise\)"):
        policy(batch, drawn={"noise": TRANSFORMS["noise"].draw(batch.support_x)})
    with pytest.raises(ValueError, match="drawn must be of"):
        policy(batch, drawn=policy.draw(batch.support_x[:, :2]))
    with pytest.raises(
        ValueError, match=r"batched must be True for a policy that mixes samples \(got False, and mixup\)"
    ):
        policy.transform()
    with pytest.raises(TypeError, match="batched must be True or False"):
        policy.transform(batched=1)
    with pytest.raises(TypeError, match="y must be given for batches"):
        policy.transform(batched=True)(torch.rand(3, 4))
    with pytest.raises(TypeError, match="y must be given for batches"):
        AugmentationPolicy(["noise"]).transform()(torch.rand(4), torch.tensor(1))
    policy.network = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"network must give \[18, 4\]"):
        policy.float()(tasks(4, dtype=torch.float32))
    with pytest.raises(ValueError, match="support_x must be one task's for a policy with a network"):
        policy.transform(batched=True)
    with pytest.raises(ValueError, match="sample_shape must be"):
        support_network((8, 8), 4)


def test_a_score_needs_the_tasks_that_were_augmented():
    policy, output = AugmentationPolicy(["noise"], choices="score"), MetaOutput(torch.ones(()), torch.ones(2))
    with pytest.raises(ValueError, match=r"out must be of the tasks that the policy augmented last \(got 2, none\)"):
        policy.loss(output)
    policy(tasks(4))
    with pytest.raises(ValueError, match=r"\(got 2, 3\)"):
        policy.loss(output)


@pytest.mark.parametrize("backend", ["fused", "fallback"])
def test_first_order_has_no_gradient_for_a_policy_and_says_so(backend):
    learner, batch = maml(4, backend=backend), tasks(4)
    learner.first_order = True
    with pytest.raises(ValueError, match="support_x must not require a gradient in first order"):
        learner(AugmentationPolicy(["noise"])(batch))
    with pytest.raises(ValueError, match="sample_weight must not require a gradient in first order"):
        learner(batch, sample_weight=mf.augment.LearnedWeights(*batch.support_y.shape)().double())
    with pytest.raises(ValueError, match="support_y must not require a gradient in first order"):
        learner(mf.augment.LearnedLabels(batch.support_y).double()(batch))
    with torch.no_grad():
        assert learner(AugmentationPolicy(["noise"])(batch)).loss.isfinite()
    scored, pictures = AugmentationPolicy(["horizontal_flip"], choices="score"), maml(1, 8, 8, backend=backend)
    pictures.first_order = True
    batch = tasks(1, 8, 8)
    drawn = scored.draw(batch.support_x)["horizontal_flip"]
    drawn.choice[0], drawn.choice[1:] = 0.9, 0.1  # tasks that choose alike would leave nothing to learn
    scored.loss(pictures(scored(batch, drawn={"horizontal_flip": drawn}))).backward()
    assert scored.probability_logit["horizontal_flip"].grad != 0


def test_in_first_order_what_lies_in_front_of_support_and_queries_learns_from_these():
    learner, batch, body = maml(4), tasks(4), nn.Linear(4, 4).double()
    learner.first_order = True
    learner(mf.TaskBatch(body(batch.support_x), batch.support_y, body(batch.query_x), batch.query_y)).loss.backward()
    own = body.weight.grad.clone()
    body.zero_grad()
    learner(
        mf.TaskBatch(body(batch.support_x).detach(), *batch.tensors[1:2], body(batch.query_x), batch.query_y)
    ).loss.backward()
    assert own.equal(body.weight.grad)
