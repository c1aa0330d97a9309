"""Conversations with a model: a chat in the terminal, batches of prompts, and a server."""
