"""Evidence: the report of a run and the check that recomputes every number in it."""
