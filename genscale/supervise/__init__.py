"""The run folder and its owner, signals, the watchdog, and how a run ends."""
