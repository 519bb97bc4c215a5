"""For the tests of genscale and of what is built on it: real runs, a look at what they left, and toys to train.

    processes       `genscale` in processes of its own: start, wait, kill; what it printed, and the one line of a mistake
    runs            what a run left: metrics, losses, the order of its samples, checkpoints and their digest; to train one
    training        an objective, an engine, a loader and a trainer without a run folder
    workers, group  many questions, or many runs, in one start of a group of processes
    forks           many starts of processes out of one import, by the server `fork_server`
    toy             the smallest family there can be, and data of which every sample is a function of its number
    objectives      an objective of nothing but phases, and a small GAN

A run that was killed is the run that was not:

>>> import tempfile
>>> from pathlib import Path
>>> folder = Path(tempfile.mkdtemp())
>>> from genscale.testing.runs import train
>>> settings = {"model.family": "points", "train.steps": 4, "train.checkpoint_every": 2, "train.log_every": 1,
...             "tracking.wandb": "disabled"}
>>> whole = train(folder / "whole", settings)
>>> resumed = train(whole.cut_after(2).folder, settings, processes=1)
>>> resumed.order() == whole.order(), resumed.digest() == whole.digest()
(True, True)
"""
