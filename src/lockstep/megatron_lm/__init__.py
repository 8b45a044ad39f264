"""The flag door: Megatron-LM's command line into the config tree, and back."""
