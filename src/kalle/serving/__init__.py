"""The web page: what it asks the model for, and how it looks. Needs the extra ``serve``."""
