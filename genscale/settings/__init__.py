"""What a run is: its typed sections, how they are read, and what is said of mistakes in them."""
