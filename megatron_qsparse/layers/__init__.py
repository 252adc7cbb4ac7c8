"""Megatron-Core modules with sparse and 1-bit linears, chosen through layer specs; Megatron itself is not modified."""
