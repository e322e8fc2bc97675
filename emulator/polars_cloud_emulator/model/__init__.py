"""What exists in the emulated Polars Cloud, and its rules: no I/O."""
