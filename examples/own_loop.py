"""A training loop of one's own, with fused modules, FusedSGD and LossScaler: half-precision weights, FP32 masters.

    python examples/own_loop.py

Trains a small residual network on the digits of scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d
from fasttricks.optim import FusedSGD, LossScaler, param_groups, warmup_cosine


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = BatchNormReLU2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNormAddReLU2d(channels, zero_init=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)


def main(epochs: int = 6, batch: int = 64) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images)[:, None].float() / 16, torch.tensor(digits.target)
    train, val = torch.randperm(len(labels)).split((1437, 360))

    stem = nn.Conv2d(1, 16, 3, padding=1, bias=False), BatchNormReLU2d(16)
    model = nn.Sequential(*stem, Block(16), Block(16), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    model.bfloat16()  # float16 on a GPU; BatchNorm's statistics are summed in float32 in any case
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()

    steps = epochs * (len(train) // batch)
    optimizer = FusedSGD(param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps // 10, steps))
    scaler = LossScaler()
    for _ in range(epochs):
        model.train()
        for part in train[torch.randperm(len(train))][: steps // epochs * batch].split(batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[part].bfloat16()).float(), labels[part])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    hits = model.eval()(images[val].bfloat16()).argmax(1) == labels[val]
    print(f"validation top-1: {100 * hits.float().mean():.1f}%")


if __name__ == "__main__":
    main()
