"""For all tests: whatever they start logs to a file of theirs, and finds no manager of somebody else."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

# The same examples in every run, however slow the machine is: a test that fails, fails for everybody.
hypothesis.settings.register_profile("hwpoison", deadline=None, derandomize=True)
hypothesis.settings.load_profile("hwpoison")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has to do with this machine goes one after the other, where there are several workers: processes are looked at,
    descriptors and memory counted. What is computed is computed beside it."""
    for item in items:
        if not {"core", "simulation"} & set(item.path.parts):
            item.add_marker(pytest.mark.xdist_group("machine"))


@pytest.fixture(autouse=True, scope="session")
def own_event_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The manager inherits the environment. For the session, so that managers of modules have it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWPOISON_LOG", str(tmp_path_factory.mktemp("log") / "events.db"))
        patch.delenv("HWPOISON_SOCKET", raising=False)
        yield
