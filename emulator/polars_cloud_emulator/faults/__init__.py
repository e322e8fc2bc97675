"""Faults that tests add, and the middleware that applies them."""
