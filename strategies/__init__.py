"""Aggregation rules, one file each: a pure function of arrays in a thin Flower shell."""
