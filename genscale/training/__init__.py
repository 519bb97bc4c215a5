"""When things happen: the loop, checkpoints, optimizers, schedules, guards."""
