"""Checkpoint surgery: other layouts, other formats."""
