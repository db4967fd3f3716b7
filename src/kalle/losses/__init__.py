"""Losses: adversarial, spectral and latent."""
