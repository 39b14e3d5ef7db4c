import pytest
import torch


@pytest.fixture(autouse=True)
def seed_and_one_thread():
    """Same random numbers in every run; and one thread, since starting several costs more than tensors of test size
    take, a hundred times more on a busy machine."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
