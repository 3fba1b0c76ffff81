"""Run a planned training step on one machine or on a cluster."""
