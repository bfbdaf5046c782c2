"""The demo's own small models, which `dev.py demo` makes."""
from devtools.files.demo_files import CHECKPOINT_NAME, ENCODER_NAME, LORAS, MODELS, VAE_NAME
from devtools.workflows.editor import File, Node, Workflow

PROMPT = "a red house left of an oak tree on grass at dawn under a sun"
STEPS = 12
# What a measurement draws: every word of the prompt above, in other scenes.
MEASURED = ("a red house right of a pine tree on snow at noon under a rainbow",
            "a blue house left of a palm tree on sand at dawn under a cloud",
            "a yellow house right of an oak tree on grass at night under a moon",
            "a white house left of a pine tree on grass at dusk under a sun")
KNOWS = """It draws a house by a tree and knows 22 words: `red yellow blue purple pink white` of \
the house, `left right` of the tree, `pine oak palm`, `grass snow sand`, `noon dusk dawn night`, \
`sun moon cloud rainbow`. Every other word is ignored."""
MEMORY = "under 10 MB for the model, 0.1 GB for the text encoder."
SOURCE = (
    "`python3 dev.py demo`, in a clone of this pack's repository, makes the files. To run this \
workflow here, copy them from `.dev/demo/models`:"
)


def made(folder: str, name: str) -> tuple[File]:
    return (File(folder, "", name),)


class Parts:
    """The nodes that every workflow of the demo shares, and pictures made with them."""

    def __init__(self, vae=None):
        self.encoder = Node(
            "FeatherweightLoadTextEncoder",
            {"text_encoder_1": ENCODER_NAME, "type": "stable_diffusion"},
            files=made("text_encoders", ENCODER_NAME),
        )
        self.vae = vae or Node("VAELoader", {"vae_name": VAE_NAME}, files=made("vae", VAE_NAME))
        self.prompt = Node("CLIPTextEncode", {"text": PROMPT, "clip": self.encoder}, "Prompt")
        self.size = Node(
            "EmptySD3LatentImage", {"width": 128, "height": 128}, "Size of the picture"
        )

    def sampler(self, model, title: str = "", prompt=None, latent=None, seed: int = 1) -> Node:
        """prompt, latent: other nodes than those that are shared."""
        return Node(
            "KSampler",
            {
                "model": model,
                "positive": prompt or self.prompt,
                "negative": prompt or self.prompt,
                "latent_image": latent or self.size,
                "seed": seed,
                "steps": STEPS,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
            },
            title,
        )

    def picture(self, model, name: str, save: bool = True, prompt=None) -> list[Node]:
        sampler = self.sampler(model, prompt=prompt)
        decode = Node("VAEDecode", {"samples": sampler, "vae": self.vae})
        show = Node("SaveImage", {"images": decode, "filename_prefix": name}) if save else \
            Node("PreviewImage", {"images": decode}, name)
        return [sampler, decode, show]


def load(name: str) -> Node:
    files = made("diffusion_models", MODELS[name])
    if name == "F16":
        return Node(
            "UNETLoader", {"unet_name": MODELS[name], "weight_dtype": "default"}, files=files
        )
    return Node("FeatherweightLoadDiffusionModel", {"model_name": MODELS[name]}, files=files)


def stock_lora(model: Node, name: str) -> Node:
    inputs = {"model": model, "lora_name": LORAS[name], "strength_model": 1.0}
    return Node("LoraLoaderModelOnly", inputs, f"Load LoRA: {name}",
                files=made("loras", LORAS[name]))


def own_lora(model: Node, name: str, **inputs) -> Node:
    return Node("FeatherweightApplyLora", {"model": model, "lora_name": LORAS[name], **inputs},
                f"Apply LoRA: {name}", files=made("loras", LORAS[name]))


def demo() -> Workflow:
    parts, model = Parts(), load("Q8_0")
    columns = [
        {"Load": [model, parts.encoder, parts.vae]},
        {"Prompt and size": [parts.prompt, parts.size]},
        {"Picture": parts.picture(model, "featherweight_demo")},
    ]
    return Workflow(
        "Featherweight demo",
        columns,
        f"""
A small Flux trained for this demo and its text encoder (CLIP-L), both stored as GGUF (Q8_0) and \
run with their weights kept packed.

{SOURCE}
""",
        MEMORY,
        KNOWS,
    )


