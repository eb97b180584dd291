"""MiniMind's decoder over packed rows, its loss, and LoRA adapters beside it."""
