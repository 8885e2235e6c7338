"""Remove redundant visual tokens from vision transformers and multimodal LLMs."""

__version__ = "0.1.0"
__all__ = ["__version__"]
