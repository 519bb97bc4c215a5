"""What a run, or a family, is found to do when it is watched."""
