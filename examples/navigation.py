"""Policy gradient: reach a goal that rewards alone tell, as MAML's 2-d navigation, with eight moves.

python examples/navigation.py

Finn, Abbeel, Levine 2017, arXiv 1703.03400, section 5.3, has continuous moves and TRPO; here are eight moves of 0.1 and
Adam. A task is a goal in the unit square around the start; the policy sees where it is, never the goal; the reward is
the negative distance. The inner step is REINFORCE: cross entropy on the moves taken, with advantages, which may be
negative, as sample weights (rewards to come, less their mean over the task's trajectories, divided by their standard
deviation). The outer gradient goes through it, exactly for the given trajectories and advantages. Left out, as in MAML,
is how the chances of the first trajectories depend on the start (E-MAML, arXiv 1803.01118).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import metaaug_fast as mf

STEPS, TRAJECTORIES, LR = 15, 20, 3.0
MOVES = 0.1 * torch.view_as_real(torch.polar(torch.ones(8), torch.arange(8) * torch.pi / 4))
Policy = Callable[[torch.Tensor], torch.Tensor]  # places `[T, N, 2]` to logits `[T, N, 8]`


def policy() -> torch.nn.Module:
    """Logits of the eight moves at a place."""
    return mf.models.mlp([2, 32, 32, 8], activation="tanh")


def alike(maml: mf.MAML) -> Policy:
    """The policy without adaptation, the same for all tasks."""
    return lambda places: maml.model(places.flatten(0, 1)).unflatten(0, places.shape[:2])


@torch.no_grad()
def walk(act: Policy, goals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trajectories of `act` for goals `[T, 2]`: places `[T, N, 2]`, moves and advantages `[T, N]`, and all rewards."""
    at, places, moves, costs = torch.zeros(len(goals), TRAJECTORIES, 2), [], [], []
    for _ in range(STEPS):
        chosen = torch.distributions.Categorical(logits=act(at * 2)).sample()
        places.append(at * 2)
        moves.append(chosen)
        at = at + MOVES[chosen]
        costs.append((at - goals[:, None]).norm(dim=-1))
    rewards = -torch.stack(costs, 2)  # [T, trajectories, steps]
    to_go = rewards.flip(2).cumsum(2).flip(2)
    advantages = to_go - to_go.mean(1, keepdim=True)
    advantages = advantages / advantages.std((1, 2), keepdim=True)
    return torch.stack(places, 2).flatten(1, 2), torch.stack(moves, 2).flatten(1), advantages.flatten(1), rewards


def adapted(maml: mf.MAML, goals: torch.Tensor) -> mf.FastWeights:
    """One step from trajectories of the policy as it is."""
    places, moves, advantages, _ = walk(alike(maml), goals)
    return maml.adapt(places, moves, sample_weight=advantages)


def learn(maml: mf.MAML, steps: int, adapt: bool) -> None:
    """Adam on the loss of trajectories of the adapted policy, or, without `adapt`, of the policy itself."""
    optimizer = torch.optim.Adam(maml.parameters(), 0.005)
    for _ in range(steps):
        goals = torch.rand(40, 2) - 0.5
        act = adapted(maml, goals) if adapt else alike(maml)
        places, moves, advantages, _ = walk(act, goals)
        optimizer.zero_grad()
        losses = F.cross_entropy(act(places).flatten(0, 1), moves.flatten(), reduction="none")
        (losses * advantages.flatten()).mean().backward()
        optimizer.step()


def with_best_rate(maml: mf.MAML) -> mf.MAML:
    """With the inner rate of four whose step ends nearest to goals of their own."""

    def distance(rate: float) -> float:
        maml.inner_lr = rate
        return -float(walk(adapted(maml, goals), goals)[3].mean())

    goals = torch.rand(200, 2) - 0.5
    maml.inner_lr = min((0.3, 1.0, 3.0, 10.0), key=distance)
    return maml


def report(label: str, act: Policy, goals: torch.Tensor) -> None:
    """The mean distance from the goal over a trajectory, over goals, and its 95 % interval."""
    distances = -walk(act, goals)[3].mean((1, 2))
    print(f"{label}: {distances.mean():.3f} +- {1.96 * distances.std() / len(goals) ** 0.5:.3f}")


torch.set_num_threads(1)  # tensors are tiny
torch.manual_seed(0)
maml, pretrained, untrained = (mf.MAML(policy(), inner_lr=LR, backend="fused") for _ in range(3))
learn(maml, 60, adapt=True)
learn(pretrained, 120, adapt=False)  # as many trajectories
goals = torch.rand(500, 2) - 0.5
print(f"distance from the goal, mean over {STEPS} steps, 500 new goals, 95 % interval (lower is better)")
report("  MAML, one step", adapted(maml, goals), goals)
report("  MAML's start, no adaptation", alike(maml), goals)
report("  trained on all goals, no adaptation", alike(pretrained), goals)
report("  random weights, one step", adapted(with_best_rate(untrained), goals), goals)
report("beyond the comparison, trained on all goals, one step", adapted(with_best_rate(pretrained), goals), goals)
