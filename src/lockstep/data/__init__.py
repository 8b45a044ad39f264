"""Data: token files, sample order, blends, mock data, tokenizers, preparation and verification."""
