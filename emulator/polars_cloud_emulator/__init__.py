"""A local Polars Cloud for the unmodified ``polars_cloud`` client."""
