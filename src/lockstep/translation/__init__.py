"""Translation between Megatron-LM flags and recipes with overrides, in both directions."""
