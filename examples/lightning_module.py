"""fasttricks under Lightning: fused modules and FusedSGD in a LightningModule.

    pip install lightning
    python examples/lightning_module.py

Trains ResNet-18-D, a quarter as wide, on the digits of scikit-learn.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fasttricks.models import ResNet
from fasttricks.optim import FusedSGD, param_groups, warmup_cosine


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = ResNet(18, "d", num_classes=classes, width=16, in_channels=1)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        hits = self.model(images).argmax(1) == labels
        self.log("top1", 100 * hits.float().mean())

    def configure_optimizers(self) -> dict:
        # gradient clipping, if needed, by FusedSGD(max_grad_norm=...), which also works with precision="16-mixed"
        optimizer = FusedSGD(param_groups(self, weight_decay=1e-4), lr=0.05, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps // 10, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = nn.functional.interpolate(torch.tensor(digits.images)[:, None].float() / 16, scale_factor=4)
    train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), (1437, 360))
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(10), DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(val, 360))
    print(f"validation top-1: {trainer.callback_metrics['top1']:.1f}%")


if __name__ == "__main__":
    main()
