"""The one rule of a stranger's workflow, over every node and input: whatever JSON is posted to
/prompt, no value of it chooses a host to connect to, a program or its argument, a file outside the
folders, a variable of the environment, or code.

Every input of every node that the server has from this pack gets each hostile value, alone; under
the ids of other packs, which are made from tables, every third, other ones for each input. Of those
that the host's checks let through some run for each input, other ones for each, and on Ray's
workers of this computer too. All processes write down what they do (`tests/support/audit.py`).
"""
import json
import pickle
import re
import shutil
import sys
import time
import urllib.error
import uuid

import pytest
from audit import Audit, Listener, Untouched
from process_tree import wait_for_processes_using

from devtools.files import demo_files, tiny_models
from devtools.files.gguf_files import write_gguf
from devtools.host.server import PACK, Server
from featherweight.nodes import FILE_INPUTS
from featherweight.ops.kernels.private_files import cache_folder

pytestmark = [pytest.mark.not_on_fake_gpus(reason="they have a sitecustomize of their own"),
              pytest.mark.skipif(sys.platform != "linux", reason="needs inotify and /proc")]
MARK = f"hostile{uuid.uuid4().hex[:12]}"
PICKLES = (".gguf", ".safetensors", ".sft", ".ckpt", ".pt", ".bin")
SECONDS = 600  # for all prompts of a test
FOLDERS = (
    "diffusion_models",
    "unet",
    "text_encoders",
    "clip",
    "checkpoints",
    "vae",
    "loras",
    "diffusers",
)
SMALL = "small.gguf"  # a model of two blocks
# A pack with every fault that is looked for: what is seen of it shows that the test sees.
FAULTY = '''
import os, pickle, socket, subprocess, time
class Faulty:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"fault": ("STRING", {}), "value": ("STRING", {})}}
    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # runs each time, in a test's second try too
    def run(self, fault, value):
        try:
            {"open": lambda: open(value), "write": lambda: open(value + ".new", "w").close(),
             "list": lambda: os.listdir(value),
             "connect": lambda: socket.create_connection(("127.0.0.1", int(value)), 1),
             "resolve": lambda: socket.getaddrinfo(value, 80),
             "start": lambda: subprocess.run(["true", value]),
             "system": lambda: os.system("true " + value),
             "another program": lambda: subprocess.run(["true"]),
             "variable": lambda: os.environ.update(X=value),
             "unpickle": lambda: pickle.load(open(value, "rb")),
             "evaluate": lambda: eval(repr(value)), "import": lambda: __import__(value),
             "remove": lambda: os.remove(value),
             "library": lambda: __import__("ctypes").CDLL(value),
             "link": lambda: os.symlink("x", value + ".link"),
             "wait": lambda: [time.sleep(0.1) for _ in iter(lambda: os.path.exists(value), True)],
             "native": lambda: __import__("ctypes").CDLL(None).open(value.encode(), 0)}[fault]()
        except Exception:
            pass
        return {}
NODE_CLASS_MAPPINGS = {"Faulty": Faulty}
'''


