"""One training, as this library and as PyTorch do it: the models, the ranks that step them, the driver and the table."""
