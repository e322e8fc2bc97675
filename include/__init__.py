"""What several DAGs share, one idea per module."""
