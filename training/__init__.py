"""Makes models: data, networks, objectives, the training step, checkpoints, metrics and the published bundle."""
