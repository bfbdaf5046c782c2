"""NF4 checkpoints through the real server: a picture with a LoRA, ids of shared workflows."""
import numpy as np
import pytest

from devtools import demo
from devtools.files import demo_files
from devtools.host.server import ServerError

pytest.importorskip("bitsandbytes", reason="it writes the files")


@pytest.fixture(scope="module")
def checkpoint(server):
    return demo_files.make_checkpoint(server.base)


def test_an_nf4_checkpoint_with_a_lora_makes_a_picture(server, checkpoint):
    run, prompt = demo.run_workflow(server, workflow=demo.NF4_WORKFLOW)
    picture = server.pixels(run)
    assert picture.shape == (128, 128, 3) and picture.std(axis=(0, 1)).min() > 5
    line = next(match for match in demo.LOADED.finditer(server.log())
                if match["file"] == checkpoint.name)
    assert "NF4 32" in line["formats"]
    # the report is of the model, the file has the VAE too
    assert int(line["held"]) < 1.05 * checkpoint.stat().st_size

    lora = next(node for node in prompt.values() if "lora_name" in node["inputs"])
    lora["inputs"]["strength_model"] = 0.0
    plain = server.pixels(server.queue(prompt))
    assert np.abs(plain - picture).mean() > 1

    # The ids of other packs' workflows give the same picture, with the values those workflows have.
    loader = next(node for node in prompt.values()
                  if node["class_type"] == "FeatherweightLoadCheckpoint")
    loader.update(class_type="CheckpointLoaderNF4",
                  inputs={"ckpt_name": checkpoint.name, "bnb_dtype": "nf4"})
    assert np.array_equal(server.pixels(server.queue(prompt)), plain)


def test_a_missing_text_encoder_is_said_where_it_is_used(server, checkpoint):
    with pytest.raises(ServerError, match="does not contain a valid clip or text encoder") as error:
        server.queue({
            "1": {"class_type": "CheckpointLoaderNF4", "inputs": {"ckpt_name": checkpoint.name}},
            "2": {
                "class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a feather"}
            }, "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
        })
    assert str(error.value).startswith("CLIPTextEncode")