class Trap:
    """Says that it was unpickled: by what it looks for, and by what it makes."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


class Stranger:
    """A server under watch, and hostile prompts for it."""

    def __init__(self, base):
        self.audit = Audit(base, MARK)
        demo_files.make_models(self.audit.server)
        (self.audit.server / "models" / "checkpoints").mkdir()
        shutil.copy(self.audit.server / "models" / "diffusion_models" / demo_files.MODELS["Q8_0"],
                    self.audit.server / "models" / "checkpoints" / "honest.gguf")
        write_gguf(self.audit.server / "models" / "diffusion_models" / SMALL,
                   tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1),
                   lambda *_: "Q8_0")
        for folder in FOLDERS:
            self.lay_traps(self.audit.server / "models" / folder)
        self.take_packing_kernels()
        self.lay_traps(self.audit.server / "output")
        self.lay_traps(self.audit.server / "output" / "sensitivity")
        self.private = self.audit.server / "custom_nodes" / "private.disabled"
        self.private.mkdir(parents=True)
        for folder in (self.audit.outside, self.private):
            for name in (f"{MARK}.gguf", ".env"):
                (folder / name).write_text("HF_TOKEN=secret")

    def take_packing_kernels(self):
        """Those that this user has, for each takes 3 s to compile. Other kernels are compiled under
        watch."""
        folder = self.audit.own[1] / "featherweight" / "kernels"
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700)
        for library in (cache_folder() / "kernels").glob("*.so"):
            if re.search(b"pack_(blocks|columns)", library.read_bytes()):
                shutil.copy2(library, folder)

    def lay_traps(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for ending in (*PICKLES, ".sensitivity"):
            (folder / f"{MARK}{ending}").write_bytes(
                pickle.dumps(Trap(self.audit.outside / "unpickled"), 2))

    def texts(self, port: int) -> list[str]:
        outside, file = self.audit.outside, f"{MARK}.gguf"
        return [
            f"{outside}/{file}", f"../../../outside/{file}", f"..\\..\\..\\outside\\{file}",
            f"{MARK}/../../../../outside/x", f"{self.private}/{file}",
            f"custom_nodes/private.disabled/{MARK}", "/etc/passwd", "/dev/zero",
            "/proc/self/environ", f"\\\\127.0.0.1@{port}\\{MARK}\\x.gguf",
            f"http://127.0.0.1:{port}/{MARK}.safetensors", f"127.0.0.1:{port}",
            f"file://{outside}/{file}", f"C:\\{file}", "CON", f"{MARK}\0.gguf",
            f"{MARK}\ud800.gguf", "%year%" + MARK, f"$(touch {outside}/{MARK}-ran)",
            f"x; touch {outside}/{MARK}-ran #.gguf", f"-o{outside}/{file}",
            f"__import__('os').mkdir('{outside}/{MARK}-ran')", MARK * 500,
            *(MARK + ending for ending in PICKLES), f"{MARK}.sensitivity", f"output/{MARK}.gguf"
        ]

    def others(self) -> list:
        return [
            float("inf"),
            float("nan"), -1, 2**63, 10**400, 1e308, True, None, [], {}, [MARK], {"a": MARK},
            ["nowhere", 0], ["model", MARK], ["model", 10**9], ["model", 0],
            {"__value__": ["model", 0]}, {"__value__": MARK}
        ]


SOURCES = {
    "model": ("FeatherweightLoadDiffusionModel", {"model_name": demo_files.MODELS["Q8_0"]}),
    "small": ("FeatherweightLoadDiffusionModel",
              {"model_name": SMALL}), "clip": ("FeatherweightLoadTextEncoder", {
                  "text_encoder_1": demo_files.ENCODER_NAME, "text_encoder_2": "none",
                  "text_encoder_3": "none", "text_encoder_4": "none", "mmproj": "none",
                  "type": "stable_diffusion"
              }), "vae": ("VAELoader", {"vae_name": demo_files.VAE_NAME}),
    "text": ("CLIPTextEncode", {"text": "a red house", "clip": ["clip", 0]}),
    "latent": ("EmptySD3LatentImage", {"width": 16, "height": 16, "batch_size": 1}),
    "sampler": ("KSampler", {
        "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 0],
        "latent_image": ["latent", 0], "seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "simple", "denoise": 1.0
    }), "images": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]})
}
LINKS = {
    "MODEL": "model", "CLIP": "clip", "VAE": "vae", "CONDITIONING": "text", "LATENT": "latent",
    "IMAGE": "images"
}
# What makes nodes quick, in the place of what they have by themselves.
QUICK = {
    "count": 1, "samples": 1, "steps": 1, "workers": 1, "thoroughness": "fast", "type": "Q8_0"
}
SLOW = {"CONDITIONING"}  # inputs that have a node draw
RAY = "FeatherweightRunOnRay"
MEASURE = "FeatherweightMeasureSensitivity"  # runs a model many times


def is_own(kind: str) -> bool:
    """Whether an id is this pack's own, and not one of another pack that it has too."""
    return kind.startswith("Featherweight")


def node(kind: str, inputs: dict) -> dict:
    return {"class_type": kind, "inputs": inputs}


def sources() -> dict:
    return {name: node(*source) for name, source in SOURCES.items()}


def inputs_of(info: dict) -> dict:
    """Name -> an honest value, of all inputs of a node but the hidden ones."""
    found = {}
    for name, spec in {**info["input"].get("required", {}),
                       **info["input"].get("optional", {})}.items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        choices = kind if isinstance(kind, list) else options.get("options", [])
        if not isinstance(kind, list) and kind in LINKS:
            found[name] = [LINKS[kind], 0]
        else:
            honest = [choice for choice in choices if MARK not in str(choice)]
            quick = QUICK.get(name)
            found[name] = (
                quick
                if quick is not None and (not choices or quick in choices)
                else options.get("default", honest[0] if honest else "")
            )
    return found


def plain_inputs(info: dict) -> dict:
    """`inputs_of` without those that a node may lack and is slower with."""
    slow = {name for name, spec in info["input"].get("optional", {}).items()
            if str(spec[0]) in SLOW}
    return {name: value for name, value in inputs_of(info).items() if name not in slow}


