"""The operations: each checks its arguments once, then hands one call to a backend."""
