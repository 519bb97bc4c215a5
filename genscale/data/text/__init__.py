"""Texts and conversations as samples of tokens."""
