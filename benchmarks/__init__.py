"""Commands that print every figure the README quotes; run from the repository's root."""
