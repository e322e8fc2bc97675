"""Persistent data: state, plans and objects."""
