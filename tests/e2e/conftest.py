"""Settings shared by all end-to-end tests."""

import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> None:
    # Tiny models lose more to thread start-up than they gain; missing CUDA kernels are no news.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
