"""From a configuration to a result: registry, recipes, training, evaluation, checkpoints.

>>> import metaaug_fast as mf
>>> config = mf.runs.configure(mf.runs.recipe("maml-sinusoid"), ["--steps", "100"])
>>> config.training.steps, config.learner.fields["inner_lr"]
(100, 0.01)
"""

from .config import Config, configure, recipe, recipes
from .experiment import Outcome, run

__all__ = ["Config", "Outcome", "configure", "recipe", "recipes", "run"]
