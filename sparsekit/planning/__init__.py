"""What a recipe will do and take, worked out before any weight is touched."""
