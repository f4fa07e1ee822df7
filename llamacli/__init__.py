"""The command line for Llama 2 on your own machine."""

__version__ = "0.1.0"
