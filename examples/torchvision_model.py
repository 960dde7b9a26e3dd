"""A model that somebody else wrote, on fused kernels: torchvision's ResNet-18 with fasttricks.fuse and FusedSGD.

    python examples/torchvision_model.py

Trains on the digits of scikit-learn. The weights that it saves are torchvision's: they load into an unfused model.
"""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn

import fasttricks
from fasttricks.optim import FusedSGD, param_groups, warmup_cosine


def main(epochs: int = 2, batch: int = 64) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images)[:, None].float().expand(-1, 3, -1, -1) / 16
    images = nn.functional.interpolate(images, scale_factor=4).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(digits.target)
    train, val = torch.randperm(len(labels)).split((1437, 360))

    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    fasttricks.zero_init_last(model)
    fasttricks.fuse(model)  # BatchNorm + ReLU, and BatchNorm + addition + ReLU, are now one op each
    print(f"fused: {dict(fasttricks.fusions(model).counts)}")

    steps = epochs * (len(train) // batch)
    optimizer = FusedSGD(param_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps // 10, steps))
    for epoch in range(epochs):
        model.train()
        for part in train[torch.randperm(len(train))][: steps // epochs * batch].split(batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        logits = model(images[val])
    print(f"validation top-1: {100 * (logits.argmax(1) == labels[val]).float().mean():.1f}%")

    plain = torchvision.models.resnet18(num_classes=10).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(images[val]), logits, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
