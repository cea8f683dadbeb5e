"""Efficient Transformers for Hugging Face: importing this package registers its models with the Auto classes."""

__version__ = "0.1.0"