def two_loras() -> Workflow:
    parts, model = Parts(), load("Q8_0")
    first = stock_lora(model, "ink")
    second = own_lora(first, "pumpkins", block_weights="double.0=0.9")
    check = Node("FeatherweightCheckLora", {"model": first, "lora_name": LORAS["pumpkins"]})
    columns = [
        {"Load": [model, parts.encoder, parts.vae], "Prompt and size": [parts.prompt, parts.size]},
        {"Two LoRAs": [first, second, check]},
        {"Picture": parts.picture(second, "featherweight_demo_loras")},
    ]
    return Workflow(
        "Featherweight demo two LoRAs",
        columns,
        f"""
Model and text encoder are stored as GGUF (Q8_0) and stay packed. The first LoRA, applied by \
ComfyUI's own loader, outlines everything in ink. The second, applied by **Apply LoRA \
(Featherweight)** with a little less strength in the first block (`double.0=0.9`), puts pumpkins \
in front of the house. **Check LoRA (Featherweight)** says whether the second one fits and shows \
how much it changes each block.

{SOURCE}
""",
        MEMORY,
        KNOWS,
    )


def nf4_checkpoint() -> Workflow:
    checkpoint = Node("FeatherweightLoadCheckpoint", {"checkpoint_name": CHECKPOINT_NAME},
                      files=made("checkpoints", CHECKPOINT_NAME))
    parts = Parts(vae=(checkpoint, 2))
    lora = stock_lora((checkpoint, 0), "ink")
    columns = [
        {"Load": [checkpoint, parts.encoder], "LoRA": [lora]},
        {"Prompt and size": [parts.prompt, parts.size]},
        {"Picture": parts.picture(lora, "featherweight_demo_nf4")},
    ]
    return Workflow(
        "Featherweight demo NF4 checkpoint",
        columns,
        f"""
Model and VAE in one file, the model's weights packed as NF4 (bitsandbytes) and kept packed while \
it runs. A LoRA that outlines everything in ink is applied on top, exactly, without touching the \
packed weights.

{SOURCE}

A checkpoint made by others mostly holds a text encoder too: connect its CLIP output to the prompt.
""",
        MEMORY,
        KNOWS,
    )


def side_by_side() -> Workflow:
    """A column for each packing: the loader, the model by itself, and under it the model with
    LoRAs."""
    parts, columns = Parts(), []
    columns.append({"Prompt": [parts.encoder, parts.prompt, parts.size, parts.vae]})
    for name, loras in {
        "F16": (1, 2),
        "Q8_0": (),
        "Q4_K": (1,),
        "mix": (1,),
        "NF4": (2,),
        "Q2_K": (),
    }.items():
        title, model = "dense" if name == "F16" else name, load(name)
        column = {title: [model, *parts.picture(model, title, save=False)]}
        for count in loras:
            first = stock_lora(model, "ink")
            chain = [first, own_lora(first, "pumpkins")][:count]
            longer = f"{title} + {'LoRA' if count == 1 else 'two LoRAs'}"
            column[longer] = [*chain, *parts.picture(chain[-1], longer, save=False)]
        columns.append(column)
    return Workflow(
        "Featherweight demo side by side",
        columns,
        f"""
One small Flux in six forms, with the same prompt and seed: dense (float16), Q8_0, Q4_K, a mix of \
types made by *Featherweight demo packed to a size* in a file as large as that of Q4_K, NF4 and \
Q2_K, and with one or two LoRAs on top: outlines in ink, and pumpkins.

{SOURCE}
""",
        MEMORY,
        KNOWS,
    )


def packed_to_a_size() -> Workflow:
    parts, model = Parts(), load("F16")
    prompts = [Node("CLIPTextEncode", {"text": text, "clip": parts.encoder}, f"Prompt {number}")
               for number, text in enumerate(MEASURED, start=1)]
    combined, joints = prompts[0], []
    for prompt in prompts[1:]:
        combined = Node(
            "ConditioningCombine", {"conditioning_1": combined, "conditioning_2": prompt}
        )
        joints.append(combined)
    measure = Node(
        "FeatherweightMeasureSensitivity",
        {
            "model": model,
            "positive": combined,
            "latent": parts.size,
            "samples": len(MEASURED),
            "name": "featherweight_demo",
        },
    )
    save = Node(
        "FeatherweightSavePackedModel",
        {
            "model": model,
            "sensitivity": measure,
            "type": "size in GB",
            "size_gb": 0.005,
            "filename_prefix": "diffusion_models/featherweight_demo",
        },
    )
    inspect = Node(
        "FeatherweightInspectModelFile",
        {"file_name": "none", "path": save, "reference_name": MODELS["F16"]},
        files=made("diffusion_models", MODELS["F16"]),
    )
    columns = [
        {"Load": [model, parts.encoder]},
        {"Prompts of the kind you draw, and a size": [*prompts, *joints, parts.size]},
        {"Measure": [measure], "Save to a size": [save]},
        {"What came out": [inspect]},
    ]
    return Workflow(
        "Featherweight demo packed to a size",
        columns,
        f"""
The dense model draws a few pictures, and what its layers see and how much each suffers from being \
packed is written into a small file, once for a model. Then it is saved to a size: each matrix \
gets the type with which the error of the whole is least at 5 MB. **Inspect Model File \
(Featherweight)** shows what each block has become and how far it is from the dense one.

{SOURCE}
""",
        MEMORY,
        """The size: at 0.0043 GB most of the model is in 2 bits. The prompts: a model is \
measured best on what it is used for, and some dozens of prompts are enough. `thoroughness`: *one \
run per layer and type* takes seven times as long and chooses a little better. With another model, \
put its loader, text encoder and latent in place of these.""",
    )


