"""fedsplit: fine-tune one frozen pre-trained transformer across sites that cannot share their data."""

__all__ = ["__version__"]

__version__ = "0.1.0"
