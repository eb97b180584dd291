"""Measurements: throughput of training (throughput/) and the kernels themselves (kernels/)."""
