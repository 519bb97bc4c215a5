"""Networks: tensors in, tensors out. No loss, no distribution, no config parsing."""
