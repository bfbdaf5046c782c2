"""Trains everything from nothing: python -m devtools.train_demo, from the root, with the Python of
`dev.py setup`.

Stages follow each other, each goes on where it stopped, and each is one file in the work folder
when it is done. The same seeds give the same order of pictures and noise; the results of two
machines agree as far as their rounding does.
"""
import argparse
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from demo_model import autoencoder, scenes, text
from demo_model.autoencoder import CHANNELS, Autoencoder
from demo_model.flux import Flux, initialise
from demo_model.lora import add_lora, file_tensors
from devtools import ROOT
from devtools.files.demo_files import WEIGHTS, write_model
from devtools.files.gguf_files import write_gguf

# steps, pictures a step, highest learning rate
AUTOENCODER = (800, 16, 2e-3)
DECODER = (600, 16, 1.5e-3)
FLUX = (11000, 16, 1.4e-3)
LORA = (1000, 16, 2e-3)
PICTURES, LORA_PICTURES, AUTOENCODER_PICTURES = 8000, 1000, 2400
# LoRAs are trained on these besides the dense model, which is twice as frequent as each
PACKINGS = ("Q3_K", "Q2_K", "NF4", "FP4")
STYLES = {"ink": {"outline": True}, "pumpkins": {"pumpkins": True}}


class Run:
    """A training: steps with a learning rate that rises and falls, an average of the weights,
    checkpoints every minute."""

    def __init__(self, path: Path, parameters: dict[str, torch.nn.Parameter], plan: tuple,
                 average: float = 0.999):
        self.path, self.parameters, self.average = path, parameters, average
        self.steps, self.batch, self.rate = plan
        self.optimiser = torch.optim.AdamW(parameters.values(), lr=self.rate, betas=(0.9, 0.98),
                                           weight_decay=0.01, fused=True)
        self.means = {name: value.detach().clone() for name, value in parameters.items()}
        self.step, self.spent = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step, self.spent, self.means = state["step"], state["spent"], state["means"]
            self.optimiser.load_state_dict(state["optimiser"])
            with torch.no_grad():
                for name, value in state["weights"].items():
                    parameters[name].copy_(value)

    def save(self):
        weights = {name: value.detach() for name, value in self.parameters.items()}
        torch.save({"step": self.step, "spent": self.spent, "means": self.means, "weights": weights,
                    "optimiser": self.optimiser.state_dict()}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def train(self, batch_of, loss_of, threads: int):
        """batch_of(generator): the tensors of a batch, from a generator that depends on the step
        only. loss_of(*tensors).

        Each thread takes an equal part of the batch by itself: nobody waits inside a layer.
        """
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        parameters = list(self.parameters.values())

        def gradients(tensors):
            loss = loss_of(*tensors)
            return loss.item(), torch.autograd.grad(loss, parameters)

        clock, saved, losses = time.process_time(), time.monotonic(), []
        while self.step < self.steps:
            generator = torch.Generator().manual_seed(self.step)
            rise, fall = min(200, 0.1 * self.steps), 0.7 * self.steps
            rate = self.rate * min(1, (self.step + 1) / rise, (self.steps - self.step) / fall)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            parts = list(
                pool.map(gradients,
                         zip(*(tensor.chunk(threads) for tensor in batch_of(generator)))))
            total = list(parts[0][1])
            for _, more in parts[1:]:
                torch._foreach_add_(total, more)
            torch._foreach_div_(total, threads)
            for parameter, gradient in zip(parameters, total):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimiser.step()
            self.step += 1
            if self.step % 5 == 0:
                keep = min(self.average**5, self.step / (self.step + 50))
                torch._foreach_lerp_(list(self.means.values()), [p.detach() for p in parameters],
                                     1 - keep)
            losses += [part[0] for part in parts]
            if time.monotonic() - saved > 60 or self.step == self.steps:
                self.spent, clock, saved = (
                    self.spent + time.process_time() - clock,
                    time.process_time(),
                    time.monotonic(),
                )
                self.save()
            if self.step % 100 == 0:
                now = self.spent + time.process_time() - clock
                print(
                    f"{self.path.stem} {self.step}/{self.steps}: loss {np.mean(losses):.5f}, "
                    f"{now:.0f} s of processor time, {self.step * self.batch / now:.0f} pictures a"
                    " second of it",
                    flush=True)
                losses.clear()


def drawings(count: int, seed: int, options=lambda index: {}):
    """Scenes of the training set in turn, each drawn anew: (scene, picture)."""
    chance, shown = random.Random(seed), scenes.all_scenes()[0]
    for index in range(count):
        if index % len(shown) == 0:
            chance.shuffle(shown)
        scene = shown[index % len(shown)]
        yield scene, scenes.draw(scene, chance, **options(index))


def as_input(pictures) -> torch.Tensor:
    return torch.as_tensor(np.asarray(pictures)).movedim(-1, 1).float().div_(255)


def train_autoencoder(work: Path, threads: int, only_decoder: bool = False):
    """Train on squares of 64 pixels of all kinds of pictures. Latents are held to mean 0 and spread
    1, with a little noise.

    only_decoder: go on with the decoder alone, so that latents already made stay what they are.
    """
    pictures = as_input([picture for _, picture in drawings(
        AUTOENCODER_PICTURES, 1, lambda i: {"outline": i % 3 == 1, "pumpkins": i % 4 == 1})])
    torch.manual_seed(1)
    model = Autoencoder().to(memory_format=torch.channels_last)
    autoencoder.initialise(model)
    if only_decoder:
        model = load_autoencoder(work / "autoencoder.safetensors")
        run = Run(work / "decoder.pt",
                  dict(model.taesd_decoder.requires_grad_(True).named_parameters()), DECODER)
    else:
        run = Run(work / "autoencoder.pt", dict(model.named_parameters()), AUTOENCODER)

    def batch_of(generator):
        picks = torch.randint(len(pictures), (run.batch,), generator=generator)
        corners = torch.randint(scenes.SIZE - 64 + 1, (run.batch, 2), generator=generator).tolist()
        crops = torch.stack(
            [pictures[i, :, y:y + 64, x:x + 64] for i, (y, x) in zip(picks, corners)])
        return crops, 0.05 * torch.randn(run.batch, CHANNELS, 8, 8, generator=generator)

    def loss_of(crops, noise):
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(crops.contiguous(memory_format=torch.channels_last)).float()
            off = model.decode(latents + noise).float() - crops
        edges = off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean()
        spread = latents.std((0, 2, 3)) - 1
        return off.abs().mean() + 3 * off.square().mean() + 0.5 * edges \
            + 0.01 * (latents.mean((0, 2, 3)).square() + spread.square()).mean()

    run.train(batch_of, loss_of, threads)
    with torch.no_grad():
        for name, value in run.means.items():
            run.parameters[name].copy_(value)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()},
              work / f"{run.path.stem}.safetensors")


