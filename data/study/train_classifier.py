"""Train the small classifier in whose features images are compared: python -m data.study.train_classifier"""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from data.images import CLASSIFIER, read


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array.copy()) for array in read())
    x, y = images.float() / 15, labels.long()
    sizes = (196, 256, 64, 10)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    relu, dropout = torch.nn.ReLU(), torch.nn.Dropout(0.3)
    model = torch.nn.Sequential(layers[0], relu, layers[1], relu, dropout, layers[2])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    for _ in range(20):  # epochs
        for rows in torch.randperm(20000).split(128):
            loss = cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    accuracy = (model.eval()(x[20000:]).argmax(1) == y[20000:]).float().mean().item()
    arrays = {}
    for i, layer in enumerate(layers, 1):
        arrays[f"w{i}"] = layer.weight.detach().T.numpy().astype(np.float16)
        arrays[f"b{i}"] = layer.bias.detach().numpy().astype(np.float16)
    np.savez(CLASSIFIER, **arrays)
    print(f"wrote {CLASSIFIER}: {accuracy:.1%} of the test images are classified correctly")


if __name__ == "__main__":
    main()
