"""A training loop of Accelerate, left as it is: after braze.install() its torch.nn and torch.optim are braze's.

    python examples/accelerate_loop.py

Needs: pip install accelerate scikit-learn
"""

import braze

braze.install()  # before the program's own imports

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

set_seed(0)
digits, targets = load_digits(return_X_y=True)
images = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
data = TensorDataset(images, torch.tensor(targets))
train, test = torch.utils.data.random_split(data, [1400, 397])

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Dropout(0.1),
    nn.Linear(512, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train, 25, True))

for epoch in range(5):
    model.train()
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        inputs, labels = next(iter(DataLoader(test, len(test))))
        right = (model(inputs).argmax(1) == labels).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {right.item():.3f}")

for part in (optimizer.optimizer, accelerator.unwrap_model(model)[1]):
    print("uses", type(part).__module__)
