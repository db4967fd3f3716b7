"""Weights in the released format, converted to ours and back."""

CONVERTED = "kalle-release"
"""Folder, beside the released files, of what is converted from them when they are first needed."""
