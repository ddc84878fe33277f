"""What every test has."""

import pytest

from mmseq import plugins


@pytest.fixture(autouse=True)
def plug_ins_of_one_test():
    """What a test registers is gone after it: another in the same process may take the name."""
    before = {group: dict(parts) for group, parts in plugins._registered.items()}
    yield
    for group, parts in before.items():
        plugins._registered[group].clear()
        plugins._registered[group].update(parts)
