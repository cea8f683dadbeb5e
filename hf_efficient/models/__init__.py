"""One folder per architecture; each stands alone and can be shipped with a checkpoint."""
