"""The built-in methods, one file each, all registered through `sparsekit.registry`."""
