"""What a run is: its files, and the paths in them."""
