"""Short real programs with torch, with the import swap and, unchanged, under braze.install()."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import braze
import pytest
import torch
from braze.bench import models
from torch import Tensor
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.cpu_only("whole programs, which take the emulator too long"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


class Library(NamedTuple):
    """What a program imports, and what it does to a ready-made model."""

    nn: Any
    optim: Any
    F: Any
    adopt: Callable[[Any], Any] = lambda model: model
    around: Callable[[], Any] = contextlib.nullcontext


class Decaying:
    """torch.optim with a weight decay that nobody asked for."""

    lr_scheduler = torch.optim.lr_scheduler

    def __getattr__(self, name: str) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(*args, **kwargs)
            optimizer.register_step_post_hook(self.decay)
            return optimizer

        return made

    @torch.no_grad()
    def decay(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for group in optimizer.param_groups:
            torch._foreach_mul_(group["params"], 0.97)


TORCH = Library(torch.nn, torch.optim, torch.nn.functional)
LIBRARIES = {
    "torch": TORCH,
    "optim": TORCH._replace(optim=braze.optim),
    "swap": Library(braze.nn, braze.optim, braze.nn.functional, braze.fuse),
    "install": TORCH._replace(around=braze.install),
    "install_and_fuse": TORCH._replace(around=braze.install, adopt=braze.fuse),
}
# Of one run: each loss, before its backward pass.
Losses = Iterator[Tensor]


def pictures(count: int, channels: int, size: int, classes: int = 4) -> TensorDataset:
    """A pattern for each class, and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    patterns = torch.randn(classes, channels, size, size, generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return TensorDataset(patterns[labels] + 0.3 * noise, labels)


def batches(data: TensorDataset, size: int) -> DataLoader[Any]:
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- programs


def small_convnet(nn: Any, p: float, classes: int = 4) -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(p),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 32), nn.BatchNorm1d(32, momentum=None), nn.ReLU(), nn.Dropout(p),
        nn.Linear(32, classes),
    )  # fmt: skip


def convnet(library: Library, p: float) -> Losses:
    """MNIST's example: SGD, a schedule, and a checkpoint half-way, which others go on from."""
    nn, optim, F = library.nn, library.optim, library.F

    def made() -> Any:
        model = library.adopt(small_convnet(nn, p))
        optimizer = optim.SGD(
            model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        return model, optimizer, optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)

    data = pictures(48, 1, 10)
    parts = made()
    for epoch in range(4):
        model, optimizer, scheduler = parts
        model.train()
        for images, labels in batches(data, 12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            yield loss
            loss.backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            assert F.log_softmax(model(data[:][0]), 1).shape == (48, 4)
        if epoch == 1:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in parts], file)
            file.seek(0)
            parts = made()
            for part, state in zip(parts, torch.load(file), strict=True):
                part.load_state_dict(state)


def dcgan(library: Library, p: float) -> Losses:
    nn, optim = library.nn, library.optim
    generator = nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(p),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(16, 1, 4, bias=False), nn.Sigmoid(), nn.Flatten(0),
    )  # fmt: skip

    def initialize(module: Any) -> None:
        if type(module).__name__.find("Conv") != -1:
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif type(module).__name__.find("BatchNorm") != -1:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    for network in (generator, discriminator):
        network.apply(initialize)
    library.adopt(generator), library.adopt(discriminator)
    criterion = nn.BCELoss()
    of_d = optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    of_g = optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for images, _ in batches(pictures(32, 1, 16), 8):
        fake = generator(torch.randn(8, 8, 1, 1))
        assert fake.shape == images.shape
        discriminator.zero_grad()
        loss = criterion(discriminator(images), torch.ones(8))
        yield loss
        loss.backward()
        loss = criterion(discriminator(fake.detach()), torch.zeros(8))
        yield loss
        loss.backward()
        of_d.step()
        generator.zero_grad()
        loss = criterion(discriminator(fake), torch.ones(8))
        yield loss
        loss.backward()
        of_g.step()


