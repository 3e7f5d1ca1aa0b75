"""One machine plays all sites: the engine, partitioning, bundled tasks and accords."""
