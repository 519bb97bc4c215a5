"""Hugging Face import and export."""
