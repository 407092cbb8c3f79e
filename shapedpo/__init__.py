"""shapedpo: DPO that reads which concepts each preference pair teaches, and shapes what the model learns from it."""

__version__ = "0.1.0"
