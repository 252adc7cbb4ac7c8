"""Q-Sparse and BitNet b1.58 layers for Megatron-Core. Importing the package needs neither CUDA nor DeepSpeed."""

__version__ = "0.1.0.dev0"
