"""Names and ids of the emulator's only workspace, its organization, buckets and domain."""

from uuid import UUID

WORKSPACE = "playground"
WORKSPACE_ID = UUID("5e41ce00-0000-4000-8000-000000000002")
ORGANIZATION_ID = UUID("5e41ce00-0000-4000-8000-000000000003")
DATA_BUCKET = "your-bucket"
TEMPORARY_BUCKET = "polars-cloud-temporary"
CLUSTER_DOMAIN = "clusters.polars.test"
"""Domain of the clusters' host names. ``.test`` is reserved, so nobody can register it."""
