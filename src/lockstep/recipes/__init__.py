"""The recipe door: named recipes with overrides, in Megatron Bridge's spelling."""