def on_ray() -> Workflow:
    parts, model = Parts(), load("Q8_0")
    lora = stock_lora(model, "ink")
    sampler, decode, _ = parts.picture(lora, "")
    ray = Node(
        "FeatherweightRunOnRay",
        {"images": decode, "count": len(MEASURED), "texts": "\n".join(MEASURED)},
    )
    show = Node("SaveImage", {"images": ray, "filename_prefix": "featherweight_demo_ray"})
    columns = [{"Load": [model, parts.encoder, parts.vae, lora]},
               {"Prompt and size": [parts.prompt, parts.size], "One picture": [sampler, decode]},
               {"Many pictures": [ray, show]}]
    return Workflow(
        "Featherweight demo on Ray",
        columns,
        f"""
Everything before **Run on Ray (Featherweight)** is one picture. The node has it drawn once for \
each line of *texts*, each with the next seed, on all GPUs of this computer at the same time, or \
on other computers. Here no model is loaded.

It needs Ray, in the Python of ComfyUI: `python -m pip install ray`.

{SOURCE}
""",
        "what one picture takes, on each GPU that draws, and 0.6 GB for each ComfyUI there.",
        f"""`count` and `texts`: with no \
lines, all pictures have the prompt on the left and differ by their seed. `address`: *the \
cluster*, to draw on several computers, where ComfyUI was started with its address in \
FEATHERWEIGHT_RAY_ADDRESS; each needs the files in its own folders. {KNOWS}""",
    )


def trained_lora() -> Workflow:
    parts, model = Parts(), load("Q4_K")
    inked = stock_lora(model, "ink")
    examples = Node("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 16},
                    "How many examples")
    drawn = parts.sampler(inked, "Draw the examples", latent=examples, seed=100)
    train = Node(
        "TrainLoraNode",
        {
            "model": model,
            "latents": drawn,
            "positive": parts.prompt,
            "batch_size": 2,
            "steps": 100,
            "learning_rate": 0.01,
            "rank": 8,
            "seed": 1,
            "training_dtype": "fp32",
            "lora_dtype": "fp32",
        },
    )
    save = Node("SaveLoRA",
                {"lora": train, "prefix": "loras/featherweight_demo", "steps": (train, 2)})
    loss = Node("LossGraphNode", {"loss": (train, 1), "filename_prefix": "featherweight_demo_loss"})
    trained = Node("LoraModelLoader", {"model": model, "lora": train, "strength_model": 1.0})
    other = Node("CLIPTextEncode", {"text": MEASURED[0], "clip": parts.encoder}, "Another prompt")
    columns = [
        {"Load": [model, parts.encoder, parts.vae, inked]},
        {"Examples": [parts.prompt, examples, drawn]},
        {"Train": [train, save, loss]},
        {"Another picture": [other, parts.size,
                             *parts.picture(model, "without", save=False, prompt=other)],
         "With the LoRA": [trained, *parts.picture(trained, "featherweight_demo_trained",
                                                   prompt=other)]},
    ]
    return Workflow(
        "Featherweight demo train a LoRA",
        columns,
        f"""
ComfyUI's own **Train LoRA** on a model in Q4_K, whose weights stay packed: gradients go through \
them to the LoRA, exactly as through dense ones. Here it learns from sixteen pictures drawn with \
the LoRA that outlines everything in ink, and its own LoRA then outlines another picture. The file \
lies in ComfyUI's output, in `loras`.

{SOURCE}
""",
        "as to draw, and for each step what the pictures of a batch pass through; the weights stay"
        " packed.",
        f"""In place of *Draw the examples*, **Load Image Dataset from Folder** and **VAE Encode** \
take pictures of yours. With a larger model: `batch_size` 1, and `training_dtype` bf16. Leave \
`gradient_checkpointing` on: ComfyUI's Flux does not train without it, packed or not. {KNOWS}""",
    )


WORKFLOWS = (demo, side_by_side, nf4_checkpoint, two_loras, packed_to_a_size, trained_lora, on_ray)
