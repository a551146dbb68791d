"""A small convolutional network learns handwritten digits; only the imports differ from a program for torch.

    python examples/mnist_import_swap.py    # with --torch: torch's modules and optimizer

Needs: pip install scikit-learn
"""

import sys

import torch
from sklearn.datasets import load_digits

if "--torch" in sys.argv:
    import torch.nn as nn
    import torch.nn.functional as F
    import torch.optim as optim
else:
    import braze.nn as nn
    import braze.nn.functional as F
    import braze.optim as optim

torch.manual_seed(0)
digits, targets = load_digits(return_X_y=True)
images = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
labels = torch.tensor(targets)
train, test = torch.randperm(len(images)).split([1400, 397])

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Flatten(),
    nn.Dropout(0.2),
    nn.Linear(512, 10),
)
optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)

for epoch in range(5):
    model.train()
    for batch in train[torch.randperm(len(train))].split(50):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        right = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {right.item():.3f}")

print("optimizer:", type(optimizer).__module__.split(".")[0])
