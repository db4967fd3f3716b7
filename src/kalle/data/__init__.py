"""Corpora to cuts, encoding to latent shards, data modules."""