def vae(library: Library, p: float) -> Losses:
    nn, optim, F = library.nn, library.optim, library.F

    class VAE(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(
                nn.Linear(64, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Dropout(p)
            )
            self.mean, self.logvar = nn.Linear(32, 4), nn.Linear(32, 4)
            self.decode = nn.Sequential(
                nn.Linear(4, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Linear(32, 64)
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = F.dropout(self.encode(x.flatten(1)), p, self.training)
            mean, logvar = self.mean(hidden), self.logvar(hidden)
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
            return self.decode(z), mean, logvar

    model = library.adopt(VAE())
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(4):
        for images, _ in batches(pictures(32, 1, 8), 8):
            optimizer.zero_grad()
            decoded, mean, logvar = model(images)
            assert decoded.shape == (8, 64)
            divergence = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
            loss = F.mse_loss(decoded, images.flatten(1), reduction="sum") + divergence
            yield loss
            loss.backward()
            optimizer.step()


def language_model(library: Library, p: float) -> Losses:
    nn, optim, F = library.nn, library.optim, library.F

    class Model(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.drop = nn.Embedding(12, 16), nn.Dropout(p)
            self.positions = nn.Parameter(torch.randn(10, 16) * 0.1)
            layer = nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            x = self.drop(self.embed(tokens) * math.sqrt(16) + self.positions)
            result: Tensor = self.head(self.layers(x, mask=mask, is_causal=True))
            return result

    model = library.adopt(Model())
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=20)
    text = (torch.arange(20)[:, None] + torch.arange(11)) * 5 % 12
    for step in range(20):
        tokens = text[step % 4 :: 4]
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        yield loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()


def timm_training(library: Library, p: float, amp: bool = False) -> Losses:
    """The main parts of timm's train.py."""
    models._import_torchvision()
    pytest.importorskip("timm")
    import timm.loss
    import timm.optim
    import timm.scheduler
    import timm.utils

    made = timm.create_model("test_resnet.r160_in1k", num_classes=4, drop_rate=p, drop_path_rate=p)
    model = library.adopt(made)
    if library.optim is torch.optim:
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05)
    else:
        groups = timm.optim.param_groups_weight_decay(model, 0.05)
        optimizer = library.optim.AdamW(groups, lr=3e-3)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False
    )
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    scaler = timm.utils.NativeScaler(device="cpu")
    data, updates = pictures(16, 3, 64), 0
    for _ in range(4):
        for images, labels in batches(data, 8):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                output = model(images)
                loss = criterion(output, labels)
            assert output.shape == (8, 4)
            yield loss
            optimizer.zero_grad()
            if amp:
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            else:
                loss.backward()
                timm.utils.dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
                optimizer.step()
            updates += 1
            ema.update(model, step=updates)
            scheduler.step_update(updates)
    ema.eval()
    with torch.no_grad():
        yield criterion(ema(data[:][0]), data[:][1])


def torchvision_training(library: Library, p: float) -> Losses:
    """As torchvision's references/classification/train.py."""
    if not models.is_installed("torchvision"):
        pytest.skip("torchvision is not installed")
    torchvision = models._import_torchvision()
    from torchvision.ops._utils import split_normalization_params

    nn, optim = library.nn, library.optim
    model = torchvision.resnet18(num_classes=4)
    model.fc = nn.Sequential(nn.Dropout(p), model.fc)
    model = library.adopt(model)
    norms, others = split_normalization_params(model)
    assert len(norms) == 40
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-4}]
    optimizer = optim.SGD(groups, lr=0.02, momentum=0.9)
    schedules = optim.lr_scheduler
    scheduler = schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 0.1, total_iters=1),
            schedules.CosineAnnealingLR(optimizer, T_max=2),
        ],
        milestones=[1],
    )
    ema = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = pictures(16, 3, 32)
    for _ in range(3):
        for images, labels in batches(data, 8):
            loss = criterion(model(images), labels)
            yield loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            ema.update_parameters(model)
        scheduler.step()
    ema.eval()
    with torch.no_grad():
        yield criterion(ema(data[:][0]), data[:][1])


def lightning_training(library: Library, p: float, precision: str) -> Losses:
    models._import_torchvision()  # which it imports
    lightning = pytest.importorskip("lightning")
    from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
    from lightning.pytorch.plugins import MixedPrecision

    optim, losses = library.optim, []

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = library.adopt(small_convnet(library.nn, p))

        def training_step(self, batch: Any, index: int) -> Tensor:
            losses.append(library.F.cross_entropy(self.model(batch[0]), batch[1]))
            return losses[-1]

        def configure_optimizers(self) -> Any:
            optimizer = optim.AdamW(self.parameters(), lr=1e-2)
            # It refuses to clip with 16-mixed where that is True.
            assert not _optimizer_handles_unscaling(optimizer)
            assert _optimizer_handles_unscaling(optim.AdamW(self.parameters(), fused=True))
            return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    scaler = torch.amp.GradScaler("cpu", 1024.0) if precision == "16-mixed" else None
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", plugins=MixedPrecision(precision, "cpu", scaler),
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), batches(pictures(48, 1, 10), 12))
    assert len(losses) == 16
    yield from losses


def accelerate_training(library: Library, p: float, precision: str = "no") -> Losses:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model = library.adopt(small_convnet(library.nn, p))
    optimizer = library.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = library.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.9)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, batches(pictures(48, 1, 10), 12), scheduler
    )
    for _ in range(6):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = library.F.cross_entropy(model(images), labels)
                yield loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def transformers_training(library: Library, p: float, bf16: bool = False) -> Losses:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=4,
        intermediate_size=32, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    model = library.adopt(transformers.BertForSequenceClassification(config))
    losses: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss))
    data = [
        {"input_ids": torch.full((6,), i % 4), "labels": torch.tensor(i % 4)} for i in range(32)
    ]
    optimizer = library.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = library.optim.lr_scheduler.LinearLR(optimizer, total_iters=16)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=8, per_device_train_batch_size=4, use_cpu=True, bf16=bf16,
            gradient_accumulation_steps=2, max_grad_norm=0.5, report_to="none", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, scheduler)
        )
        trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert len(losses) == 64
    yield from losses


