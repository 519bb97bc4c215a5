"""genscale trains generative models at any scale: a run is the same run however it is sharded, interrupted or resized."""

from genscale.process_settings import keep_memory, wait_shortly

__version__ = "0.1.0"

# Here, which runs before anything else of genscale, and before torch.
wait_shortly()
keep_memory()
