"""What a cluster may be."""

from typing import Any

import pytest

from emulator.tests.states import spec
from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.specs import Version
from polars_cloud_emulator.model.state import State


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cluster_size": 0}, "cluster_size"),
        ({"specs": None}, "cpus and memory"),
        ({"idle_timeout_mins": 9}, "at least 10"),
        ({"idle_timeout_mins": 0}, "at least 10"),
        ({"python_version": Version(3, 11, 8)}, "workers run Python 3.11.7, not 3.11.8"),
        ({"polars_version": "2.0.1"}, "workers run Polars 2.0.0, not 2.0.1"),
    ],
)
def test_cluster_that_cannot_be_is_refused(
    state: State, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        state.clusters.start(spec(**changed))
    assert state.clusters.by_id == {}
