"""Networks that more than one test file trains."""
import torch
from torch import nn


class Hard(nn.Module):
    "What makes a resume hard: dropout, and normalisation over the batch."

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(196, 10))

    def forward(self, images):
        return self.body(images)
