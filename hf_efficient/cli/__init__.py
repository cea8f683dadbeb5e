"""The `hf-efficient` command line: train, evaluate, generate, convert, demo."""
