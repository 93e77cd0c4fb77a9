"""Checkpoints other software opens: written with their true size, and those of others read back."""
