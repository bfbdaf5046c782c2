"""What a client of a soak asks for next: drawn from a seed, so that a run can be repeated."""
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devtools.files import demo_files
from devtools.soak import fixtures
from devtools.soak.fixtures import OURS, Loader

PICTURE, REFUSAL, CANCEL, FREE = "picture", "refusal", "cancel", "free"
LORAS = list(demo_files.LORAS.values())


@dataclass(frozen=True)
class Ask:
    """One prompt. key: what its picture depends on; the same key, the same picture. says: what a
    refusal names. cancel: (class of a node, progress) at which it is cancelled. before: done before
    it is sent."""

    kind: str
    key: str
    graph: dict
    says: str = ""
    cancel: tuple[str, int] | None = None
    before: Callable[[], None] = lambda: None


class Graph(dict):
    """A prompt in the API's form, which grows node by node."""

    def add(self, class_type: str, **inputs) -> list:
        self[str(len(self) + 1)] = {"class_type": class_type, "inputs": inputs}
        return [str(len(self)), 0]


class Asks:
    """Draws a client's prompts."""

    def __init__(self, base: Path, seed: int, client: int):
        self.base, self.client, self.turn, self.content = base, client, 0, "Q8_0"
        self.dice = random.Random(f"{seed}:{client}")
        self.loaders, self.bad = fixtures.loaders(), fixtures.bad_names(base)
        self.kinds = {self.draw: 12, self.with_loras: 5, self.placed: 2, self.saved: 1,
                      self.replaced: 2, self.refused: 2, self.cancelled_sampling: 2,
                      self.cancelled_load: 1, self.freed: 1}

    def __next__(self) -> Ask:
        self.turn += 1
        return self.dice.choices([*self.kinds], [*self.kinds.values()])[0]()

    def draw(self, loader: Loader | None = None, change=lambda graph, link: link, key: str = "",
             kind: str = PICTURE, steps: int = 2, **asked) -> Ask:
        """The picture of a model. change: puts nodes behind the loader."""
        (node, inputs), graph = loader or self.dice.choice(self.loaders), Graph()
        seed, words = self.dice.randrange(2), self.dice.choice(("a red house", "a house at dusk"))
        model = change(graph, graph.add(node, **inputs))
        clip = graph.add("FeatherweightLoadTextEncoder", type="stable_diffusion",
                         text_encoder_1=demo_files.ENCODER_NAME)
        text = graph.add("CLIPTextEncode", clip=clip, text=words)
        again = graph.add("SoakAgain", conditioning=text, turn=2 * self.turn + self.client)
        size = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        latent = graph.add("KSampler", model=model, positive=again, negative=again, seed=seed,
                           latent_image=size, steps=steps, cfg=1.0, sampler_name="euler",
                           scheduler="simple", denoise=1.0)
        vae = graph.add("VAELoader", vae_name=demo_files.VAE_NAME)
        graph.add("SoakDigest", image=graph.add("VAEDecode", samples=latent, vae=vae))
        key = f"{node} {[*inputs.values()]} {key} {words} {seed} {steps}"
        return Ask(kind, key, graph, **asked)

    def ours(self, name: str, **asked) -> Ask:
        return self.draw((OURS, {"model_name": name}), **asked)

    def with_loras(self) -> Ask:
        loras = [(name, self.dice.choice((0.3, 1.0, -0.7)))
                 for name in self.dice.sample(LORAS, self.dice.choice((1, 1, 2)))]
        node, inputs = self.dice.choice((("LoraLoaderModelOnly", {}), ("FeatherweightApplyLora", {
            "block_weights": "", "misfits": "fail", "strength_clip": 1.0})))

        def change(graph, link):
            for name, strength in loras:
                link = graph.add(node, model=link, lora_name=name, strength_model=strength,
                                 **inputs)
            return link

        return self.draw(change=change, key=f"{node} {loras}")

    def placed(self) -> Ask:
        """A changed limit of the memory that a model may take on its device."""
        kind, limit = self.dice.choice(fixtures.TYPES), self.dice.choice((0.0, 0.001, 4.0))

        def change(graph, link):
            return graph.add("FeatherweightPlaceModel", model=link, gpu_weights=limit)

        return self.ours(fixtures.file_name(kind), key="placed", change=change)

    def saved(self) -> Ask:
        """A model with a LoRA on it, saved over the file of the time before, and drawn."""
        kind = self.dice.choice(("Q4_K", "Q8_0", "NF4"))

        def change(graph, link):
            link = graph.add("LoraLoaderModelOnly", model=link, lora_name=LORAS[0],
                             strength_model=0.5)
            graph.add("FeatherweightSavePackedModel", model=link, type=kind, size_gb=1.0,
                      folder="output", loras="keep LoRA quality (larger)",
                      filename_prefix=f"diffusion_models/saved by {self.client}", overwrite=True)
            return link

        return self.ours(fixtures.file_name("Q8_0"), change=change, key="saved")

    def replaced(self) -> Ask:
        """A file that has become another one since the last prompt."""
        self.content = content = "Q2_K" if self.content == "Q8_0" else "Q8_0"
        name = fixtures.REPLACED.format(self.client)
        return self.ours(name, key=content,
                         before=lambda: fixtures.replace(self.base, name, content))

    def refused(self) -> Ask:
        name = self.dice.choice(self.bad)
        return self.ours(name, kind=REFUSAL, says=name)

    def cancelled_sampling(self) -> Ask:
        return self.draw(kind=CANCEL, cancel=("KSampler", self.dice.randrange(1, 8)), steps=8)

    def cancelled_load(self) -> Ask:
        return self.ours(fixtures.LONG, kind=CANCEL, cancel=(OURS, self.dice.randrange(40)))

    def freed(self) -> Ask:
        return self.draw(kind=FREE)