def prompt_of(info: dict, kind: str, inputs: dict, name: str = "node") -> dict:
    """A node and one that shows what it gives."""
    found = {name: node(kind, inputs)}
    if not info["output_node"]:
        found[f"{name} shown"] = node("PreviewAny", {"source": [name, 0]})
    return found


def post(server, prompt: dict) -> dict | None:
    """The names of nodes whose inputs were refused, with why; None where the host does not
    understand the prompt."""
    try:
        return json.loads(server.post("/prompt",
                                      {"prompt": {**sources(), **prompt}}))["node_errors"]
    except urllib.error.HTTPError as error:
        try:
            return json.loads(error.read())["node_errors"]
        except (ValueError, KeyError):
            return None


def wait(server):
    """Until all that was posted has run."""
    end = time.monotonic() + SECONDS
    while server.get_json("/prompt")["exec_info"]["queue_remaining"]:
        assert time.monotonic() < end, "the prompts take too long"
        time.sleep(0.1)


def contents(folder) -> dict:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, as_a_user):
    found = Stranger(tmp_path_factory.mktemp("stranger"))
    yield found
    wait_for_processes_using(found.audit.ray)  # Ray's write to it until they exit
    shutil.rmtree(found.audit.ray, ignore_errors=True)


class Watch:
    """What is done by a server and the processes behind it inside a `with` block."""

    def __init__(self, stranger, server, listener, untouched):
        self.stranger, self.server, self.listener, self.untouched = (
            stranger,
            server,
            listener,
            untouched,
        )

    def __enter__(self):
        self.before, self.since = self.contents(), self.stranger.audit.position()
        self.connections = self.listener.count
        self.untouched.touched()  # by this test
        return self

    def contents(self) -> list:
        return [contents(self.stranger.audit.outside), contents(self.stranger.private)]

    def __exit__(self, *_):
        self.breaches = self.stranger.audit.breaches(self.since, self.server.process.pid)
        self.touched, self.connections = (
            self.untouched.touched(),
            self.listener.count - self.connections,
        )

    def assert_nothing(self):
        assert self.breaches == []
        assert self.connections == 0 and self.touched == [] and self.contents() == self.before
        assert self.server.process.poll() is None and self.server.system_stats()


@pytest.fixture(scope="module")
def watch(stranger):
    with Listener() as listener, Server(stranger.audit.server, env=stranger.audit.environment(),
                                        extra_custom_nodes={"faulty": FAULTY}) as server, \
            Untouched(stranger.audit.outside, stranger.private) as untouched:
        yield Watch(stranger, server, listener, untouched)


@pytest.fixture(scope="module")
def nodes(watch):
    """Id -> what the server says of it, of each node of this pack."""
    return {kind: each for kind, each in watch.server.object_info().items()
            if each["python_module"] == f"custom_nodes.{PACK}"}


@pytest.fixture(scope="module")
def gate(stranger, watch):
    """A file for which the server waits before it runs what is posted from now on."""
    path = stranger.audit.base / "gate"
    watch.server.post("/prompt",
                      {"prompt": {"gate": node("Faulty", {"fault": "wait", "value": str(path)})}})
    yield path
    path.touch()  # after an error too


@pytest.fixture(scope="module")
def accepted(stranger, watch, nodes, gate):
    """(id of a node, its inputs), each with one hostile value that the host's checks let through:
    for each input some of them, other ones for each input. What they refuse is refused here."""
    found, turn = [], 0
    for kind, each in nodes.items():
        honest, group, cases = plain_inputs(each), {}, {}
        if kind == MEASURE:
            honest["model"] = ["small", 0]
        for name, value in inputs_of(each).items():
            texts = stranger.texts(watch.listener.port) if not isinstance(value, list) else []
            # none is a large one
            others = [hostile for hostile in stranger.others() if hostile or value != ["latent", 0]]
            hostile_values = list(enumerate([*texts, *others]))
            if not is_own(kind):
                turn += 1
                hostile_values = hostile_values[turn % 3::3]
            for number, hostile in hostile_values:
                cases[f"{name} {number}"] = (
                    name,
                    isinstance(hostile, str),
                    {**honest, name: hostile},
                )
        for case, (_, _, inputs) in cases.items():
            group |= prompt_of(each, kind, inputs, case)
        refused = post(watch.server, group)
        assert refused is not None, f"{kind}: the host does not answer"
        for name in inputs_of(each):
            for is_text, most in ((True, 3), (False, 1)):
                left = [inputs for case, (of, text, inputs) in cases.items()
                        if of == name and text is is_text and case not in refused]
                turn += 1
                if not is_own(kind):
                    most = turn % 2
                found += [(kind, left[(turn + step * 5) % len(left)])
                          for step in range(min(most, len(left)))]
    watch.server.post("/queue", {"clear": True})
    gate.touch()
    wait(watch.server)
    return found


