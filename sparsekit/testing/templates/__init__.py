"""What `sparsekit new-method` writes: a plugin of each kind that works, and its test; only read, never imported."""
