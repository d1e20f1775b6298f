"""Sharded checkpoints that know nothing of how a training is laid out."""
