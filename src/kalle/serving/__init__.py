"""Serving many at once: the engine, the HTTP API and the web page. Needs the extra ``serve``."""
