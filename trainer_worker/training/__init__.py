"""The training of one job or of many in one batch: data, plan, steps and checkpoints."""
