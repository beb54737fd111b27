"""adfm: adapt a vision-language model to finding defects in photographs of products."""

__version__ = "0.1.0"
