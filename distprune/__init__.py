"""Gradual magnitude pruning with distillation, global and exact under DeepSpeed ZeRO (arXiv 2312.13547)."""

__version__ = "0.1.0"
