"""mcdi_fast: neural-network weights by local consistency diffusion."""
