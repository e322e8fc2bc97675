"""The one workspace that the emulator has, and its organization."""

from uuid import UUID

WORKSPACE = "playground"
WORKSPACE_ID = UUID("5e41ce00-0000-4000-8000-000000000002")
ORGANIZATION_ID = UUID("5e41ce00-0000-4000-8000-000000000003")
