"""Manifests, clusters and queries of the emulated Polars Cloud, without I/O."""
