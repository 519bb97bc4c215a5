"""Checkpoints: their names, how they are written and read, which are kept, and where they come from."""
