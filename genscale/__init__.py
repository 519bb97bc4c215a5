"""genscale trains generative models at any scale: a run is the same run however it is sharded, interrupted or resized."""

__version__ = "0.1.0"
