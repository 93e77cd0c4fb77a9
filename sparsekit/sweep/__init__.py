"""The column sweep of the optimal brain surgeon, which SparseGPT, GPTQ and their descendants share."""
