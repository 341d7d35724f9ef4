"""megastage: multi-stage LLM pre-training on tensor-, pipeline-, context- and data-parallel layouts."""

__version__ = "0.1.0"