def load_autoencoder(path: Path) -> Autoencoder:
    model = Autoencoder()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


def encode(work: Path, threads: int, name: str, count: int, seed: int, options: dict):
    """Latents of new pictures, float16, and the number of each one's scene."""
    torch.set_num_threads(threads)
    model, numbers = (
        load_autoencoder(work / "autoencoder.safetensors"),
        {s: i for i, s in enumerate(scenes.all_scenes()[0])},
    )
    latents, shown, batch = [], [], []
    for scene, picture in drawings(count, seed, lambda index: options):
        shown.append(numbers[scene])
        batch.append(picture)
        if len(batch) == 100 or len(shown) == count:
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(
                    model.encode(
                        as_input(batch).to(memory_format=torch.channels_last)).half().contiguous())
            batch.clear()
    save_file({"latents": torch.cat(latents), "scenes": torch.tensor(shown)},
              work / f"{name}.safetensors")


class Texts:
    """Encoded captions of the training scenes; one in four leaves phrases out, in any order."""

    def __init__(self):
        self.scenes, self.known = scenes.all_scenes()[0], {}

    def batch(self, numbers: list[int], generator) -> tuple[torch.Tensor, torch.Tensor]:
        chances = torch.rand(len(numbers), 6, generator=generator).tolist()
        pairs = [
            self.encoded(self.caption(self.scenes[n], chance))
            for n, chance in zip(numbers, chances)
        ]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    @staticmethod
    def caption(scene: scenes.Scene, chance: list[float]) -> str:
        if chance[0] > 0.25:
            return scene.caption()
        kept = sorted((c, phrase) for c, phrase in zip(chance[1:], scene.phrases()) if c < 0.7)
        return " ".join([
            f"a {scene.wall} house" if chance[5] < 0.8 else "a house",
            *(phrase for _, phrase in kept)
        ])

    def encoded(self, caption: str):
        if caption not in self.known:
            words = caption.split()
            self.known[caption] = text.encode(words).bfloat16(), text.bias(len(words))
        return self.known[caption]


