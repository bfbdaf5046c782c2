"""What a client of a soak asks for next: drawn from a seed, so that a run can be repeated."""
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devtools.files import demo_files
from devtools.soak import fixtures
from devtools.soak.fixtures import FAMILIES, LATENTS, LORAS, OURS, Model

PICTURE, REFUSAL, CANCEL, FREE = "picture", "refusal", "cancel", "free"
PROMPTS = (
    "a red house left of an oak tree on grass at noon under a sun",
    "a blue house right of a palm tree on sand at dusk",
)
STRENGTHS = (0.3, 1.0, -0.7)


@dataclass(frozen=True)
class Ask:
    """One prompt. key: what its picture depends on; the same key, the same picture. says: what a
    refusal names.

    cancel: (class of a node, progress) at which it is cancelled. before: done before it is sent.
    """

    kind: str
    key: str
    graph: dict
    says: str = ""
    cancel: tuple[str, int] | None = None
    before: Callable[[], None] = lambda: None


class Graph(dict):
    """A prompt in the API's form, which grows node by node."""

    def add(self, class_type: str, output: int = 0, **inputs) -> list:
        self[str(len(self) + 1)] = {"class_type": class_type, "inputs": inputs}
        return [str(len(self)), output]

    def output(self, link: list, output: int) -> list:
        return [link[0], output]


