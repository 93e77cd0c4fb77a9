"""Models of Hugging Face: where they are, what they are made of, one block of weights at a time."""