def train_flow(run: Run, model: Flux, data: dict[str, torch.Tensor], threads: int,
               before=lambda generator: None):
    """The model sees latents between picture and noise, more often near the noise, and learns noise
    - picture.

    before(generator): what to do before each step.
    """
    texts, latents, numbers = Texts(), data["latents"], data["scenes"]

    def batch_of(generator):
        picks = torch.randint(len(latents), (run.batch,), generator=generator)
        words, bias = texts.batch(numbers[picks].tolist(), generator)
        noise = torch.randn((run.batch, *latents.shape[1:]), generator=generator)
        when = torch.sigmoid(1.2 + torch.randn(run.batch, generator=generator))
        before(generator)
        return latents[picks].float(), noise, when, words, bias

    def loss_of(clean, noise, when, words, bias):
        t = when.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            guess = model(clean * (1 - t) + noise * t, when, words, bias)
        return (guess.float() - (noise - clean)).square().mean()

    run.train(batch_of, loss_of, threads)


def train_flux(work: Path, threads: int):
    torch.manual_seed(2)
    model = Flux()
    initialise(model)
    run = Run(work / "flux.pt", dict(model.named_parameters()), FLUX)
    train_flow(run, model, load_file(work / "latents.safetensors"), threads)
    save_file({name: value.half().contiguous() for name, value in run.means.items()},
              work / "flux.safetensors")


def load_flux(path: Path) -> Flux:
    model = Flux()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False)


def train_lora(work: Path, threads: int, name: str):
    """Train on the dense model and, as many people train theirs, on packed ones: each step on one
    of them, in any order."""
    torch.manual_seed(3)
    model = load_flux(work / "flux.safetensors")
    layers, dense = dict(model.named_parameters()), load_file(work / "flux.safetensors")
    factors = add_lora(model)
    models = [dense, dense]
    with tempfile.TemporaryDirectory() as folder:
        models += [write_model(Path(folder) / packing, packing, dense) for packing in PACKINGS]

    def take_another(generator):
        weights = models[int(torch.randint(len(models), (), generator=generator))]
        for layer, parameter in layers.items():
            parameter.copy_(torch.as_tensor(weights[layer]))

    run = Run(work / f"lora_{name}.pt", factors, LORA, average=0.99)
    train_flow(run, model, load_file(work / f"latents_{name}.safetensors"), threads, take_another)
    save_file(file_tensors(run.means, kohya=name == "ink"), work / f"lora_{name}.safetensors")


def stages(work: Path) -> dict[str, tuple]:
    """Name of what a stage makes -> (function, arguments)."""
    plan = {
        "autoencoder": (train_autoencoder,), "latents": (encode, "latents", PICTURES, 4, {}),
        "flux": (train_flux,), "decoder": (train_autoencoder, True)
    }
    for seed, (name, options) in enumerate(STYLES.items(), start=5):
        plan |= {f"latents_{name}": (encode, f"latents_{name}", LORA_PICTURES, seed, options),
                 f"lora_{name}": (train_lora, name)}
    return plan


def main():
    parser = argparse.ArgumentParser(prog="python -m devtools.train_demo",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "demo_model",
                        help="folder for everything unfinished")
    parser.add_argument("--until", choices=stages(ROOT), help="stop after this stage")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name, (function, *arguments) in stages(options.work).items():
        if not (options.work / f"{name}.safetensors").exists():
            started = time.process_time()
            function(options.work, options.threads, *arguments)
            print(
                f"{name}: done, {time.process_time() - started:.0f} s of processor time in this"
                " run",
                flush=True)
        if name == options.until:
            return
    publish(options.work)


def publish(work: Path):
    """Copy what is shipped to `weights`: half precision, the Flux as GGUF, the autoencoder at the
    width of its training."""
    WEIGHTS.mkdir(exist_ok=True)
    made = {"autoencoder": "decoder"} | {f"lora_{style}": f"lora_{style}" for style in STYLES}
    for name, stage in made.items():
        save_file(
            {key: value.half() for key, value in load_file(work / f"{stage}.safetensors").items()},
            WEIGHTS / f"{name}.safetensors")
    write_gguf(WEIGHTS / "flux-F16.gguf", load_file(work / "flux.safetensors"),
               # vectors are F32 in everybody's GGUF files
               lambda name, values: "F32" if values.ndim < 2 else "F16")


if __name__ == "__main__":
    main()
