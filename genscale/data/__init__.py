"""What goes in: the global order of samples, readers, tokenizers, packing, and the loader that overlaps the step."""
