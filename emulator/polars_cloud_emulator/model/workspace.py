"""The one workspace that the emulator has, its organization, its buckets and its domain."""

from uuid import UUID

WORKSPACE = "playground"
WORKSPACE_ID = UUID("5e41ce00-0000-4000-8000-000000000002")
ORGANIZATION_ID = UUID("5e41ce00-0000-4000-8000-000000000003")
DATA_BUCKET = "your-bucket"
TEMPORARY_BUCKET = "polars-cloud-temporary"
CLUSTER_DOMAIN = "clusters.polars.test"
"""Each cluster has a name below it. Nobody can register a name below ``.test``."""
