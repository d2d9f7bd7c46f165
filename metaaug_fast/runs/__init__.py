"""From a configuration to a result: training, evaluation, checkpoints."""
