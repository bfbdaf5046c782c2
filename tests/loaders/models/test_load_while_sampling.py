"""A model is loaded in one thread while another thread runs a model: neither has an effect on the
other."""
import threading

import pytest
import torch
from pack_api import load_diffusion_model
from patched_models import flux_file, flux_inputs, forward, lora_for, packed_flux, patched, run

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.heavy)
            for options in ({"pack_to": "Q8_0"}, {"compute": "int8"})
        ),
    ],
    ids=["exact", "packed", "int8"],
)
def test_a_load_while_a_model_runs_changes_neither(options):
    path, values = flux_file("Q4_K")
    model = patched(packed_flux("Q4_K"), (lora_for(values), 0.7))
    other, inputs = flux_file("Q4_K", seed=1)[0], flux_inputs()
    expected, expected_of_other = run(model), run(load_diffusion_model(other, **options))
    run(model)
    loaded, done = [], threading.Event()

    def load():
        while len(loaded) < 3 or not done.is_set():
            loaded[:] = [*loaded[-4:], load_diffusion_model(other, **options)]

    thread = threading.Thread(target=load)
    thread.start()
    steps = []
    while len(steps) < 10 or (len(loaded) < 3 and thread.is_alive()):
        steps.append(forward(model, inputs))
    done.set()
    thread.join()
    assert all(torch.equal(step, expected) for step in steps)
    assert all(torch.equal(run(each), expected_of_other) for each in loaded)
    assert torch.equal(run(model), expected)
