"""Weights in the released format, converted to ours and back."""
