"""Differential privacy: the plan, its sampler, clip and noise, the accountant and the ledger."""
