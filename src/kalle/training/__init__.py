"""LightningModules of both stages, and their callbacks."""
