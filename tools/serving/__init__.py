"""A run's checkpoints over HTTP: OpenAI's API and a page to chat on (docs/serving.md)."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that nobody but this machine reaches."""