class Asks:
    """Draws prompts. only: names of the methods that draw them; none: all."""

    def __init__(self, base: Path, seed: int, client: int, only: tuple[str, ...] = ()):
        self.base, self.seed, self.client = base, seed, client
        self.models = fixtures.models()
        self.bad = fixtures.bad_names(base)
        self.content = 0
        kinds = {
            self.draw: 10, self.with_loras: 5, self.cancelled_sampling: 2, self.freed: 1,
            self.encoded: 2, self.checkpoint: 2, self.placed: 2, self.saved: 1, self.refused: 2,
            self.replaced: 2, self.cancelled_load: 1
        }
        self.kinds = {kind: weight for kind, weight in kinds.items()
                      if not only or kind.__name__ in only}

    def number(self, index: int) -> Ask:
        """The client's prompt of this number; the numbers come in order."""
        self.dice, self.turn = (
            random.Random(f"{self.seed}:{self.client}:{index}"),
            2 * index + self.client,
        )
        return self.dice.choices([*self.kinds], [*self.kinds.values()])[0]()

    def sampled(self, graph: Graph, model: list, family: str, positive: list | None = None,
                seed: int = 1, steps: int = 2) -> list:
        node, inputs = LATENTS[family]
        latent = graph.add(node, **inputs)
        if positive is None:
            expected = FAMILIES[family]
            assert expected.context is not None
            pooled = expected.extra["y"][-1] if "y" in expected.extra else 0
            positive = graph.add("SoakPrompt", width=expected.context[-1], pooled=pooled, seed=seed,
                                 turn=self.turn)
        return graph.add("KSampler", model=model, positive=positive, negative=positive,
                         latent_image=latent, seed=seed, steps=steps, cfg=1.0, sampler_name="euler",
                         scheduler="simple", denoise=1.0)

    def draw(self, model: Model | None = None, change=lambda graph, link: link, key: str = "",
             **asked) -> Ask:
        """The picture of a model. change: puts nodes behind the loader."""
        model, seed, graph = model or self.dice.choice(self.models), self.dice.randrange(2), Graph()
        loaded = change(graph, graph.add(model.loader, **model.inputs))
        steps = asked.pop("steps", 2)
        graph.add("SoakDigest", values=self.sampled(graph, loaded, model.family, seed=seed,
                                                    steps=steps))
        return Ask(asked.pop("kind", PICTURE), f"{model.name} {key} {seed} {steps}", graph, **asked)

    def with_loras(self) -> Ask:
        model = self.dice.choice([model for model in self.models if model.family == "flux"])
        loras = [(name, self.dice.choice(STRENGTHS))
                 for name in self.dice.sample(LORAS, self.dice.choice((1, 1, 2)))]
        node = self.dice.choice(("LoraLoaderModelOnly", "FeatherweightApplyLora"))

        def change(graph, link):
            for name, strength in loras:
                inputs = (
                    {"block_weights": "", "misfits": "fail", "strength_clip": 1.0}
                    if node != "LoraLoaderModelOnly"
                    else {}
                )
                link = graph.add(node, model=link, lora_name=name, strength_model=strength,
                                 **inputs)
            return link

        return self.draw(model, change, f"{node} {loras}")

    def placed(self) -> Ask:
        """A changed limit of the memory that a model may take on its device."""
        model = self.dice.choice([model for model in self.models if model.loader == OURS])
        limit = self.dice.choice((0.0, 0.001, 4.0))
        return self.draw(
            model,
            lambda graph, link: graph.add("FeatherweightPlaceModel", model=link, gpu_weights=limit),
            "placed")

    def encoded(self) -> Ask:
        """A picture of words, by the demo's model, with a text encoder and a VAE."""
        graph, encoder, words = (
            Graph(),
            self.dice.choice(fixtures.ENCODERS),
            self.dice.choice(PROMPTS),
        )
        model = graph.add(OURS, model_name=demo_files.MODELS["Q8_0"])
        clip = graph.add("FeatherweightLoadTextEncoder", text_encoder_1=encoder,
                         type="stable_diffusion")
        positive = graph.add("CLIPTextEncode", clip=clip, text=words)
        latent = self.sampled(graph, model, "flux", positive, seed=self.dice.randrange(2))
        vae = graph.add("VAELoader", vae_name=demo_files.VAE_NAME)
        graph.add("SoakDigest", values=graph.add("VAEDecode", samples=latent, vae=vae))
        return Ask(PICTURE, f"encoded {encoder} {words} {graph[latent[0]]['inputs']['seed']}",
                   graph)

    def checkpoint(self) -> Ask:
        graph, seed = Graph(), self.dice.randrange(2)
        loaded = graph.add("FeatherweightLoadCheckpoint",
                           checkpoint_name=demo_files.CHECKPOINT_NAME)
        positive = graph.add("SoakPrompt", width=768, pooled=0, seed=seed, turn=self.turn)
        latent = self.sampled(graph, loaded, "flux", positive, seed)
        picture = graph.add("VAEDecode", samples=latent, vae=graph.output(loaded, 2))
        graph.add("SoakDigest", values=picture)
        return Ask(PICTURE, f"checkpoint {seed}", graph)

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

        return self.draw(Model("flux", OURS, {"model_name": fixtures.file_name("flux", "Q8_0")}),
                         change, "saved")

    def replaced(self) -> Ask:
        """A file that has become another one since the last prompt."""
        self.content = 3 - self.content if self.content else 1
        model = Model("flux", OURS, {"model_name": fixtures.REPLACED.format(self.client)})
        content = self.content
        ask = self.draw(model, key=f"content {content}",
                        before=lambda: fixtures.replace(self.base, self.client, content))
        return Ask(**{**ask.__dict__, "key": ask.key.replace(model.name, "replaced")})

    def refused(self) -> Ask:
        name = self.dice.choice(self.bad)
        return self.draw(Model("flux", OURS, {"model_name": name}), kind=REFUSAL, says=name)

    def cancelled_sampling(self) -> Ask:
        return self.draw(kind=CANCEL, cancel=("KSampler", self.dice.randrange(1, 8)), steps=8)

    def cancelled_load(self) -> Ask:
        return self.draw(Model("flux", OURS, {"model_name": fixtures.LONG}), kind=CANCEL, steps=1,
                         cancel=(OURS, self.dice.randrange(40)))

    def freed(self) -> Ask:
        return self.draw(kind=FREE)
