"""Adapters: small trained weights beside frozen ones, on single-device models."""
