"""What a run will take before it runs: memory, time and money of a config on devices that need not be here."""
