"""A run on a cluster: its Slurm jobs, and whether the nodes have what it needs."""
