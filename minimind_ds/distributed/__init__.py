"""Ranks: the launcher's environment, the process group, the DeepSpeed engine, parallelism inside a model."""
