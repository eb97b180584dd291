"""Weights that come in and leave: MiniMind's .pth, safetensors, Hugging Face folders."""
