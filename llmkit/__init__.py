"""Fine-tune, evaluate and ship large language models from recipes."""

__version__ = "0.1.0"
