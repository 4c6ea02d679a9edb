"""Tiny tensors gain nothing from a second thread, and lose much where another process has the other core."""

import torch

torch.set_num_threads(1)
