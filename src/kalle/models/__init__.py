"""The networks: what is trained and what speaks."""
