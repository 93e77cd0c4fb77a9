"""Running a compressed model from its packed weights: storage, linears, loading, generation."""
