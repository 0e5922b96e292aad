"""FusionClassifier: ten LeNets on one input, averaged, softmax."""

import torch
from torch import nn

from zoo.imports import without

PACKAGE = "torchensemble==0.2.0"
ROWS = 32
HEAVY = 6


class LeNet(nn.Module):
    """The estimator of the package's own examples, with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16)
        self.fc1, self.fc2, self.fc3, self.drop = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10), nn.Dropout(0.1)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.norm(self.conv2(x))), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(self.drop(torch.relu(self.fc2(torch.relu(self.fc1(x))))))


def model():
    with without("torchvision"):
        from torchensemble import FusionClassifier

    ensemble = FusionClassifier(estimator=LeNet, n_estimators=10, cuda=False)
    ensemble.estimators_.extend(ensemble._make_estimator() for _ in range(10))
    return ensemble


def inputs(rows):
    return (torch.randn(rows, 1, 28, 28),), {}
