"""Steelyard: your own weights on your own GPUs, served through Ray Serve and vLLM."""

__version__ = "0.1.0"
