"""Training: the loop, the optimizer of sparse weights, the distillation loss, checkpoints, many processes."""
