"""Modules that the DAGs share: login, shop and preflight."""
