"""Lightning's Trainer with a fused network and braze's AdamW, which clips and averages the weights.

    python examples/lightning_module.py

Needs: pip install lightning torchvision scikit-learn
"""

import braze
import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.network = braze.fuse(network, channels_last=True)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return braze.optim.AdamW(self.parameters(), lr=3e-3, max_grad_norm=1.0, ema_decay=0.98)


lightning.seed_everything(0)
digits, targets = load_digits(return_X_y=True)
images = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
train, test = random_split(TensorDataset(images, torch.tensor(targets)), [1400, 397])

module = Digits()
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(test, 397))
print(f"accuracy {trainer.callback_metrics['accuracy'].item():.3f}")
with trainer.optimizers[0].swap_ema():
    [results] = trainer.validate(module, DataLoader(test, 397), verbose=False)
print(f"accuracy of the averaged weights {results['accuracy']:.3f}")
print(str(braze.fusion_report(module)).splitlines()[-1])