class Program(NamedTuple):
    run: Callable[[Library, float], Losses]
    tolerance: float  # of a loss: what the last bit of the first step grows to
    falls: bool = True


HALF = 0.1  # where the last bit is one of bfloat16's or float16's
PROGRAMS = {
    "convnet": Program(convnet, 1e-4),
    "dcgan": Program(dcgan, 1e-3, falls=False),
    "vae": Program(vae, 1e-4),
    "language_model": Program(language_model, 1e-4),
    "timm": Program(timm_training, 1e-3),
    "timm_bf16": Program(functools.partial(timm_training, amp=True), HALF),
    "torchvision": Program(torchvision_training, 5e-3),
    "lightning_bf16": Program(functools.partial(lightning_training, precision="bf16-mixed"), HALF),
    "lightning_fp16": Program(
        functools.partial(lightning_training, precision="16-mixed"), HALF, False
    ),
    "accelerate": Program(accelerate_training, 1e-4),
    "accelerate_bf16": Program(
        functools.partial(accelerate_training, precision="bf16"), HALF, False
    ),
    "transformers": Program(transformers_training, 1e-4),
    "transformers_bf16": Program(functools.partial(transformers_training, bf16=True), HALF, False),
}


# ------------------------------------------------------------------------------ tests


def _calls_braze(loss: Tensor) -> bool:
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if "braze" in node.name().lower():
            return True
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
    return False


def _losses(name: str, library: Library, p: float) -> tuple[list[float], bool]:
    """And whether braze computed the first."""
    torch.manual_seed(0)
    found: list[float] = []
    fused = False
    with library.around():
        for loss in PROGRAMS[name].run(library, p):
            fused = fused or (not found and _calls_braze(loss))
            found.append(loss.item())
    assert torch.nn.Dropout.__module__ == "torch.nn.modules.dropout"
    return found, fused


@functools.cache
def _torchs(name: str) -> list[float]:
    losses, fused = _losses(name, TORCH, 0.0)
    assert not fused
    return losses


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several wait for each other where other processes compute, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", [way for way in LIBRARIES if way != "torch"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_losses_are_torchs(name: str, way: str) -> None:
    program = PROGRAMS[name]
    expected = _torchs(name)
    losses, fused = _losses(name, LIBRARIES[way], 0.0)
    # Which have nothing but dropout.
    assert fused or way == "optim" or name.startswith(("language_model", "transformers"))
    tight = way == "optim" and program.tolerance < HALF
    assert losses == pytest.approx(expected, rel=1e-5 if tight else program.tolerance)
    assert len(set(expected)) == len(expected)  # it does learn


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_optimizer_is_noticed(name: str) -> None:
    """The control of the tolerances."""
    losses, _ = _losses(name, TORCH._replace(optim=Decaying()), 0.0)
    assert losses != pytest.approx(_torchs(name), rel=PROGRAMS[name].tolerance)


def test_installed_before_anything_else_is_imported() -> None:
    """timm keeps torch's classes of the time when it is imported, in its tables and as its bases."""
    if not (models.is_installed("timm") and models.is_installed("torchvision")):
        pytest.skip("needs timm and torchvision")
    code = """
import copy
import braze
braze.install()
import torch
from braze.bench import models
models._import_torchvision()
import timm.optim, torchvision
for made in (timm.create_model("test_resnet.r160_in1k", drop_rate=0.1), torchvision.models.resnet18()):
    torch.manual_seed(0)
    optimizer = timm.optim.create_optimizer_v2(made, "adamw", lr=1e-3)
    assert type(optimizer) is braze.optim.AdamW
    norms = [m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(isinstance(m, braze.nn.BatchNorm2d) for m in norms)
    assert not any(type(m).__module__ == "torch.nn.modules.batchnorm" for m in norms)
    x, fused = torch.randn(4, 3, 64, 64), braze.fuse(copy.deepcopy(made))
    losses = []
    for model in (made.eval(), fused.eval(), braze.nn.to_torch(copy.deepcopy(made)).eval()):
        losses.append(model(x).logsumexp(1).mean())
    assert all(torch.allclose(loss, losses[0], rtol=1e-4) for loss in losses)
    made.train()(x).logsumexp(1).mean().backward()
    optimizer.step()
    assert optimizer.updated
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr


@pytest.mark.parametrize("way", ["swap", "install"])
@pytest.mark.parametrize("name", [n for n, program in PROGRAMS.items() if program.falls])
def test_losses_fall_with_dropout(name: str, way: str) -> None:
    losses, fused = _losses(name, LIBRARIES[way], 0.1)
    assert fused and all(map(math.isfinite, losses))
    assert min(losses[-4:]) < 0.8 * losses[0]
