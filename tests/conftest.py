"""Settings of every test run."""

import torch

# The tests' tensors are tiny: a second thread costs more than it does, and two test processes share two cores.
torch.set_num_threads(1)
