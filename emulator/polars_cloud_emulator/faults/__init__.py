"""Faults that a test asks for, and where calls meet them."""
