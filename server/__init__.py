"""The coordinator: it runs the rounds, gates what arrives and keeps the record."""
