"""A neural additive model: one small network per feature, their outputs summed, plus a bias.

    python examples/feature_networks.py

Written as people write it: a ModuleList, a loop over the features, an output buffer that is filled column by column. The question
it comes from asks how to get rid of "the (I believe) time-consuming for-loop"; the answer there is to rewrite the model with grouped
convolutions and to copy the weights over by hand. Here the model stays as it is.
"""

import torch
import torch.nn as nn
from both import carry_checkpoint, compare, fuse, train


class NeuralAdditiveModel(nn.Module):
    def __init__(self, nof_features, hidden=32):
        super().__init__()
        self.nof_features = nof_features
        self.feature_networks = nn.ModuleList()
        for _ in range(nof_features):
            self.feature_networks.append(
                nn.Sequential(
                    nn.Linear(in_features=1, out_features=hidden),
                    nn.ReLU(),
                    nn.Linear(in_features=hidden, out_features=hidden),
                    nn.ReLU(),
                    nn.Linear(in_features=hidden, out_features=1)
                ))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, input):
        output = torch.zeros(input.shape[0], self.nof_features)
        for feature_index in range(self.nof_features):  # Iterate over features
            column = input[:, feature_index].unsqueeze(1)
            output[:, feature_index] = self.feature_networks[feature_index](column).squeeze(1)
        return output.sum(dim=1) + self.bias


def build(nof_features=24):
    torch.manual_seed(0)
    return NeuralAdditiveModel(nof_features), (torch.rand(64, nof_features),)


def main():
    model, inputs = build()
    fused = fuse(model, *inputs)
    compare(model, fused, *inputs)
    train(model, fused, inputs, target=inputs[0].square().sum(1))
    carry_checkpoint(model, fused, *inputs)
    # The feature networks are still there, to be read and plotted one by one.
    print("third network on 0.5:", fused.feature_networks[2](torch.tensor([[0.5]])).item())


if __name__ == "__main__":
    main()
