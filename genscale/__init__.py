"""genscale trains generative models at any scale: a run is the same run however it is sharded, interrupted or resized."""

import os

# Idle threads of torch's OpenMP spin otherwise, which on a machine that does anything else makes a step five times slower (on a
# quiet one no faster). Read when torch is loaded, so it is said here, which runs first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
