"""Models are packed with the kernels of this machine, as a user's are: twice as fast as by torch,
to the same bits."""
import pytest
from user_kernels import kernels_of_this_machine


@pytest.fixture(scope="module", autouse=True)
def as_a_user():
    """Tests of other folders, which may follow in the same process, go without."""
    with kernels_of_this_machine():
        yield