def test_no_value_of_a_workflow_chooses_a_host_a_program_a_file_outside_a_variable_or_code(
        watch, nodes, accepted):
    kinds = {kind for kind, _ in accepted}
    # of the ids of other packs, the values of each are others by the number of nodes before it
    assert len(nodes) > 60 and RAY in kinds and sum(not is_own(kind) for kind in kinds) > 20
    started = time.monotonic()
    with watch:
        for kind, inputs in accepted:
            if kind != RAY:
                post(watch.server, prompt_of(nodes[kind], kind, inputs))
        wait(watch.server)
    print(f"{len(accepted)} prompts in {time.monotonic() - started:.0f} s")
    watch.assert_nothing()
    compiled = any("c++" in event.texts[0] for event in watch.stranger.audit.events()
                   if event.name == "subprocess.Popen")
    assert compiled or not shutil.which("c++")


def loaders(stranger, nodes: dict, port: int) -> list[dict]:
    """What Run on Ray draws with a loader of this pack in the place of an honest one, and hostile
    names in all its pickers."""
    found, turn = [], 0
    for kind, each in nodes.items():
        place = LINKS.get((each["output"] or [""])[0])
        named = [name for name in inputs_of(each) if FILE_INPUTS.fullmatch(name)]
        if place in ("model", "clip", "vae") and named:
            texts, turn = stranger.texts(port), turn + 1
            honest = inputs_of(each)
            found.append({
                place: node(kind, {**honest, **dict.fromkeys(named, texts[turn * 7 % len(texts)])})
            })
    return found


def test_nor_does_one_on_ray_in_its_batch_and_its_workers(stranger, watch, nodes, accepted):
    pytest.importorskip("ray")
    honest = inputs_of(nodes[RAY]) | {"images": ["images", 0]}
    # Ray and a worker are there from now on
    run = watch.server.queue({**sources(), **prompt_of(nodes[RAY], RAY, honest)})
    assert run.outputs
    with watch:
        for address in stranger.texts(watch.listener.port):
            post(watch.server, prompt_of(nodes[RAY], RAY, honest | {"address": address}))
        for replaced in loaders(stranger, nodes, watch.listener.port):
            post(watch.server, {**prompt_of(nodes[RAY], RAY, honest), **replaced})
        for kind, inputs in accepted:  # last, for some of them end the worker
            if kind == RAY:
                post(watch.server, prompt_of(nodes[RAY], RAY, inputs))
        wait(watch.server)
    watch.assert_nothing()
    programs = " ".join(stranger.audit.programs().values())
    assert "batch.py serve" in programs and "default_worker.py" in programs


@pytest.mark.parametrize(
    ("fault", "value", "found"),
    [
        ("open", "{outside}/MARK.gguf", "a file outside is opened"),
        ("open", "/etc/passwd", "a file outside is opened"),
        ("open", "/proc/self/environ", "a file outside is opened"),
        ("write", "{outside}/MARK.gguf", "a file outside is written"),
        ("list", "{outside}", "a file outside is opened"),
        ("remove", "{outside}/removed", "a file outside is written"),
        ("link", "{outside}/MARK", "a file outside is written"),
        ("native", "{outside}/MARK.gguf", "touched"),
        ("connect", "{port}", "a connection"),
        ("resolve", "MARK.localhost", "a connection"),
        ("start", "MARK", "a program with an argument"),
        ("system", "MARK", "a program with an argument"),
        ("another program", "", "a program of its own"),
        ("variable", "MARK", "a variable of the environment"),
        ("unpickle", "{models}/MARK.pt", "a pickle"),
        ("evaluate", "MARK", "of a value"),
        ("import", "MARK", "of a value"),
        ("library", "{outside}/MARK.so", "of a value"),
    ],
)
def test_a_node_that_breaks_the_rule_is_seen(stranger, watch, fault, value, found):
    (stranger.audit.outside / "removed").touch()
    value = value.replace("MARK",
                          MARK).format(outside=stranger.audit.outside, port=watch.listener.port,
                                       models=stranger.audit.server / "models" / "loras")
    with watch:
        watch.server.queue({"1": node("Faulty", {"fault": fault, "value": value})})
    is_seen = any(found in breach for breach in watch.breaches)
    assert is_seen or (found == "touched" and watch.touched)
    assert watch.connections == (fault == "connect")
    with pytest.raises(AssertionError):
        watch.assert_nothing()
