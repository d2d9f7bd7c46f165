"""Runs of a few meta-steps, as a configuration makes them."""

from metaaug_fast.runs import Config, checkpoint, configure, run

QUICK = ["--tasks", "2", "--episodes", "20", "--validation-episodes", "10"]
HIDDEN = {"mlp": "[4]", "conv4": "4", "strided_conv4": "4"}


def small(learner: str, data: str, *options: str, model: str | None = None, steps: int = 4) -> Config:
    """A learner on data with a tiny network."""
    model = model or ("mlp" if data == "sinusoid" else "strided_conv4")
    content = {"learner": {"name": learner}, "data": {"name": data}, "model": {"name": model}}
    hidden = ["--model.hidden", HIDDEN[model]] if model in HIDDEN else []
    return configure(content, [*QUICK, *hidden, "--steps", str(steps), *options])


def done(config, path, **more):
    """Run it without a word; what is in the checkpoint."""
    run(config, path, progress=False, say=lambda text: None, **more)
    return checkpoint.load(path)
